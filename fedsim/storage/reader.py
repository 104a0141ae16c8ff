"""The reader of a run file, for use while it grows and after."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import h5py
import numpy as np
from fedsim_analysis import checked, checksums, masks, run_file
from fedsim_analysis.checked import Damaged, need
from numpy.typing import NDArray

from fedsim.errors import BadInput
from fedsim.storage import client_gates, former_names
from fedsim.storage.client_gates import Gates
from fedsim.storage.columns import Column
from fedsim.storage.layout import KINDS, mask_of

if TYPE_CHECKING:
    from torch import Tensor

    from fedsim.core.types import Tree
Result = TypeVar("Result")
NUMBERS = [group for group, dimensions in run_file.DIMENSIONS.items() if dimensions == ("round",)]  # groups with one number a round


@dataclass(frozen=True)
class Held:
    """What a run file held when it was read."""

    attributes: dict[str, Any]
    columns: dict[str, dict[str, NDArray[np.float64]]]  # group -> name -> (rounds + 1,)
    damaged: tuple[str, ...]  # what is wrong with the columns that are left out


class RunReader:
    """Reads a run file, also while it grows: a file met half-written is tried again for 2 s, if there is a `sleep`.

    Every call opens the file anew, so it sees the rows written since. Arrays hold rows 0 … `rounds`. Raises BadInput for a
    file that is missing, damaged, no run file or of a newer format, and for a column it does not have.
    check: whether the file is opened here already, so that a wrong path is known at once.
    """

    def __init__(self, path: str | Path, sleep: Callable[[float], object] | None = None, check: bool = True) -> None:
        self.path = Path(path)
        self._sleep = sleep
        self._held: Held | None = None
        if check:
            self._read(run_file.attributes)

    @property
    def attributes(self) -> dict[str, Any]:
        return dict(self._held.attributes) if self._held else self._read(_attributes)

    def held(self) -> RunReader:
        """The same file as it stands now: all columns have the same rows, though the run goes on.

        Those of one number a round are read at once, and those of them that are damaged are left out: see `damaged`.
        """
        held = RunReader(self.path, self._sleep, check=False)
        try:
            held._held = self._read(lambda file: _hold(file, damaged=False))
        except BadInput:
            held._held = self._read(lambda file: _hold(file, damaged=True))
        return held

    @property
    def damaged(self) -> tuple[str, ...]:
        """What is wrong with the columns that `held` left out."""
        return self._held.damaged if self._held else ()

    @property
    def job(self) -> dict[str, Any]:
        """The resolved job, under the present names."""
        return self._read(lambda file: run_file.job(run_file.attributes(file)))

    @property
    def plan(self) -> dict[str, Any]:
        """How the run is computed; empty where the file does not say."""
        return self._read(lambda file: _plan(self._held.attributes if self._held else _attributes(file)))

    @property
    def rounds(self) -> int:
        """The last complete round, -1 before row 0."""
        return int(self.attributes["rounds"])

    def names(self, group: str = "rounds") -> list[str]:
        """The columns of "rounds", "clients", "layers", "timing" or "speed"."""
        if self._held and group in self._held.columns:
            return list(self._held.columns[group])
        return self._read(lambda file: run_file.all_names(file, group))

    def about(self, group: str, name: str) -> Column:
        return self._read(lambda file: Column(*run_file.about(file, group, name)))

    def labels(self, dimension: str) -> list[Any]:
        """What a dimension's rows are called: the layers' names, the clients' numbers."""
        return self._read(lambda file: checksums.labels(file, dimension))

    def column(self, name: str) -> NDArray[np.float64]:
        """(rounds + 1,) of /rounds/NAME."""
        return self._rows("rounds", name)

    def clients(self, name: str, r: int | None = None) -> NDArray[np.float64]:
        """(rounds + 1, clients) of /clients/NAME, or (clients,) of round `r`: NaN where not measured."""
        return self._rows("clients", name, r)

    def client(self, name: str, client: int) -> NDArray[np.float64]:
        """(rounds + 1,) of /clients/NAME of one client: NaN where not measured."""
        return self._read(lambda file: run_file.values(file, "clients", name, client=client))

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
        layout, packed = self._read(lambda file: masks.in_force(file, min(r, _rounds(file))))
        from fedsim.storage import encoding  # with torch, which takes seconds to import and which columns do without

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
            rounds = _rounds(file)
            final = client_gates.final(file) if r is None and checked.attribute(file, "finished") else None
            return final or client_gates.last(file, rounds if r is None else min(r, rounds))

        return self._read(gates)

    def counts(self) -> NDArray[np.int32] | None:
        """(client, class) training images, or None where they were left out."""
        return self._read(counts_of)

    def kinds(self) -> NDArray[np.int32] | None:
        """(client,) numbers of the kinds of their devices, in the order of the attribute `devices`; None where they have none."""
        return self._read(kinds_of)

    def called(self, dimension: str) -> list[str] | None:
        """What the data set called each "client" or "class"; None where it had no names but their numbers here."""
        path = f"partition/{dimension}_name"
        return self.labels(path) if self._read(lambda file: checksums.has(file, path)) else None

    def model(self) -> Tree:
        """The final weights, bit for bit, by their SHA-256; BadInput before the run has finished."""
        return self._read(model_of)

    def _rows(self, group: str, name: str, r: int | None = None) -> NDArray[np.float64]:
        if self._held and name in self._held.columns.get(group, ()):
            return self._held.columns[group][name]
        found = self._read(lambda file: run_file.values(file, group, name, r))
        return found if r is not None or self._held is None else found[: self.rounds + 1]

    def _read(self, what: Callable[[h5py.File], Result]) -> Result:
        try:
            return run_file.read(self.path, what, self._sleep)
        except (FileNotFoundError, run_file.Absent, run_file.Unreadable) as error:
            raise BadInput(str(error)) from error


def read_model(path: str | Path) -> Tree:
    """The final weights of a finished run, with their w/, buf/ and mask/ keys, bit for bit."""
    return RunReader(path).model()


def _rounds(file: h5py.File) -> int:
    return int(checked.attribute(file, "rounds"))


def _hold(file: h5py.File, damaged: bool) -> Held:
    """damaged: whether columns that are damaged are left out; else Damaged for them."""
    found = {group: run_file.sound_columns(file, group) for group in NUMBERS}
    wrong = tuple(dict.fromkeys(message for _, messages in found.values() for message in messages))
    need(damaged or not wrong, "; ".join(wrong[:1]))
    return Held(_attributes(file), {group: columns for group, (columns, _) in found.items()}, wrong)


def _attributes(file: h5py.File) -> dict[str, Any]:
    found = run_file.attributes(file)
    texts: dict[str, Any] = {
        name: checked.from_json(found[name], f"the attribute {name!r}") for name in ("plan", "partition") if name in found
    }
    if run_file.is_former(file) and "job" in found:
        found["job"] = former_names.job(found["job"])
        for name, translate in (("plan", former_names.plan), ("partition", former_names.partition)):
            found[name] = json.dumps(translate(texts.get(name, {})), sort_keys=True)
    return found


def _plan(known: dict[str, Any]) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads(known.get("plan", "{}"))
    packs, fleet = plan.get("packs", 1), plan.get("fleet", "serial")
    if type(packs) is float and packs.is_integer():  # as plans of the CUDA graph fleet once had them
        plan["packs"] = packs = int(packs)
    need(type(packs) is int and packs > 0 and type(fleet) is str, f"its plan has the fleet {fleet!r:.40} and {packs!r:.40} packs")
    return plan


def counts_of(file: h5py.File) -> NDArray[np.int32] | None:
    """(client, class) training images, or None where they were left out."""
    if not checksums.has(file, "partition/counts"):
        return None
    clients = checked.dataset(file, "client", "iu", (None,)).shape[0]
    found = checked.numbers(file, "partition/counts", "iu", (clients, None)).astype(np.int32, copy=False)
    checksums.check_once(file, "partition/counts", checksums.of_array(found))
    return found


def kinds_of(file: h5py.File) -> NDArray[np.int32] | None:
    """(client,) numbers of the kinds of their devices, or None where they have none or were left out."""
    if not checksums.has(file, KINDS):
        return None
    clients = checked.dataset(file, "client", "iu", (None,)).shape[0]
    found = checked.numbers(file, KINDS, "iu", (clients,)).astype(np.int32, copy=False)
    checksums.check_once(file, KINDS, checksums.of_array(found))
    return found


def model_of(file: h5py.File) -> Tree:
    """The final weights, by their SHA-256."""
    from fedsim.core.tree import sha256_of

    known = run_file.attributes(file)
    if not known["finished"]:
        raise run_file.Absent(f"{file.filename} holds no final weights: the run stands at round {known['rounds']} and has not finished")
    tree = stored_model(file)
    expected = run_file.one(known, "weights_sha256")
    need(sha256_of(tree) == expected, "the model is damaged: its SHA-256 is not the one in 'weights_sha256'; the columns can be read")
    return tree


def stored_model(file: h5py.File) -> Tree:
    """The final weights as they stand there."""
    found = dict(_stored(checked.needed(file, "model"), set()))
    return {key: _tensor(key, stored, mask_of(key, found)) for key, stored in found.items()}


def _stored(group: h5py.Group, seen: set[int]) -> Iterator[tuple[str, h5py.Dataset]]:
    """All datasets under the group, by their path in it."""
    address = h5py.h5o.get_info(group.id).addr
    need(address not in seen, f"{group.name.lstrip('/')} stands in two places")
    seen.add(address)
    for name in group:
        if isinstance(entry := checked.item(group, name), h5py.Group):
            yield from ((f"{name}/{key}", stored) for key, stored in _stored(entry, seen))
        else:
            yield name, checked.dataset(group, name, "fiu", None)


def _tensor(key: str, stored: h5py.Dataset, mask: h5py.Dataset | None) -> Tensor:
    from fedsim.storage import encoding

    about = {name: checked.attribute(stored, name) for name in ("dtype", "shape", "masked")}
    kept = None if mask is None else _tensor(key, mask, None)
    try:
        return encoding.restore(stored[()], about, kept)
    except (TypeError, ValueError, RuntimeError) as error:
        raise Damaged(f"model/{key} is no tensor: {error}") from error
