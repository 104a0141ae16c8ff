"""Says which ranks have been silent for long. A rank may compute, or be stopped, or hang: nobody can tell from outside, so it is a note."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from fedsim.errors import SilentRanks
from fedsim.fleet.mpi.schedule import branch

FIRST = 120.0  # seconds of silence before the first note
LONGER = 3.0  # a note comes after so many times the longest silence that ended well, and again after so many times the last note
MOST = 5  # ranks that a note names
PATIENCE = 20.0  # seconds that ranks get to answer when the run is to stop; the round in flight is dropped in any case


@dataclass
class Silence:
    """Is asked while rank 0 waits for ranks, and says so when it takes far longer than ever. SilentRanks when the run is to stop."""

    say: Callable[[str], None]
    hosts: Sequence[str]  # of each rank
    stopped: Callable[[], bool] = lambda: False  # whether the run is to stop
    longest: float = 0.0  # seconds
    last: float = 0.0  # how long the wait had taken at the last question
    due: float = 0.0  # seconds of this wait, after which a note comes
    since: float | None = None  # seconds of this wait, after which the run was to stop

    def __call__(self, ranks: Collection[int], seconds: float) -> None:
        """ranks: those that have not answered; seconds: since rank 0 began to wait for one of them."""
        if seconds < self.last or not self.due:  # another wait
            self.longest = max(self.longest, self.last)
            self.due, self.since = max(FIRST, LONGER * self.longest), None
        self.last = seconds
        if self.since is None and self.stopped():
            self.since = seconds
        if ranks and self.since is not None and seconds - self.since > PATIENCE:
            raise SilentRanks(f"{self._named(ranks)} silent for {seconds:.0f} s, and the run is to stop: all ranks are ended")
        if ranks and seconds > self.due:
            self.due = LONGER * seconds
            why = "long work, a stopped process and a lost node all look like this"
            self.say(f"note: {self._named(ranks)} silent for {seconds:.0f} s{self._through(ranks)}; {why}")

    def _through(self, ranks: Collection[int]) -> str:
        """Whose answers come through these ranks: a silent one may only wait for them."""
        others = sorted({other for rank in ranks for other in branch(rank, len(self.hosts))} - set(ranks))
        numbers = ", ".join(map(str, others[:MOST])) + (f" and {len(others) - MOST} more" if len(others) > MOST else "")
        return f", or waits for ranks that answer through it ({numbers})" if others else ""

    def _named(self, ranks: Collection[int]) -> str:
        named = [f"{rank} ({self.hosts[rank]})" for rank in sorted(ranks)[:MOST]]
        more = len(ranks) - len(named)
        return (
            f"rank{'s' * (len(ranks) > 1)} {', '.join(named)}{f' and {more} more' * (more > 0)} {'have' if len(ranks) > 1 else 'has'} been"
        )
