"""What is measured once on a machine and remembered in the user's cache."""

from __future__ import annotations

import json
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from fedsim.core import user_cache


def place(kind: str, *mark: Any) -> Path:
    """Where a measurement of this kind and of these plain values is kept."""
    return user_cache.user_cache() / kind / f"{sha256(json.dumps(mark).encode()).hexdigest()[:32]}.json"


def known(path: Path) -> str | None:
    """What is remembered there; None: nothing, or nothing that this user alone can have written."""
    try:
        return user_cache.content(path).decode()
    except (OSError, UnicodeError):
        return None


def remember(path: Path, text: str) -> None:
    """A cache that cannot be written costs a measurement next time, no more."""
    with suppress(OSError):
        user_cache.make(path.parent)
        user_cache.put(path, text.encode())
