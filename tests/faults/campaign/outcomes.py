"""What came of each fault that was tried, and the table of them all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

LIMIT = 10.0  # seconds in which a job has ended after the death of any one of its processes
HEADS = ("kind", "tried", "same hash", "one message", "lost", "rounds lost at most", "longest end", "hung")


@dataclass(frozen=True)
class Outcome:
    """One fault, and what came of it.

    same: the run ended with the weights and rows of one that was never disturbed. refused: one message said what is wrong, and nothing was
    written. Neither of them: `lost` says what happened. rounds: complete rows that had to be done again. seconds: from the fault until
    the last process had ended; None where no process was to end.
    """

    kind: str
    what: str
    same: bool = False
    refused: bool = False
    lost: str = ""
    rounds: int = 0
    seconds: float | None = None
    hung: bool = False

    @property
    def good(self) -> bool:
        return (self.same or self.refused) and not self.lost and not self.hung


@dataclass(frozen=True)
class Skipped:
    """A kind that this machine cannot try, and why."""

    kind: str
    why: str


def table(outcomes: Sequence[Outcome], skipped: Sequence[Skipped]) -> str:
    """A line for each kind, the sum of all, and each fault of which something was lost."""
    kinds = list(dict.fromkeys(outcome.kind for outcome in outcomes))
    lines = [_line(kind, [outcome for outcome in outcomes if outcome.kind == kind]) for kind in kinds]
    lines = [HEADS, *lines, *([_line("all", outcomes)] if len(kinds) > 1 else [])]
    wide = [max(len(line[column]) for line in lines) for column in range(len(HEADS))]
    text = [
        "  ".join([line[0].ljust(wide[0]), *(cell.rjust(width) for cell, width in zip(line[1:], wide[1:], strict=True))]) for line in lines
    ]
    text += [f"not tried: {each.kind}: {each.why}" for each in skipped]
    text += [f"LOST: {outcome.kind}: {outcome.what}: {_fault(outcome)}" for outcome in outcomes if not outcome.good]
    return "\n".join(text) + "\n"


def as_json(outcomes: Sequence[Outcome], skipped: Sequence[Skipped], about: dict[str, object]) -> str:
    """All outcomes, the sums of each kind, and how the campaign was called."""
    kinds = dict.fromkeys(outcome.kind for outcome in outcomes)
    sums = {kind: sums_of([outcome for outcome in outcomes if outcome.kind == kind]) for kind in kinds}
    whole = {**about, "kinds": sums, "all": sums_of(outcomes), "skipped": [asdict(each) for each in skipped]}
    return json.dumps(whole | {"outcomes": [asdict(outcome) for outcome in outcomes]}, indent=1) + "\n"


def sums_of(outcomes: Iterable[Outcome]) -> dict[str, float]:
    """tried, same, refused, lost, rounds (the largest), seconds (the largest, 0 where nothing was to end), hung."""
    found = list(outcomes)
    return {
        "tried": len(found),
        "same": sum(outcome.same for outcome in found),
        "refused": sum(outcome.refused for outcome in found),
        "lost": sum(not outcome.good for outcome in found),
        "rounds": max((outcome.rounds for outcome in found), default=0),
        "seconds": max((outcome.seconds or 0.0 for outcome in found), default=0.0),
        "hung": sum(outcome.hung for outcome in found),
    }


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _line(kind: str, outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    sums = sums_of(outcomes)
    ended = any(outcome.seconds is not None for outcome in outcomes)
    counts = [f"{sums[name]:.0f}" for name in ("tried", "same", "refused", "lost", "rounds")]
    return kind, *counts, f"{sums['seconds']:.1f} s" if ended else "-", f"{sums['hung']:.0f}"


def _fault(outcome: Outcome) -> str:
    return outcome.lost or (f"it had not ended after {LIMIT:.0f} s" if outcome.hung else "it neither went on nor said why")
