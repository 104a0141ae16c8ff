"""The screen of a folder: a line for each run, and how far all are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
from rich.cells import cell_len
from rich.text import Text

from fedsim_analysis.watch.curves import bar
from fedsim_analysis.watch.lines import STYLES, fitted, padded, wrapped
from fedsim_analysis.watch.printed import CENTURY, left, number, quantity, share, shown
from fedsim_analysis.watch.runs import DONE, FAILED, RUNNING, STATES, STOPPED, UNREAD, UNREADABLE, WAITING, Run, Watched

LEAVE = "Ctrl-C ends this view and leaves the runs alone"
ORDER = (FAILED, UNREADABLE, RUNNING, STOPPED, DONE, WAITING, UNREAD)  # in which runs get a line, where there is no room for all
REASONS = 5  # runs of which it is said why they do not go on, while others do
NAMES = 40  # letters of a name


@dataclass(frozen=True)
class Column:
    """A column of the table, and how much it matters where there is no room for all."""

    title: str
    values: list[str]
    weight: int

    @property
    def width(self) -> int:
        return max(map(cell_len, (self.title, *self.values)))


def frame(watched: Watched, width: int, height: int, plain: bool, live: bool = True) -> list[Text]:
    """`height` lines at most. live: whether more frames will come; plain: whether only ASCII can be shown."""
    runs, head = watched.runs, _head(watched, width, plain)
    reasons = _reasons(runs)
    reasons = reasons[: min(REASONS, max(height // 4, 1))] if live else [part for line in reasons for part in wrapped(line, width, 5)]
    tail = [*reasons, *([Text(LEAVE, "dim")] if live else [])]
    room = max(height - len(head) - len(tail) - 1, 1)
    chosen = _chosen(runs, room)
    lines = [*head, *_table(chosen, width), *_others(runs, chosen), *tail]
    return [fitted(line, width, plain) for line in lines[:height]]


def _head(watched: Watched, width: int, plain: bool) -> list[Text]:
    count = watched.count()
    said = Text.assemble((f"{shown(watched.path)}: ", "bold"))
    said.append_text(Text(", ").join([Text(f"{number} {name}", STYLES[name]) for name, number in count.items()] or [Text("no runs")]))
    done, planned = (sum(numbers) for numbers in zip(*(run.rounds for run in watched.runs), strict=True)) if watched.runs else (0, 0)
    text = "  ".join(filter(None, [share(done / planned) if planned else "", left(_left(watched))]))
    rounds = f"{done:,} of {planned:,} rounds "
    wide = max(min(width - len(rounds) - len(text) - 1, 40), 4)
    return [said, Text.assemble(rounds, bar(done / max(planned, 1), wide, plain), " ", text)]


def _left(watched: Watched) -> float:
    """Seconds until all have ended, if as many go on at once as do now; not-a-number where that is not known."""
    going = [run for run in watched.runs if run.state.name == RUNNING]
    waiting = sum(run.state.name in (WAITING, UNREAD) for run in watched.runs) + watched.missing
    whole = [seen.pace().left(0, seen.planned) for run in watched.runs if (seen := run.file.seen) and seen.rounds > 0]
    usual = float(np.median(known)) if len(known := [seconds for seconds in whole if np.isfinite(seconds)]) else float("nan")
    left_of = [seconds if np.isfinite(seconds := run.left()) else usual for run in going]
    work = sum(left_of) + (waiting * usual if waiting else 0.0)
    return max(work / len(going), *left_of) if going else float("nan")


def _chosen(runs: Sequence[Run], room: int) -> list[Run]:
    """As many runs as there is room for, those first that need a look; in the order of their names."""
    if len(runs) <= room:
        return list(runs)
    first = sorted(runs, key=lambda run: ORDER.index(run.state.name))[: max(room - 1, 0)]
    return [run for run in runs if run in first]


def _others(runs: Sequence[Run], chosen: Sequence[Run]) -> list[Text]:
    hidden = [run.state.name for run in runs if run not in chosen]
    said = ", ".join(f"{count} {name}" for name in STATES if (count := hidden.count(name)))
    return [Text(f"… and {said} without a line here: there is no room", "dim")] if hidden else []


def _table(runs: Sequence[Run], width: int) -> list[Text]:
    names = [shown(run.path.name.removesuffix(".h5"), NAMES) for run in runs]
    columns = [Column("run", names, 9), Column("state", [run.state.name for run in runs], 9), *_numbers(runs)]
    while len(columns) > 2 and sum(column.width + 2 for column in columns) - 2 > width:
        columns.remove(min(columns, key=lambda column: column.weight))
    wide = max(width - sum(column.width + 2 for column in columns[1:]), 8)
    title = "  ".join(
        [padded("run", min(columns[0].width, wide)), *(padded(each.title, each.width, i > 0) for i, each in enumerate(columns[1:]))]
    )
    lines = [Text(title, "bold")]
    for i, run in enumerate(runs):
        name = Text(names[i])
        name.truncate(min(columns[0].width, wide), overflow="ellipsis", pad=True)
        state = Text(padded(run.state.name, columns[1].width), STYLES[run.state.name])
        rest = [padded(column.values[i], column.width, right=True) for column in columns[2:]]
        lines.append(Text("  ").join([name, state, *map(Text, rest)]))
    return lines


def _numbers(runs: Sequence[Run]) -> list[Column]:
    """Columns of numbers; one without any number is left out."""
    seen = [run.file.seen if run.file.seen and run.file.seen.rounds >= 0 else None for run in runs]
    rounds = [f"{done}/{planned}" if planned else "" for done, planned in (run.rounds for run in runs)]
    columns = [
        Column("round", rounds, 8),
        Column("job", [run.plan.job if run.plan and run.state.name != DONE else "" for run in runs], 6),
        Column("accuracy", [share(each.last("accuracy")[0]) if each else "" for each in seen], 7),
        Column("loss", [number(each.last("loss")[0]) if each else "" for each in seen], 3),
        Column("density", [number(each.last("density")[0]) if each else "" for each in seen], 4),
        Column("sent", [quantity(float(np.nansum(each.sent())), "B") if each else "" for each in seen], 2),
        Column("s/round", [number(each.pace().plain) if each else "" for each in seen], 5),
        Column("left, about", [_time(run) for run in runs], 6),
    ]
    return [column for column in columns if any(column.values)]


def _time(run: Run) -> str:
    seconds = run.left()
    return str(timedelta(seconds=round(seconds))) if 0 <= seconds < CENTURY else ""


def _reasons(runs: Sequence[Run]) -> list[Text]:
    """Why runs do not go on."""
    worst = [run for state in (FAILED, UNREADABLE, STOPPED) for run in runs if run.state.name == state]
    return [
        Text.assemble((shown(run.path.name, NAMES), "bold"), " ", (run.state.name, STYLES[run.state.name]), f": {shown(run.state.why)}")
        for run in worst
    ]
