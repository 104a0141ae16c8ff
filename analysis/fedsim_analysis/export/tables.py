"""A run file as tables of plain columns, made in pieces: what CSV and Parquet hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from fedsim_analysis import checked, checksums, run_file
from fedsim_analysis.dataset.sources import Source

ROWS = 65_536  # of a piece, about
Piece = dict[str, Any]  # name of a column -> its values, all of one length; NaN where not measured


@dataclass(frozen=True)
class Column:
    """A column of a table. kind: "int", "float" or "text"."""

    name: str
    kind: str
    units: str = ""
    about: str = ""


@dataclass(frozen=True)
class Table:
    """A table and its rows, which are read piece by piece."""

    name: str
    columns: Sequence[Column]
    pieces: Callable[[], Iterator[Piece]]


def of_run(source: Source) -> list[Table]:
    """The tables of the complete rounds of a run, those without columns left out.

    rounds, timing, speed: a row for each round. layers: for each round and layer. clients: for each round and client of which something
    was measured. partition: for each client and class.
    """
    found = [_by_round(source, group) for group in ("rounds", "timing", "speed")]
    found += [_long(source, "layers", _layer(source)), _long(source, "clients", _client(source))]
    return [table for table in found if len(table.columns) > 1] + ([_partition(source)] if source.counts else [])


ROUND = Column("round", "int", "1", "round; 0 is before training")


def _measured(source: Source, group: str) -> list[Column]:
    return [Column(name, "float", units, about) for name, (units, about) in sorted(source.columns[group].items())]


def _by_round(source: Source, group: str) -> Table:
    columns = _measured(source, group)

    def pieces() -> Iterator[Piece]:
        for rounds in blocks(source.rows, ROWS):
            yield {"round": rounds, **rows(source, group, rounds)}

    return Table(group, [ROUND, *columns] if columns else [], pieces)


def rows(source: Source, group: str, rounds: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """(rounds, …) of each column of a group, of some rounds in a row; read now."""

    these = range(int(rounds[0]), int(rounds[-1]) + 1)

    def read(file: h5py.File) -> dict[str, NDArray[np.float64]]:
        done = int(checked.attribute(file, "rounds")) + 1
        checked.need(done >= source.rows, f"it has fewer rounds than the {source.rows} that it had a moment ago; export it again")
        return {name: run_file.values(file, group, name, these, known=source.sums) for name in sorted(source.columns[group])}

    found: dict[str, NDArray[np.float64]] = source.read(read)
    return found


def blocks(count: int, size: int) -> Iterator[NDArray[np.int64]]:
    """The numbers from 0 up to `count`, at most `size` at once."""
    for begin in range(0, count, max(size, 1)):
        yield np.arange(begin, min(begin + max(size, 1), count))


# --- a row for each round and layer or client

Labels = Mapping[str, tuple[Column, Any]]  # name of a column -> what it is, and its value for each layer or client


def _layer(source: Source) -> Labels:
    return {"layer": (Column("layer", "text", about="name of the layer"), np.array(source.layers, object))}


def _client(source: Source) -> Labels:
    found = dict(_numbered(source, "client", source.clients))
    if source.kinds:
        found["device"] = (Column("device", "text", about="kind of the client's device"), np.array(source.kinds, object))
    return {name: label for name, label in found.items() if name not in source.columns["clients"]}


def _numbered(source: Source, dimension: str, size: int) -> Labels:
    """The numbers of clients or classes, and what the data set called them."""
    found = {dimension: (Column(dimension, "int", "1", f"number of the {dimension}"), np.arange(size))}
    if dimension in source.names:
        about = f"what the data set called the {dimension}"
        found[f"{dimension}_name"] = (Column(f"{dimension}_name", "text", about=about), np.array(source.names[dimension], object))
    return found


def _long(source: Source, group: str, labels: Labels) -> Table:
    columns = _measured(source, group)
    size = len(next(iter(labels.values()))[1])

    def pieces() -> Iterator[Piece]:
        for rounds in blocks(source.rows, ROWS // max(size, 1)):
            values = {name: each.ravel() for name, each in rows(source, group, rounds).items()}
            there = np.flatnonzero(np.any([~np.isnan(each) for each in values.values()], axis=0))
            piece = {"round": rounds[there // size], **{name: each[there % size] for name, (_, each) in labels.items()}}
            yield piece | {name: each[there] for name, each in values.items()}

    keys = [ROUND, *(column for column, _ in labels.values())]
    return Table(group, [*keys, *columns] if columns else [], pieces)


# --- who holds what


def _partition(source: Source) -> Table:
    assert source.counts
    clients, classes = source.counts
    owners, labels = _numbered(source, "client", clients), _numbered(source, "class", classes)

    def pieces() -> Iterator[Piece]:
        held = source.read(counts)
        for block in blocks(clients, ROWS // max(classes, 1)):
            piece = {name: np.repeat(each[block], classes) for name, (_, each) in owners.items()}
            piece |= {name: np.tile(each, len(block)) for name, (_, each) in labels.items()}
            yield piece | {"images": held[block].ravel()}

    columns = [column for column, _ in [*owners.values(), *labels.values()]]
    return Table("partition", [*columns, Column("images", "int", "1", "training images")], pieces)


def counts(file: h5py.File) -> NDArray[np.int64]:
    """(clients, classes) training images."""
    found = checked.numbers(file, "partition/counts", "iu", (None, None))
    checksums.check_once(file, "partition/counts", checksums.of_array(found))
    return found.astype(np.int64)
