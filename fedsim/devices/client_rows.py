"""Reads files that fix the devices of clients: a row for each client, or measured capacities in the form of FedScale."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.devices.draws import Floats
from fedsim.devices.kind import DeviceKind
from fedsim.devices.mix import FIXED, SPREAD, DeviceMix
from fedsim.errors import BadInput

COLUMNS = (*SPREAD, *FIXED)  # what a row may fix beside the kind
ABOVE_ZERO = ("flops", "down", "up", "memory")
NEEDED = ("flops", "memory", "down", "up")  # of a device
TRAINING = 3  # passes of training for one forward pass
BITS = 1_000  # in a kbit
MS = 1_000  # in a second


def with_clients(mix: DeviceMix, path: Path) -> DeviceMix:
    """The mix, with the kind or the figures of each client from a CSV: `client,kind`, `client,flops,memory,…` or both.

    BadInput for an unknown column or kind, a figure that cannot be, and clients that have no row or two.
    """
    rows, own = _clients(path)
    kinds = np.array([_kind(mix, path, number, row["kind"]) for number, row in rows]) if "kind" in rows[0][1] else mix.rows
    return replace(mix, rows=kinds, own={**mix.own, **own}, registered=len(rows), digests=_with_digest(mix, path))


def of_clients_alone(path: Path) -> DeviceMix:
    """A mix of a CSV that has all figures of each client: `client,flops,memory,down,up` and more. Clients with one `kind` are a kind, whose
    figures are their medians; without that column all are of the kind "device"."""
    rows, own = _clients(path)
    if missing := [name for name in NEEDED if name not in own]:
        raise BadInput(f"{path} has no column {missing[0]!r}; it needs client, {', '.join(NEEDED)}, and may have kind and others")
    called = np.array([row.get("kind", "device") for _, row in rows])
    names = list(dict.fromkeys(called.tolist()))
    figures = [{name: float(np.median(values[called == kind])) for name, values in own.items()} for kind in names]
    shares = [float((called == kind).mean()) for kind in names]
    kinds = tuple(DeviceKind(kind, share, **dict[str, Any](each)) for kind, share, each in zip(names, shares, figures, strict=True))
    mix = DeviceMix(str(path), kinds, rows=np.array([names.index(kind) for kind in called]), own=own, registered=len(rows))
    return replace(mix, digests=_with_digest(mix, path))


def _clients(path: Path) -> tuple[list[tuple[int, dict[str, str]]], dict[str, Floats]]:
    """The rows of a file of clients, each with its line, in the order of the clients; and their figures, (N,) by column."""
    header, rows = _table(path)
    if "client" not in header or len(header) < 2:
        raise BadInput(f"{path}: its first line must be client,kind, or client and some of {', '.join(COLUMNS)}")
    if unknown := [name for name in header if name not in ("client", "kind", *COLUMNS)]:
        raise BadInput(f"{path} has the column {unknown[0]!r}. There are: client, kind, {', '.join(COLUMNS)}")
    order = np.array([_client(path, number, row["client"]) for number, row in rows])
    _refuse_missing(path, order)
    rows = [rows[place] for place in np.argsort(order)]
    return rows, {name: np.array([_figure(path, number, name, row[name]) for number, row in rows]) for name in header if name in COLUMNS}


def of_capacity(mix: DeviceMix, path: Path, reference_flops: float) -> DeviceMix:
    """The mix, with the speeds of each client from capacity rows of FedScale (Lai et al., ICML 2022), drawn by the client's key.

    computation c in ms for an image of the reference model: flops = 3 · reference_flops / (c / 1000); communication in kbit/s:
    up = down = communication · 1000. CSV with these two columns, or JSON: a list of such rows, or a table of them by device.
    """
    rows = _capacities(path)
    if not rows:
        raise BadInput(f"{path} has no row; a row is computation (ms) and communication (kbit/s)")
    for number, row in rows:
        for name in ("computation", "communication"):
            if not 0 < row[name] < inf:
                raise BadInput(f"{path}, row {number}: {name} = {row[name]:g} must be above 0")
    computation, communication = (np.array([row[name] for _, row in rows]) for name in ("computation", "communication"))
    flops, link = TRAINING * reference_flops / (computation / MS), communication * BITS
    return replace(mix, pool={"flops": flops, "down": link, "up": link.copy()}, digests=_with_digest(mix, path))


def _with_digest(mix: DeviceMix, path: Path) -> dict[str, str]:
    return {**mix.digests, str(path): sha256(path.read_bytes()).hexdigest()}


def _table(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """The header, and each row with its line."""
    lines = list(csv.reader(_text(path).splitlines()))
    if not lines:
        raise BadInput(f"{path} is empty; its first line names the columns")
    header = [name.strip() for name in lines[0]]
    if twice := [name for name in header if header.count(name) > 1]:
        raise BadInput(f"{path} has the column {twice[0]!r} twice")
    rows = []
    for number, cells in enumerate(lines[1:], 2):
        if cells and len(cells) != len(header):
            raise BadInput(f"{path}, line {number} has {len(cells)} values; the first line names {len(header)} columns")
        if cells:
            rows.append((number, dict(zip(header, (cell.strip() for cell in cells), strict=True))))
    return header, rows


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; [devices] names it") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is no text: {error}") from None


def _client(path: Path, number: int, text: str) -> int:
    if not text.isdecimal():
        raise BadInput(f"{path}, line {number}: client {text!r} must be a number from 0 on")
    return int(text)


def _refuse_missing(path: Path, order: np.ndarray) -> None:
    if not len(order):
        raise BadInput(f"{path} has no client")
    counts = np.bincount(order, minlength=len(order))
    for what, wrong in {"has two rows": np.flatnonzero(counts > 1), "has no row": np.flatnonzero(counts == 0)}.items():
        if len(wrong):
            raise BadInput(f"{path}: client {wrong[0]} {what}; each client from 0 on needs one")


def _figure(path: Path, number: int, name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    least, most = (0.0, 1.0) if name == "fails" else (0.0, inf)
    if not (least < value < most if name in ABOVE_ZERO else least <= value < most):
        right = "above 0" if name in ABOVE_ZERO else "at least 0 and below 1" if name == "fails" else "at least 0"
        raise BadInput(f"{path}, line {number}: {name} = {text!r} must be a number {right}")
    return value


def _kind(mix: DeviceMix, path: Path, number: int, name: str) -> int:
    try:
        return mix.number(name)
    except BadInput as error:
        raise BadInput(f"{path}, line {number}: {error}") from None


def _capacities(path: Path) -> list[tuple[int, dict[str, float]]]:
    found: Any
    if path.suffix == ".json":
        try:
            found = json.loads(_text(path))
        except json.JSONDecodeError as error:
            raise BadInput(f"{path} is no JSON file: {error}") from None
        rows = list(enumerate(found.values() if isinstance(found, dict) else found if isinstance(found, list) else ()))
    else:
        rows = _table(path)[1]
    return [(number, _capacity(path, number, row)) for number, row in rows]


def _capacity(path: Path, number: int, row: Any) -> dict[str, float]:
    try:
        if not isinstance(row, Mapping):
            raise TypeError
        return {name: float(row[name]) for name in ("computation", "communication")}
    except (KeyError, TypeError, ValueError):
        raise BadInput(f"{path}, row {number}: {row!r:.80} must have the numbers computation (ms) and communication (kbit/s)") from None
