"""How values are written in messages and help texts: as a job file writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import isfinite
from typing import Any


def written(value: Any) -> str:
    """A value as a job file writes it: text in double quotes, true and false in small letters, nan and inf."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(written(inner) for inner in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key} = {written(inner)}' for key, inner in value.items())}}}"
    if value is None or (isinstance(value, float) and not isfinite(value)):
        return str(value)
    return json.dumps(value, ensure_ascii=False, default=str)


def listed(names: Sequence[str]) -> str:
    """Names as a sentence has them.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)
