"""What the server itself computes with networks: FLOPs since the last row of the run file, by what they were for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fedsim.costs.profile import Breakdown

COLUMN = "server_flops"


class ServerBill:
    """The server's bill; `Setting.server` holds it, so that every verb of a method can add to it.

    >>> bill = ServerBill()
    >>> bill.charge("scoring", 2_000)
    >>> bill.charge("scoring", 1_000)
    >>> bill.take()
    {'server_flops': 3000, 'server_flops_scoring': 3000}
    >>> bill.take()
    {'server_flops': 0}
    """

    def __init__(self) -> None:
        self._terms = Breakdown()

    def charge(self, what: str, flops: int) -> None:
        """Adds `flops` to the row of this round: to the column server_flops, and to server_flops_WHAT, its part.

        What `init` charges is in round 0; what `deploy` charges is on no bill, because evaluation calls it. Raises ValueError for a
        name that cannot be a part of a column's name, and for a negative number.
        """
        if not what.isidentifier():
            raise ValueError(f"the server is charged for {what!r}; the name must be letters, digits and '_', such as \"scoring\"")
        if flops < 0:
            raise ValueError(f"the server is charged {flops} FLOPs for {what}; it must be 0 or more")
        self._terms = self._terms + ({what: int(flops)} if flops else {})

    def take(self) -> dict[str, int]:
        """The columns of a row; the bill is empty afterwards."""
        terms, self._terms = self._terms, Breakdown()
        return {COLUMN: terms.total} | {f"{COLUMN}_{what}": flops for what, flops in terms.items()}

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Charges inside are dropped."""
        before = self._terms
        try:
            yield
        finally:
            self._terms = before
