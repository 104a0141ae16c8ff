"""The user's cache folder: what is there may be removed at any time, and costs time alone."""

from __future__ import annotations

import os
from pathlib import Path

NOWHERE = Path(os.devnull)  # no folder can be made in it


def user_cache() -> Path:
    """`$XDG_CACHE_HOME/fedsim`, or `~/.cache/fedsim`; a folder that cannot be made where the user has no home."""
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "fedsim"
    try:
        return Path.home() / ".cache" / "fedsim"
    except RuntimeError:
        return NOWHERE / "fedsim"
