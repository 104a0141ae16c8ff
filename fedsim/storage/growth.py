"""How many bytes a change adds to a run file at most: what is reserved on the disk before it is made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod

from fedsim_analysis.checksums import CHUNK as SUMMED
from torch import Tensor

from fedsim.storage.client_gates import Gates
from fedsim.storage.layout import ROWS, Attributes, splits

NODE = 8_192  # more than a dataset, or a node of its index, takes beside its values
SLACK = 65_536  # for what is not counted
DEEPEST = 4  # nodes above each other that may split at once


def of_columns(r: int, paths: Iterable[str], reached: Mapping[str, int], wide: Mapping[str, Sequence[int]]) -> int:
    """For row `r` of these columns: the chunks that it begins. `reached`: the last row that was written to each, where that is known."""
    groups = [(path, path.partition("/")[0]) for path in paths if not path.startswith("clients/")]
    begun = [group for path, group in groups if reached.get(path, -1) // ROWS[group] != r // ROWS[group]]
    return sum(8 * ROWS[group] * prod(wide[group]) + NODE for group in begun)


def of_clients(r: int, chunks: Mapping[str, Sequence[tuple[int, bytes]]], held: Mapping[str, int]) -> int:
    """For the `chunks` of a row, in columns that have `held` so many."""
    nodes = sum(DEEPEST for path, new in chunks.items() if r == 0 or path not in held or splits(held[path], len(new)))
    return nodes * NODE + sum(len(chunk) for new in chunks.values() for _, chunk in new)


def of_checksums(r: int, columns: int, anew: bool) -> int:
    """For row `r` of the table, or for the whole table `anew`."""
    chunk = 4 * SUMMED * columns
    return chunk * (r // SUMMED + 1) if anew else chunk * (r % SUMMED == 0)


def of_gates(gates: Gates | None) -> int:
    if gates is None:
        return 0
    packed = gates.hard.size // 8 + len(gates.clients)
    text = sum(len(name) + NODE // 64 for name in gates.groups)
    return 4 * NODE + packed + text + gates.clients.nbytes + (0 if gates.values is None else gates.values.nbytes)


def of_model(model: Mapping[str, Tensor]) -> int:
    return sum(value.nbytes + len(key) + NODE for key, value in model.items())


def of_attributes(attributes: Attributes) -> int:
    return sum(len(str(value)) for value in attributes.values())
