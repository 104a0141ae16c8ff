"""Reads a trace of availability: a CSV with a row for each span of time in which a recorded device could be asked."""

from __future__ import annotations

import csv
from hashlib import sha256
from math import inf
from pathlib import Path

import numpy as np

from fedsim.devices.availability import Trace
from fedsim.errors import BadInput

HEADER = ("client", "from", "until")


def read_trace(path: Path, kind: str) -> Trace:
    """The trace in a CSV `client,from,until`: seconds since the start, from below until, devices numbered from 0 without a gap.

    BadInput names the first line that is wrong, the devices that have no row, and spans of one device that overlap.
    """
    try:
        content = path.read_bytes()
        lines = list(csv.reader(content.decode().splitlines()))
    except OSError as error:
        right = '"always", a probability per round, {share = 0.4, period = 86400} or a CSV file with ' + ",".join(HEADER)
        raise BadInput(f"kind {kind!r}: available = {path.name!r}: {path}: {error.strerror}; it is {right}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path} is no CSV file: {error}") from None
    if not lines or tuple(name.strip() for name in lines[0]) != HEADER:
        raise BadInput(f"{path}: its first line must be {','.join(HEADER)}")
    spans = np.array([_span(path, number, row) for number, row in enumerate(lines[1:], 2) if row], float).reshape(-1, 3)
    if not len(spans):
        raise BadInput(f"{path} has no span of time; each device needs one at least")
    spans = spans[np.lexsort((spans[:, 1], spans[:, 0]))]
    owner = spans[:, 0].astype(np.int64)
    _refuse_gaps(path, owner)
    _refuse_overlaps(path, owner, spans)
    first = np.searchsorted(owner, np.arange(owner[-1] + 2))
    return Trace(first, spans[:, 1].copy(), spans[:, 2].copy(), float(spans[:, 2].max()), sha256(content).hexdigest())


def _span(path: Path, number: int, row: list[str]) -> tuple[float, float, float]:
    try:
        client, begin, end = int(row[0]), float(row[1]), float(row[2])
    except (ValueError, IndexError):
        raise BadInput(f"{path}, line {number}: {','.join(row)!r} is not client,from,until in whole numbers and seconds") from None
    if client < 0 or not 0 <= begin < end < inf:
        raise BadInput(f"{path}, line {number}: client {client} from {begin:g} until {end:g}; clients and seconds begin at 0, from < until")
    return client, begin, end


def _refuse_gaps(path: Path, owner: np.ndarray) -> None:
    missing = np.setdiff1d(np.arange(owner[-1] + 1), owner)
    if len(missing):
        few = ", ".join(map(str, missing[:5])) + (" …" if len(missing) > 5 else "")
        raise BadInput(f"{path} has gaps: no row for client {few}; number the devices from 0 to {owner[-1]} without a gap")


def _refuse_overlaps(path: Path, owner: np.ndarray, spans: np.ndarray) -> None:
    early = np.flatnonzero((owner[1:] == owner[:-1]) & (spans[1:, 1] < spans[:-1, 2]))
    if len(early):
        one, next = spans[early[0]], spans[early[0] + 1]
        both = f"{one[1]:g} to {one[2]:g} and {next[1]:g} to {next[2]:g}"
        raise BadInput(f"{path}: spans of client {int(one[0])} overlap: {both} seconds")
