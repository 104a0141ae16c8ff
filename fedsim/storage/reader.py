"""The reader of a run file, for use while it grows and after."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedsim.errors import BadInput
from fedsim.storage import client_gates, encoding, former_names
from fedsim.storage.client_gates import Gates
from fedsim.storage.columns import Column
from fedsim.storage.layout import is_former, last_mask, mask_of, names, opened, stored_name

Tree = dict[str, Tensor]
Result = TypeVar("Result")


class RunReader:
    """Reads a run file, also while it grows: a file met half-written is tried again for 2 s, if there is a `sleep`.

    Every call opens the file anew, so it sees the rows written since. Arrays hold rows 0 … `rounds`. Raises BadInput for a
    file that is missing, damaged, no run file or of a newer format, and for a column it does not have.
    check: whether the file is opened here already, so that a wrong path is known at once.
    """

    def __init__(self, path: str | Path, sleep: Callable[[float], object] | None = None, check: bool = True) -> None:
        self.path = Path(path)
        self._sleep = sleep
        if check:
            self._read(lambda file: None)

    @property
    def attributes(self) -> dict[str, Any]:
        return self._read(_attributes)

    @property
    def rounds(self) -> int:
        """The last complete round, -1 before row 0."""
        return int(self.attributes["rounds"])

    def names(self, group: str = "rounds") -> list[str]:
        """The columns of "rounds", "clients", "layers", "timing" or "speed"."""
        return self._read(lambda file: names(file, group))

    def about(self, group: str, name: str) -> Column:
        return self._read(lambda file: Column(*(_find(file, group, name).attrs[key] for key in ("units", "long_name"))))

    def labels(self, dimension: str) -> list[Any]:
        """What a dimension's rows are called: the layers' names, the clients' numbers."""
        return self._read(lambda file: [_plain(value) for value in file[dimension][()].tolist()])

    def column(self, name: str) -> NDArray[np.float64]:
        """(rounds + 1,) of /rounds/NAME."""
        return self._rows("rounds", name)

    def clients(self, name: str, r: int | None = None) -> NDArray[np.float64]:
        """(rounds + 1, clients) of /clients/NAME, or (clients,) of round `r`: NaN where not measured."""
        return self._rows("clients", name, r)

    def layers(self, name: str) -> NDArray[np.float64]:
        """(rounds + 1, layers) of /layers/NAME."""
        return self._rows("layers", name)

    def timing(self, name: str) -> NDArray[np.float64]:
        """(rounds + 1,) seconds of a phase."""
        return self._rows("timing", name)

    def speed(self, name: str) -> NDArray[np.float64]:
        """(rounds + 1,) FLOPs or bytes per second of a phase."""
        return self._rows("speed", name)

    def masks(self, r: int) -> Tree:
        """The mask in force after round `r`; empty where none was stored."""
        layout, packed = self._read(lambda file: last_mask(file, min(r, int(file.attrs["rounds"]))))
        return encoding.unpack(layout, packed)

    def gates(self, r: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """(clients (K,), their hard gates (K, n)) in force after round `r`, by default at the end; empty where none were stored."""
        found = self._gates(r)
        return (found.clients, found.hard) if found else (np.empty(0, np.int64), np.empty((0, 0), bool))

    def groups(self, r: int | None = None) -> dict[str, int]:
        """Layer -> channels, in the order of `gates`; of the cut network once channels were cut."""
        found = self._gates(r)
        return found.groups if found else {}

    def gate_values(self, r: int | None = None) -> NDArray[np.float32] | None:
        """(K, n) the constants that replace those clients' dynamic gates; None where nothing replaces them."""
        found = self._gates(r)
        return None if found is None else found.values

    def _gates(self, r: int | None) -> Gates | None:
        def gates(file: h5py.File) -> Gates | None:
            rounds = int(file.attrs["rounds"])
            final = client_gates.read(file, client_gates.FINAL) if r is None and file.attrs["finished"] else None
            return final or client_gates.last(file, rounds if r is None else min(r, rounds))

        return self._read(gates)

    def counts(self) -> NDArray[np.int32] | None:
        """(client, class) training images, or None where they were left out."""
        return self._read(lambda file: file["partition/counts"][()] if "partition/counts" in file else None)

    def called(self, dimension: str) -> list[str] | None:
        """What the data set called each "client" or "class"; None where it had no names but their numbers here."""
        path = f"partition/{dimension}_name"
        return self.labels(path) if self._read(lambda file: path in file) else None

    def model(self) -> Tree:
        """The final weights, bit for bit; BadInput before the run has finished."""
        return self._read(lambda file: _model(file, self.path))

    def _rows(self, group: str, name: str, r: int | None = None) -> NDArray[np.float64]:
        def rows(file: h5py.File) -> NDArray[np.float64]:
            column = _find(file, group, name)
            found: NDArray[np.float64] = column[: int(file.attrs["rounds"]) + 1] if r is None else column[r]
            return found

        return self._read(rows)

    def _read(self, what: Callable[[h5py.File], Result]) -> Result:
        for attempt in range(20 if self._sleep else 1):
            if attempt and self._sleep:
                self._sleep(0.1)
            try:
                with opened(self.path) as file:
                    return what(file)
            except BadInput:
                raise
            except (OSError, RuntimeError, KeyError, ValueError) as error:
                reason = error
        raise BadInput(f"{self.path} cannot be read: {reason}; is it a run file of fedsim?") from reason


def read_model(path: str | Path) -> Tree:
    """The final weights of a finished run, with their w/, buf/ and mask/ keys, bit for bit."""
    return RunReader(path).model()


def _find(file: h5py.File, group: str, name: str) -> h5py.Dataset:
    if name not in names(file, group):
        raise BadInput(f"{file.filename} has no {group}/{name}; it has {', '.join(names(file, group)) or 'none'}")
    return file[group][stored_name(file, group, name)]


def _attributes(file: h5py.File) -> dict[str, Any]:
    found = {name: _plain(value) for name, value in file.attrs.items()}
    if is_former(file) and "job" in found:
        found["job"] = former_names.job(found["job"])
        for name, translate in (("plan", former_names.plan), ("partition", former_names.partition)):
            found[name] = json.dumps(translate(json.loads(found.get(name, "{}"))), sort_keys=True)
    return found


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return value.decode().strip() if isinstance(value, bytes) else value


def _model(file: h5py.File, path: Path) -> Tree:
    if not file.attrs["finished"]:
        raise BadInput(f"{path} holds no final weights: the run stands at round {file.attrs['rounds']} and has not finished")
    found: dict[str, h5py.Dataset] = {}
    file["model"].visititems(lambda key, item: found.update({key: item} if isinstance(item, h5py.Dataset) else {}))
    return {key: _tensor(stored, mask_of(key, found)) for key, stored in found.items()}


def _tensor(stored: h5py.Dataset, mask: h5py.Dataset | None) -> Tensor:
    return encoding.restore(stored[()], stored.attrs, None if mask is None else _tensor(mask, None))
