"""The sum over clients that does not depend on order or grouping: float64 values, rounded once to int64.

A key that stands in `shared`, M its largest magnitude there, has the unit 2^(ceil(log2(N · max(M, 1) · 2^20)) - 62), N the
number of images of the cohort; client k may hand back at most n_k · max(M, 1) · 2^20: the running variance behind
a filter that has just grown its only weight jumps by ten thousands. Every other key has two limbs, of units
2^-20 and 2^-68, and |value| < 2^28. Integers then add without rounding, so ranks and packs cannot matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import frexp
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.core import keys
from fedsim.core.compiled import inlined, kernel
from fedsim.core.tree import Tree
from fedsim.core.validation import MAX_COHORT

HEADROOM = 2.0**20  # how far a value may grow beyond its largest broadcast magnitude
COARSE, FINE = 2.0**20, 2.0**68  # values per unit of the two limbs
LARGEST = 2.0**28


@dataclass(frozen=True)
class Unit:
    """How the values of one key are rounded: 1 is `scale` integers, and |value| is at most `bound` per image (None: two limbs)."""

    scale: float
    bound: float | None

    @property
    def limbs(self) -> int:
        """int64 numbers for one value."""
        return 2 if self.bound is None else 1


TWO_LIMBS = Unit(COARSE, None)


def unit_of(value: Tensor, n: int) -> Unit:
    """The unit of a key whose broadcast tensor is `value`, in a cohort of `n` images."""
    largest = float(value.abs().max()) if value.numel() else 0.0
    bound = max(largest, 1.0) * HEADROOM
    mantissa, exponent = frexp(n * bound)
    ceiling = exponent - (mantissa == 0.5)  # ceil(log2)
    return Unit(2.0 ** (62 - ceiling), bound)


@inlined
def _add(into: Any, values: Any, scale: float, limit: float) -> bool:  # pragma: no cover - compiled
    """into += round(values · scale); False when a value is not finite or beyond the limit."""
    fine = True
    for i in range(values.size):
        fine &= abs(values[i]) <= limit
        into[i] += np.int64(np.rint(values[i] * scale))
    return fine


@kernel
def _add_rows(into: Any, rows: Any, scale: float, limits: Any) -> int:  # pragma: no cover - compiled
    """`_add` row after row; the first one that cannot be added, or -1."""
    for k in range(len(rows)):
        if not _add(into, rows[k], scale, limits[k]):
            return k
    return -1


@inlined
def _add_limbs(into: Any, values: Any, coarse: float, fine: float, limit: float) -> bool:  # pragma: no cover - compiled
    """into[0], into[1] += the two limbs of the values; False as in `_add`."""
    good = True
    for i in range(values.size):
        good &= abs(values[i]) < limit
        head = np.rint(values[i] * coarse)
        into[0, i] += np.int64(head)
        into[1, i] += np.int64(np.rint((values[i] - head / coarse) * fine))
    return good


@kernel
def _add_limbs_rows(into: Any, rows: Any, coarse: float, fine: float, limit: float) -> int:  # pragma: no cover - compiled
    """`_add_limbs` row after row; as `_add_rows`."""
    for k in range(len(rows)):
        if not _add_limbs(into, rows[k], coarse, fine, limit):
            return k
    return -1


def _add_torch(into: Tensor, values: Tensor, scale: float, limit: float) -> bool:
    """`_add` for tensors that live on an accelerator."""
    into += (values * scale).round().to(torch.int64)
    return bool((values.abs() <= limit).all())


def _add_limbs_torch(into: Tensor, values: Tensor, coarse: float, fine: float, limit: float) -> bool:
    head = (values * coarse).round()
    into[0] += head.to(torch.int64)
    into[1] += ((values - head / coarse) * fine).round().to(torch.int64)
    return bool((values.abs() < limit).all())


def _add_on_device(unit: Unit, into: Tensor, row: Tensor, images: int) -> bool:
    if unit.bound is None:
        return _add_limbs_torch(into, row, COARSE, FINE, LARGEST)
    return _add_torch(into[0], row, unit.scale, unit.bound * images)


class OutOfRange(ValueError):
    """A value of a client's total that cannot be summed."""

    def __init__(self, key: str, client: int, value: float, limit: float) -> None:
        why = "training that diverges, or a network without norms (model.norm), gives such values"
        self.client, self.what = client, f"total {key!r} holds {value}; finite values up to {limit:.6g} can be summed; {why}"
        super().__init__(self.what.replace(" holds", f" of client {client} holds", 1))


class Sum:
    """Partial sums of named values as int64, for one cohort. Their order and grouping change no bit.

    Args:
        shared: the tree that the cohort received; its largest magnitudes give the units.
        n: number of images of the whole cohort.
        units: key -> unit, if partial sums of the same cohort share them.

    >>> shared = {"w/a": torch.zeros(2)}
    >>> rows = {"w/a": torch.tensor([[0.1, 1.0], [0.2, 2.0], [0.3, 3.0]], dtype=torch.float64)}
    >>> whole, one, other = (Sum(shared, n=30) for _ in range(3))
    >>> whole.add(rows, clients=[0, 1, 2], n=[10, 10, 10])
    >>> one.add({"w/a": rows["w/a"][:1]}, clients=[0], n=[10])
    >>> other.add({"w/a": rows["w/a"][1:]}, clients=[1, 2], n=[10, 10])
    >>> other.merge(one)
    >>> torch.equal(whole.value()["w/a"], other.value()["w/a"])
    True
    """

    def __init__(self, shared: Tree, n: int, units: dict[str, Unit] | None = None) -> None:
        self._shared, self._n = shared, n
        self._units: dict[str, Unit] = {} if units is None else units  # found when they are asked for; sums of one order may share them
        self.parts: Tree = {}  # key -> (limbs, …) int64
        self.clients = 0

    def unit(self, key: str) -> Unit:
        """The unit of a key: from its broadcast tensor, or two limbs if it was not broadcast."""
        if key not in self._units:
            sent = self._shared.get(key)
            if sent is not None and not sent.is_floating_point():
                sent = sent.double() if key.startswith(keys.BUFFERS) else None  # a counter
            self._units[key] = TWO_LIMBS if sent is None else unit_of(sent, self._n)
        return self._units[key]

    def add(self, rows: Tree, clients: Sequence[int], n: Sequence[int]) -> None:
        """Adds (K, …) float64 rows of the given clients, who have `n` images each.

        Raises ValueError, naming client and key, for a value that is not finite or beyond its range, and for a key that is
        not float64 or changes its shape.
        """
        self._same_keys(rows, clients[0])
        self._count(len(clients))
        for key, values in rows.items():
            if values.dtype != torch.float64:
                raise ValueError(f"total {key!r} is {values.dtype}; a total is float64 (tree.weigh gives it)")
            into = self._part(key, values.shape[1:])
            if (bad := self._add(key, into, values.reshape(len(clients), values.shape[1:].numel()), n)) >= 0:
                raise self._fault(key, values[bad], clients[bad], n[bad])

    def _same_keys(self, rows: Tree, client: int | None = None) -> None:
        """ValueError where totals have other keys than those before: a sum over a part of the clients would pass for one over all."""
        if self.clients and rows.keys() != self.parts.keys():
            odd = ", ".join(map(repr, sorted(rows.keys() ^ self.parts.keys())))
            who = "some clients report" if client is None else f"client {client} and the clients before it do not both report"
            raise ValueError(f"{who} total {odd}{' and others do not' if client is None else ''}; all clients must report the same keys")

    def _count(self, more: int) -> None:
        self.clients += more
        if self.clients > MAX_COHORT:
            raise ValueError(f"a cohort of {self.clients:,} clients is too large to sum exactly; at most {MAX_COHORT:,}")

    def _part(self, key: str, shape: torch.Size) -> Tensor:
        if key not in self.parts:
            device = self._shared[key].device if key in self._shared else "cpu"
            self.parts[key] = torch.zeros(self.unit(key).limbs, *shape, dtype=torch.int64, device=device)
        if self.parts[key].shape[1:] != shape:
            raise ValueError(f"total {key!r} is {tuple(shape)} here and {tuple(self.parts[key].shape[1:])} for an earlier client")
        return self.parts[key].view(self.unit(key).limbs, -1)

    def _add(self, key: str, into: Tensor, rows: Tensor, n: Sequence[int]) -> int:
        """The first row that cannot be added, or -1."""
        unit = self.unit(key)
        if into.is_cuda:
            return next((k for k, row in enumerate(rows.to(into.device)) if not _add_on_device(unit, into, row, n[k])), -1)
        values = rows.cpu().contiguous().numpy()
        if unit.bound is None:
            return _add_limbs_rows(into.numpy(), values, COARSE, FINE, LARGEST)
        return _add_rows(into[0].numpy(), values, unit.scale, unit.bound * np.asarray(n, np.float64))

    def _fault(self, key: str, value: Tensor, client: int, images: int) -> OutOfRange:
        bound = self.unit(key).bound
        limit = LARGEST if bound is None else bound * images
        worst = value.flatten()[value.abs().nan_to_num(torch.inf).argmax()].item() if value.numel() else float("nan")
        return OutOfRange(key, client, worst, limit)

    def merge(self, other: Sum) -> None:
        """Adds another partial sum of the same cohort; that one stays as it is."""
        if other.clients:
            self._same_keys(other.parts)
        for key, part in other.parts.items():
            if key in self.parts:
                if part.shape != self.parts[key].shape:
                    both = " and ".join(sorted(str(tuple(each.shape[1:])) for each in (part, self.parts[key])))
                    raise ValueError(f"total {key!r} is {both} for two clients; all clients must report the same shapes")
                self.parts[key] += part
            else:
                self.parts[key] = part.clone()
        self._count(other.clients)

    def value(self) -> Tree:
        """The sums in float64, one rounding each."""
        return {key: self._value(key, part) for key, part in self.parts.items()}

    def _value(self, key: str, part: Tensor) -> Tensor:
        if self.unit(key).limbs == 2:
            return part[0].double() / COARSE + part[1].double() / FINE
        return part[0].double() / self.unit(key).scale

    def layout(self) -> dict[str, list[int]]:
        """Shape of every key, limbs first: what another rank must know to read `flat`."""
        return {key: list(part.shape) for key, part in sorted(self.parts.items())}

    def flat(self) -> Tensor:
        """All partial sums as one int64 buffer, keys in order."""
        parts = [self.parts[key].reshape(-1).cpu() for key in sorted(self.parts)]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

    def take(self, layout: dict[str, list[int]], flat: Tensor, clients: int) -> None:
        """Becomes the sum of `clients` clients that another rank describes by its `layout()` and `flat()`."""
        sizes = [int(np.prod(shape)) for shape in layout.values()]
        self.parts = {key: part.view(shape) for (key, shape), part in zip(layout.items(), flat.split(sizes), strict=True)}
        self.clients = clients
