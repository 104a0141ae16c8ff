"""Range checks of the fields of a method or a job."""

from __future__ import annotations

from math import inf, isfinite

TINY = 1e-12  # the lower end of a range that 0 is not in
MAX_COHORT = 16_384  # clients whose two-limb values can be summed without overflow (fedsim.core.exact_sum)


def within(settings: object, **ranges: tuple[float, float]) -> None:
    """Checks fields of `settings`, each against its range (low, high), ends included. A field that is None is not checked.

    A low end of TINY stands for "above 0", a high end of inf for any finite number. Raises ValueError that names the field.

    >>> from types import SimpleNamespace
    >>> within(SimpleNamespace(density=1.5), density=(TINY, 1))
    Traceback (most recent call last):
    ValueError: density = 1.5: should be above 0 and at most 1
    """
    for name, (low, high) in ranges.items():
        value = getattr(settings, name)
        if value is not None and not (low <= value <= high and isfinite(value)):
            finite = ", and finite" if value == inf == high and low > -inf else ""
            raise ValueError(f"{name} = {value}: should be {_range(low, high)}{finite}")


def read_where(settings: object, field: str, right: tuple[object, ...], *names: str) -> dict[str, str]:
    """For `Method.unread`: fields that are read only where `field` has one of the `right` values; empty where it has.

    >>> from types import SimpleNamespace
    >>> read_where(SimpleNamespace(form="paper"), "form", ("library",), "regrow")
    {'regrow': "it is of form = 'library', and form is 'paper'"}
    """
    value = getattr(settings, field)
    if value in right:
        return {}
    return dict.fromkeys(names, f"it is of {field} = {' or '.join(map(repr, right))}, and {field} is {value!r}")


def _range(low: float, high: float) -> str:
    """A range in words."""
    if (low, high) == (-inf, inf):
        return "a finite number"
    begin = "above 0" if low == TINY else f"at least {low}"
    if high == inf:
        return begin
    return f"{begin} and at most {high}" if low == TINY else f"from {low} to {high}"


def summed_at_once(clients: list[int]) -> list[list[int]]:
    """The clients in parts of as many as can be summed exactly."""
    return [clients[begin : begin + MAX_COHORT] for begin in range(0, len(clients), MAX_COHORT)]
