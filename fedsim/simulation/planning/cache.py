"""What is measured once on a machine and remembered in the user's cache."""

from __future__ import annotations

import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

from fedsim.core.user_cache import user_cache


def place(kind: str, *mark: Any) -> Path:
    """Where a measurement of this kind and of these plain values is kept."""
    return user_cache() / kind / f"{sha256(json.dumps(mark).encode()).hexdigest()[:32]}.json"


def remember(path: Path, text: str) -> None:
    """A cache that cannot be written costs a measurement next time, no more."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}")
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError:
        pass
