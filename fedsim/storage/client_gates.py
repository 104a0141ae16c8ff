"""The gates of clients in a run file: /client_gates/ROUND, where they changed, and /client_gates/final, at its end.

gates (K, ceil(n / 8))  packed bits, the first gate in the highest      clients (K,)  whose
values (K, n)           the constants that replace dynamic gates, where a method folds them
attributes: n, and `groups`, JSON of [layer, channels] in the order of the gates; of the cut network once channels were cut
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
from fedsim_analysis import checked, checksums, masks
from fedsim_analysis.checked import need
from numpy.typing import NDArray

from fedsim.storage import former_names

GROUP = "client_gates"
FORMER = next(old for old, new in former_names.GROUPS.items() if new == GROUP)  # its name in files of format 1
FINAL = "final"


@dataclass(frozen=True)
class Gates:
    """Hard gates of some clients."""

    clients: NDArray[np.int64]  # (K,)
    hard: NDArray[np.bool_]  # (K, n)
    groups: dict[str, int]  # layer -> channels; their sum is n
    values: NDArray[np.float32] | None = None  # (K, n), the constants that replace dynamic gates

    def same(self, other: Gates | None) -> bool:
        if other is None or list(self.groups.items()) != list(other.groups.items()):
            return False
        if self.values is None or other.values is None:
            constant = self.values is other.values
        else:
            constant = np.array_equal(self.values, other.values)
        return constant and np.array_equal(self.clients, other.clients) and np.array_equal(self.hard, other.hard)


def put(file: h5py.File, name: str, gates: Gates) -> None:
    """Stores gates under a round's number, or FINAL."""
    place = file.require_group(f"{GROUP}/{name}")
    place.attrs.update({"n": gates.hard.shape[1], "groups": json.dumps(list(gates.groups.items()))})
    clients, packed = gates.clients.astype(np.int64), np.packbits(gates.hard, axis=1)
    # Neither named "client" nor with its scale: xarray refuses a tree in which a group has fewer clients than its parents.
    arrays: dict[str, NDArray[Any]] = {"clients": clients, "gates": packed}
    if gates.values is not None:
        arrays["values"] = gates.values
    made = {part: place.create_dataset(part, array.shape, array.dtype) for part, array in arrays.items()}
    place.attrs[checksums.NAME] = checksums.of(*_bytes(clients, packed, gates.values))
    if name == FINAL:
        checksums.put_once(file, {f"{GROUP}/{FINAL}": checksum_of(gates)})
    for part, stored in made.items():  # after all objects: see `RunWriter._put_in_force`
        stored[...] = arrays[part]


def checksum_of(gates: Gates | None) -> int:
    if gates is None:
        return checksums.of()
    clients, packed = gates.clients.astype(np.int64, copy=False), np.packbits(gates.hard, axis=1)
    return checksums.of(json.dumps(list(gates.groups.items())).encode(), *_bytes(clients, packed, gates.values))


def stored_rounds(file: h5py.File) -> list[int]:
    """The rounds, rising, after which other gates were in force than before."""
    return sorted(masks.rounds(checked.group(file, _group(file)) or ()))


def last(file: h5py.File, r: int) -> Gates | None:
    """The gates in force after round `r`; None where none were stored."""
    rounds = [number for number in stored_rounds(file) if number <= r]
    found = _read(file, str(max(rounds))) if rounds else None
    checksums.check_in_force(file, GROUP, r, checksum_of(found))
    return found


def final(file: h5py.File) -> Gates | None:
    """The gates after the last round; None where there are none."""
    if not checksums.has(file, f"{_group(file)}/{FINAL}"):
        return None
    found = _read(file, FINAL)
    checksums.check_once(file, f"{GROUP}/{FINAL}", checksum_of(found))
    return found


def _read(file: h5py.File, name: str) -> Gates | None:
    place, where = checked.group(file, f"{_group(file)}/{name}"), f"{_group(file)}/{name}"
    if place is None:
        return None
    n, groups = checked.attribute(place, "n"), _sizes(checked.attribute(place, "groups"), where)
    need(type(n) is int and n == sum(groups.values()), f"{where} says that it has {n} gates; its groups have {sum(groups.values())}")
    clients = checked.numbers(place, "clients", "i", (None,)).astype(np.int64, copy=False)
    packed = checked.numbers(place, "gates", "u", (len(clients), -(-n // 8)))
    need(packed.dtype == np.uint8, f"{where}/gates are {packed.dtype}, not uint8")
    values = checked.numbers(place, "values", "f", (len(clients), n)) if checked.item(place, "values") is not None else None
    checksums.check(place, *_bytes(clients, packed, values))
    known = checked.dataset(file, "client", "iu", (None,)).shape[0]
    need(((clients >= 0) & (clients < known)).all(), f"{where} has gates of clients that are not among the {known}")
    hard = np.unpackbits(packed, axis=1, count=n).astype(bool)
    return Gates(clients, hard, groups, None if values is None else values.astype(np.float32, copy=False))


def _sizes(text: Any, where: str) -> dict[str, int]:
    pairs = checked.from_json(text, f"the attribute 'groups' of {where}", list)
    fits = all(isinstance(pair, list) and [type(part) for part in pair] == [str, int] and pair[1] >= 0 for pair in pairs)
    need(fits, f"the attribute 'groups' of {where} is no list of layers and their channels")
    return dict(pairs)


def _bytes(clients: NDArray[np.int64], packed: NDArray[np.uint8], values: NDArray[np.float32] | None) -> list[bytes]:
    return [clients.tobytes(), packed.tobytes(), b"" if values is None else values.tobytes()]


def _group(file: h5py.File) -> str:
    return FORMER if checked.item(file, FORMER) is not None else GROUP


def cut(file: h5py.File, r: int) -> None:
    """Forgets what came after round `r`."""
    held = list(checked.group(file, GROUP) or ())
    for later in [name for name in held if name == FINAL or int(name) > r]:
        del file[f"{GROUP}/{later}"]
