"""Every column and attribute of a run file, with unit and meaning."""

from __future__ import annotations

from collections.abc import Mapping

from fedsim_analysis.run_file import DIMENSIONS

from fedsim.storage.columns import ARRAYS, ATTRIBUTES, COLUMNS, OF_DEVICES, OF_METHODS, Column
from from_code.markdown import code, plain, table

WHEN = {
    "In every run file": COLUMNS,
    "Where clients have devices": OF_DEVICES,
    "Of some methods: a column is made when a method first records it": OF_METHODS,
}


def columns() -> str:
    """The columns of each group: those of every file first."""
    return "\n\n".join(_group(group, scales) for group, scales in DIMENSIONS.items())


def _group(group: str, scales: tuple[str, ...]) -> str:
    parts = [f"### `/{group}`: one number for each {' and '.join(scales)}"]
    for when, known in WHEN.items():
        found = {path.removeprefix(f"{group}/"): column for path, column in known.items() if path.startswith(f"{group}/")}
        parts += [f"{when}:", _table(found)] if found else []
    return "\n\n".join(parts)


def _table(found: Mapping[str, Column]) -> str:
    rows = ((code(name), plain(column.units), plain(column.about)) for name, column in found.items())
    return table(("column", "unit", "meaning"), rows)


def attributes() -> str:
    rows = ((code(name), kind, plain(about)) for name, (kind, about) in ATTRIBUTES.items())
    return table(("attribute", "type", "meaning"), rows)


def arrays() -> str:
    return table(("array", "shape", "what it is"), ((code(name), plain(shape), plain(about)) for name, (shape, about) in ARRAYS.items()))
