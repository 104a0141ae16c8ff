"""The faults a user meets, and the exit codes they end with (DESIGN section 4)."""

from __future__ import annotations

from math import inf

TINY = 1e-12  # the lower end of a range that 0 is not in


class BadInput(ValueError):
    """The job, the data or the command line asks for what cannot be: exit code 2, one clear message, nothing written."""


class ClientFault(RuntimeError):
    """An exception in a client's work, told with its rank, client, round and step: exit code 1."""


class Stopped(Exception):
    """A signal or a time limit ended the run; the checkpoint of the last complete round stands: exit code 3."""


def within(settings: object, **ranges: tuple[float, float]) -> None:
    """ValueError for a field of `settings` that is outside of its range (low, high), ends included; None is left alone. TINY: above 0."""
    for name, (low, high) in ranges.items():
        value = getattr(settings, name)
        if value is not None and not low <= value <= high:
            whole = "at least {}" if high == inf else "above 0 and at most {1}" if low == TINY else "from {} to {}"
            raise ValueError(f"{name} = {value}; it is {whole.format(low, high)}")
