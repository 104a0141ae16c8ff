"""Text of run files on a page, in a script element and in plotly: shown as it is, never obeyed."""

from __future__ import annotations

import html
import json
from typing import Any

import numpy as np

from fedsim_analysis.foreign_text import printable

LINES = "\n\t"
IN_SCRIPT = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
LONGEST = 60  # characters of a label


def shown(text: object, kept: str = "") -> str:
    """The text with signs that steer a terminal or the direction of reading written out: an escape is \\x1b. `kept`: signs that stay."""
    return printable(text, kept)


def label(text: object, longest: int = LONGEST) -> str:
    """A name in plotly, which reads markup in names: escaped, and cut where it is too long for a legend."""
    text = shown(text)
    return html.escape(text if len(text) <= longest else text[: longest - 1] + "…", quote=False)


def script_json(value: Any) -> str:
    """JSON that can stand in a script element: nothing in it ends the element or begins a comment. What is not finite is null."""
    text = json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return "".join(IN_SCRIPT.get(sign, sign) for sign in text)


def _plain(value: Any) -> Any:
    """Arrays and numpy's numbers as JSON has them; numbers with six digits."""
    if isinstance(value, dict):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value
