"""How values are written in messages and help texts: as a job file writes them."""

from __future__ import annotations

import json
from typing import Any


def written(value: Any) -> str:
    """A value as a job file writes it: text in double quotes, true and false in small letters."""
    return json.dumps(value, ensure_ascii=False, default=str)
