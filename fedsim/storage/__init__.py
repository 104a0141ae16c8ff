"""The run file: one HDF5 file per run, appended to round by round, readable while it grows and after a kill.

    /rounds/NAME (round,)    /clients/NAME (round, client)    /layers/NAME (round, layer)    /timing/NAME, /speed/NAME (round,)
    /masks/ROUND  packed bits, where the mask changed          /partition/counts (client, class)          /model  final weights
    /devices/kind (client,)  number of the kind of each client's device; the attribute `devices` has the kinds as JSON
    /partition/client_name, /partition/class_name  what the data set called clients and classes, where it had names for them
    /client_gates/ROUND, /client_gates/final  gates of clients, where they have some of their own
    /checksums/rows (round, column)  CRC-32 of each row of the columns that /checksums/columns names, and of the masks and gates in force
    /checksums/about (column,)  CRC-32 of each column's unit and description

The dimension scales `round`, `client`, `layer` (and `class`) stand in every group that uses them, as links to one dataset, so
that xarray finds the labels whichever group it opens. A row is written and flushed before the attribute `rounds` counts it:
readers trust rows 0 … `rounds` and nothing else. While a row is being written, the columns of a group may differ in length by that
row. The final weights of a network that was cut are small; "index/GROUP" beside them says which channels of the original network are
left. Names, labels and counts, and the attributes of the file, have their CRC-32 in its attribute `crc32`, by their paths and names; masks
and gates have one in an attribute `crc32` of their own, and the model has its SHA-256 in `weights_sha256`. What other programs read and
fedsim does not (links to dimension scales) has none.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsim.storage.client_gates import Gates
    from fedsim.storage.columns import COLUMNS, Column
    from fedsim.storage.reader import RunReader, read_model
    from fedsim.storage.writer import RunWriter

__all__ = ["COLUMNS", "Column", "Gates", "RunReader", "RunWriter", "read_model"]

# Imported when they are first used: a reader of columns does without torch, which takes seconds to import.
_PLACES = {
    "Gates": "client_gates",
    "COLUMNS": "columns",
    "Column": "columns",
    "RunReader": "reader",
    "read_model": "reader",
    "RunWriter": "writer",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
