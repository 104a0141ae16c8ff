"""The gates of clients in a run file: /client_gates/ROUND, where they changed, and /client_gates/final, at its end.

gates (K, ceil(n / 8))  packed bits, the first gate in the highest      clients (K,)  whose
values (K, n)           the constants that replace dynamic gates, where a method folds them
attributes: n, and `groups`, JSON of [layer, channels] in the order of the gates; of the cut network once channels were cut
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import h5py
import numpy as np
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
    # Neither named "client" nor with its scale: xarray refuses a tree in which a group has fewer clients than its parents.
    place.create_dataset("clients", data=gates.clients.astype(np.int64))
    place.create_dataset("gates", data=np.packbits(gates.hard, axis=1))
    if gates.values is not None:
        place.create_dataset("values", data=gates.values)


def last(file: h5py.File, r: int) -> Gates | None:
    """The gates in force after round `r`; None where none were stored."""
    rounds = [int(name) for name in file.get(_group(file), ()) if name != FINAL and int(name) <= r]
    return read(file, str(max(rounds))) if rounds else None


def read(file: h5py.File, name: str) -> Gates | None:
    """The gates stored under a name; None where there are none."""
    if f"{_group(file)}/{name}" not in file:
        return None
    place = file[f"{_group(file)}/{name}"]
    hard = np.unpackbits(place["gates"][()], axis=1, count=int(place.attrs["n"])).astype(bool)
    values = place["values"][()] if "values" in place else None
    return Gates(place["clients"][()], hard, dict(json.loads(place.attrs["groups"])), values)


def _group(file: h5py.File) -> str:
    return FORMER if FORMER in file else GROUP


def cut(file: h5py.File, r: int) -> None:
    """Forgets what came after round `r`."""
    for later in [name for name in file.get(GROUP, ()) if name == FINAL or int(name) > r]:
        del file[f"{GROUP}/{later}"]
