"""How often a rank that waits looks again: it sleeps in between, so that it burns no core."""

from __future__ import annotations

from dataclasses import dataclass, field

SHORT, LONG = 50e-6, 2e-3  # seconds between two looks
EARLY = 0.7  # of the usual time of a wait, before which a rank looks seldom
LATE = 200  # of a wait's time so far, the part that it may be overslept by; where it is shorter than usual, an eighth of the usual time


@dataclass
class Waiting:
    """What waits of a kind have taken: the shorter of the last two is the usual time."""

    _last: dict[object, tuple[float, ...]] = field(default_factory=dict)  # kind -> seconds of the last two waits

    def pause(self, kind: object, waited: float) -> float:
        """Seconds until the next look, after so many seconds of a wait."""
        usual = min(self._last.get(kind, (0.0,)))
        return min(LONG, max(SHORT, waited / LATE, min(usual / 8, EARLY * usual - waited)))

    def ended(self, kind: object, waited: float) -> None:
        """A wait is over. kind: None is of no kind, and always looked for from the first moment."""
        if kind is not None:
            self._last[kind] = (*self._last.get(kind, (0.0,))[-1:], waited)
