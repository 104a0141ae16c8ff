"""Budgets by kind of device: a field of a method that is given for each kind becomes one for each client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from fedsim.errors import BadInput


class OfClients(tuple[float, ...]):
    """A number for each client of the population, in their order."""

    __slots__ = ()


def given_by_kind(method: Any) -> list[str]:
    """Fields of a method that hold a table, kind -> number."""
    return [field.name for field in fields(method) if isinstance(getattr(method, field.name), Mapping)]


def of_clients(method: Any, kinds: Sequence[str], of_each: Sequence[int]) -> Any:
    """The method, with a number for each client in the place of one for each kind. of_each: (N,) the number of each client's kind.

    BadInput for a kind that there is not, and for one without a number.
    """
    changed = {}
    for field in given_by_kind(method):
        table: Mapping[str, float] = getattr(method, field)
        if unknown := [name for name in table if name not in kinds]:
            raise BadInput(f"[method] {field} names the kind {unknown[0]!r}. There are: {', '.join(kinds)}")
        if missing := [name for name in kinds if name not in table]:
            raise BadInput(f"[method] {field} has no number for {missing[0]!r}; each kind needs one: {', '.join(kinds)}")
        values = [float(table[name]) for name in kinds]
        changed[field] = OfClients(values[number] for number in of_each)
    return replace(method, **changed) if changed else method
