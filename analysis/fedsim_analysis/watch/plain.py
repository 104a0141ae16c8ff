"""Lines for a file, a pipe or a terminal that cannot move its cursor: one for news, about sixty in all."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fedsim_analysis.watch.printed import duration, left, number, quantity, share, shown
from fedsim_analysis.watch.runs import RUNNING, Run, Watched

MOST = 50  # lines of evaluated rounds of a run, or of counts of a folder
LINES = 10  # lines of a run that is not evaluated
ENDS = 40  # runs of a folder that get a line of their own when they end


class Lines:
    """What has been printed so far, and what is news."""

    def __init__(self, watched: Watched) -> None:
        self.watched = watched
        self.state = ""  # the last line about the state
        self.round = -1  # of the last line of a run
        self.ended: set[str] = set()  # names of runs of which the end has been told
        self.count = -1  # rounds done in all runs when they were last counted

    def news(self) -> Iterator[str]:
        """The lines that are due."""
        yield from self._of_folder() if self.watched.folder else self._of_run(self.watched.runs[0])

    def _of_run(self, run: Run) -> Iterator[str]:
        if run.state.name != self.state:
            self.state = run.state.name
            yield f"{shown(run.path)}: {run.state.name}" + (f" ({shown(run.state.why)})" if run.state.why else "")
        seen = run.file.seen
        if not seen or seen.rounds <= self.round:
            return
        evaluated = seen.last("accuracy")[1]
        step = max(seen.planned // LINES, 1)
        due = evaluated > self.round and seen.rounds - self.round >= seen.planned / MOST
        due = due or seen.rounds // step > max(self.round, 0) // step or self.round < 0 or seen.rounds == seen.planned
        if due:
            self.round = seen.rounds
            yield _line(run)

    def _of_folder(self) -> Iterator[str]:
        for run in self.watched.runs:
            name = run.path.name
            if run.state.ended and name not in self.ended and len(self.ended) < ENDS:
                self.ended.add(name)
                yield f"{shown(name)}: {run.state.name}" + (f" ({shown(run.state.why)})" if run.state.why else _accuracy(run))
        counts = self.watched.count()
        state = ", ".join(f"{count} {name}" for name, count in counts.items())
        rounds = [run.rounds for run in self.watched.runs]
        done, planned = sum(r for r, _ in rounds), sum(n for _, n in rounds)
        due = self.count < 0 or done - self.count >= planned / LINES or self.watched.ended()
        if due and state != self.state:
            self.state, self.count = state, done
            yield f"{state}; {done:,} of {planned:,} rounds"


def _line(run: Run) -> str:
    seen = run.file.seen
    assert seen
    accuracy, r = seen.last("accuracy")
    said = [f"round {seen.rounds:>{len(str(seen.planned))}}/{seen.planned}"]
    if np.isfinite(accuracy):
        said.append(f"accuracy {share(accuracy)}" + (f" (round {r})" if r != seen.rounds else ""))
    loss = seen.last("loss")[0]
    said += [f"loss {number(loss)}"] if np.isfinite(loss) else []
    said += [f"density {number(seen.last('density')[0])}", quantity(float(np.nansum(seen.sent())), "B")]
    said += [f"{duration(seen.pace().plain)} a round"] if np.isfinite(seen.pace().plain) else []
    said += [left(run.left())] if run.state.name == RUNNING else []
    return "  ".join(filter(None, said))


def _accuracy(run: Run) -> str:
    value = run.file.seen.last("accuracy")[0] if run.file.seen else float("nan")
    return f", accuracy {share(value)}" if np.isfinite(value) else ""
