"""Budgets by kind of device: a field of a method that is given for each kind becomes one for each client."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import BadInput


class OfClients:
    """A number for each client of the population: that of its kind. Iterating gives the numbers that occur.

    Which client has which is known on rank 0 alone: a work that carries a method with it to other ranks takes the numbers.

    >>> rates = OfClients((0.25, 1.0), np.array([1, 0, 1]))
    >>> rates[0], len(rates), list(rates)
    (1.0, 3, [0.25, 1.0])
    """

    def __init__(self, values: Sequence[float], kinds: NDArray[np.integer] | None = None) -> None:
        self.values, self._kinds = tuple(values), np.zeros(0, np.int8) if kinds is None else kinds.astype(np.int8)

    def __getitem__(self, client: int) -> float:
        return self.values[self._kinds[client]]

    def __len__(self) -> int:
        return len(self._kinds)

    def __iter__(self) -> Iterator[float]:
        return iter(self.values)

    def __dump__(self) -> tuple[float, ...]:
        return self.values

    @classmethod
    def __load__(cls, plain: tuple[float, ...]) -> OfClients:
        return cls(plain)


def given_by_kind(method: Any) -> list[str]:
    """Fields of a method that hold a table, kind -> number."""
    return [field.name for field in fields(method) if isinstance(getattr(method, field.name), Mapping)]


def of_clients(method: Any, names: Sequence[str], kinds: NDArray[np.integer]) -> Any:
    """The method, with a number for each client in the place of one for each kind.

    names: of the kinds; kinds: (N,) the number of each client's kind. BadInput for a kind that there is not, and for one without a number.
    """
    changed = {}
    for field in given_by_kind(method):
        table: Mapping[str, float] = getattr(method, field)
        if unknown := [name for name in table if name not in names]:
            raise BadInput(f"[method] {field} names the kind {unknown[0]!r}. There are: {', '.join(names)}")
        if missing := [name for name in names if name not in table]:
            raise BadInput(f"[method] {field} has no number for {missing[0]!r}; each kind needs one: {', '.join(names)}")
        changed[field] = OfClients([float(table[name]) for name in names], kinds)
    return replace(method, **changed) if changed else method
