"""The screen of one run: how far it is, its curves, and the phases of its rounds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

from fedsim_analysis.watch.curves import COLOURS, Curve, bar, bars, plot
from fedsim_analysis.watch.lines import STYLES, beside, fitted, padded, wrapped
from fedsim_analysis.watch.pace import RECENT
from fedsim_analysis.watch.printed import ago, duration, left, number, quantity, scale_of, share, shown
from fedsim_analysis.watch.runs import DONE, RUNNING, Run
from fedsim_analysis.watch.seen import Seen

Array = NDArray[np.float64]

WIDEST = 38  # signs that a plot has at least, where there are several side by side
LOWEST = 7  # lines that a plot has at least, with its title
SMALLEST = 0.0005  # of a round: the least part of a phase that is shown
BAR = 10  # signs of the bar of a phase
NAME = 9  # letters of a measure
LEAVE = "Ctrl-C ends this view and leaves the run alone"


@dataclass(frozen=True)
class Measure:
    """What one plot shows."""

    name: str
    curves: list[Curve]
    said: Text  # the last values

    def cell(self, width: int, height: int, plain: bool) -> list[Text]:
        """A plot with its title."""
        title = Text.assemble((self.name, "bold"), "  ", self.said)
        if not any(np.isfinite(curve.values).any() for curve in self.curves):
            return [title, Text("  not measured so far", "dim")]
        return [title, *plot(self.curves, width, height - 1, plain)]

    def head(self) -> Text:
        return Text.assemble((padded(self.name, NAME), "bold"), "  ", self.said)

    def line(self, begin: int, width: int, plain: bool) -> Text:
        """The same in one line, of which bars `begin` at this place."""
        line = self.head()
        line.pad_right(max(begin - line.cell_len, 0))
        return Text.assemble(line, "  ", (bars(self.curves[0].values, width - line.cell_len - 2, plain), COLOURS[0]))


def frame(run: Run, width: int, height: int, plain: bool, live: bool = True) -> list[Text]:
    """`height` lines at most. live: whether more frames will come; plain: whether only ASCII can be shown."""
    seen = run.file.seen
    head, tail = _head(run, seen), _tail(run, seen, width)
    if live:
        tail.append(Text(LEAVE, "dim"))
    body = [] if run.state.ended else [Text("no round is complete yet")]
    if seen and seen.rounds >= 0:
        phases = _phases(seen)
        head.append(_progress(run, seen, width, plain))
        room = height - len(head) - len(tail)
        body, among = _body(_measures(seen), _phases_cell(phases, seen, plain), width, room, plain)
        if not among and phases and len(body) < room:
            tail.insert(0, _phases_line(phases))
    lines = [*head, *body, *tail]
    if len(lines) > height:
        lines = [*[line for line in (head[0], *head[2:]) if line], *body, *tail][:height]
    return [fitted(line, width, plain) for line in lines]


def _head(run: Run, seen: Seen | None) -> list[Text]:
    title = Text.assemble((shown(run.path.name), "bold"), "  ", (run.state.name, STYLES[run.state.name]))
    if seen is None:
        return [title]
    known = seen.attributes
    facts = [shown(known.get("method", "?"), 40), f"seed {known.get('seed', '?')}", f"{seen.clients:,} clients"]
    facts.append(f"{seen.ranks} rank{'s' * (seen.ranks != 1)} on {shown(known.get('hosts', '?'), 60)}")
    since = shown(known.get("started_at", "?"), 40).replace("T", " ").removesuffix("+00:00")
    return [title, Text(f"{', '.join(facts)}, since {since}", "dim")]


def _progress(run: Run, seen: Seen, width: int, plain: bool) -> Text:
    done, planned = max(seen.rounds, 0), max(seen.planned, 1)
    count = f"round {done} of {seen.planned} "
    each = seen.pace().plain
    said = [share(done / planned), f"{duration(each)} a round" if np.isfinite(each) else "", left(run.left())]
    if run.state.name == DONE:
        said = [f"{duration(float(np.nansum(seen.seconds())))} in all", said[1]]
    text = "  ".join(filter(None, said))
    return Text.assemble(count, bar(done / planned, max(min(width - len(count) - len(text) - 1, 40), 4), plain), " ", text)


def _tail(run: Run, seen: Seen | None, width: int) -> list[Text]:
    """Why the state is believed, and what is wrong."""
    lines = [Text(shown(run.state.why, 600), STYLES[run.state.name])] if run.state.why else []
    if run.state.name == RUNNING and run.file.exists and seen and "last news" not in run.state.why:
        lines = [Text.assemble(*lines[:1], (f"{'; ' if lines else ''}last news {ago(run.since())}", "dim"))]
    if run.file.trouble and not run.state.ended:
        lines.append(Text(f"cannot be read at this moment, and is tried again: {shown(run.file.trouble)}", "yellow"))
    lines += [Text(f"left out: {shown(line)}", "yellow") for line in (seen.damaged[:3] if seen else [])]
    return [part for line in lines for part in wrapped(line, width, 3)]


def _measures(seen: Seen) -> list[Measure]:
    sent, seconds = seen.sent(), seen.seconds()
    scale, prefix = scale_of(float(np.nanmax(sent)) if np.isfinite(sent).any() else 0.0)
    said = f"{quantity(_final(sent), 'B')}, {quantity(float(np.nansum(sent)), 'B')} in all"
    unit = f"sent, {prefix}B" if prefix else "sent, B"
    return [
        _accuracy(seen),
        _loss(seen),
        Measure("density", [Curve("density", seen.column("density"))], Text(number(seen.last("density")[0]), COLOURS[0])),
        Measure(unit, [Curve("sent", sent / scale)], Text(said, COLOURS[0])),
        Measure("seconds", [Curve("seconds", seconds)], Text(f"{duration(_final(seconds))} the last round", COLOURS[0])),
    ]


def _accuracy(seen: Seen) -> Measure:
    value, r = seen.last("accuracy")
    curves, said = [Curve("accuracy", 100 * seen.column("accuracy"))], Text(share(value), COLOURS[0])
    if np.isfinite(theirs := seen.last("client_accuracy")[0]):
        curves.append(Curve("of clients", 100 * seen.column("client_accuracy")))
        said.append(f"  • clients {share(theirs)}", COLOURS[1])
    if 0 <= r < seen.rounds:
        said.append(f"  (round {r})", "dim")
    return Measure("accuracy", curves, said)


def _loss(seen: Seen) -> Measure:
    curves, said = [Curve("loss", seen.column("loss"))], Text(number(seen.last("loss")[0]), COLOURS[0])
    if np.isfinite(training := seen.last("train_loss")[0]):
        curves.append(Curve("training", seen.column("train_loss")))
        said.append(f"  • training {number(training)}", COLOURS[1])
    return Measure("loss", curves, said)


def _final(values: Array) -> float:
    measured = values[np.isfinite(values)]
    return float(measured[-1]) if len(measured) else float("nan")


def _body(measures: list[Measure], phases: list[Text], width: int, room: int, plain: bool) -> tuple[list[Text], bool]:
    """As many plots as there is room for, in a grid, and the other measures in a line each; and whether the phases stand among them."""
    across = max(min(width // WIDEST, 3), 1)
    sizes = [count for count in range(1, len(measures) + 1) if count % across == 0 or count == len(measures)]
    fits = [count for count in sizes if -(-count // across) * LOWEST + len(measures) - count + 1 <= room]
    count = max(fits, default=0)
    down = -(-count // across)
    begin = max((measure.head().cell_len for measure in measures[count:]), default=0)
    others = [measure.line(begin, width, plain) for measure in measures[count:]]
    if not count:
        return others[: max(room, 0)], False
    wide, high = (width - 2 * (across - 1)) // across, min((room - len(others) - 1) // down, 18)
    cells = [measure.cell(wide, high, plain) for measure in measures[:count]]
    among = count % across != 0 and len(phases) > 1 and len(phases) <= high
    cells += [phases] * among
    lines = [line for begin in range(0, len(cells), across) for line in beside(cells[begin : begin + across], wide)]
    return [*lines, *others], among


@dataclass(frozen=True)
class Phase:
    """A phase of the last rounds."""

    name: str
    seconds: float  # a round
    part: float  # of all phases that do not go on beside others
    beside: bool

    @property
    def said(self) -> str:
        return f"{self.name} {share(self.part)}" + (" beside the others" if self.beside else "")

    def line(self, plain: bool) -> Text:
        took = f"{1000 * self.seconds:.3g} ms" if self.seconds < 0.1 else duration(self.seconds)
        length = Text(padded("beside", BAR), "dim") if self.beside else bar(self.part, BAR, plain)
        return Text.assemble(f"{padded(self.name, NAME)}  ", length, f" {share(self.part):>6}  {took}")


def _phases(seen: Seen) -> list[Phase]:
    """The phases of the last rounds, longest first. Round 0 prepares the run, and counts while it is alone."""
    recent = {name: (column[1:] if len(column) > 1 else column)[-RECENT:] for name, column in seen.timing.items()}
    spent = {name: float(np.nansum(column)) / max(len(column), 1) for name, column in recent.items()}
    aside = {"record"} if seen.ranks > 1 else set()
    total = sum(seconds for name, seconds in spent.items() if 0 < seconds < np.inf and name not in aside)
    spent = {name: seconds for name, seconds in spent.items() if total * SMALLEST < seconds < np.inf}
    longest = sorted(spent.items(), key=lambda entry: -entry[1])
    return [Phase(shown(name, 20), seconds, seconds / total if total else 1.0, name in aside) for name, seconds in longest]


def _phases_cell(phases: list[Phase], seen: Seen, plain: bool) -> list[Text]:
    rounds = min(seen.rounds, RECENT)
    title = Text.assemble(("phases", "bold"), (f"  mean of {rounds} rounds" if rounds > 1 else "  of the round", "dim"))
    return [title, *(phase.line(plain) for phase in phases)]


def _phases_line(phases: list[Phase]) -> Text:
    return Text.assemble((padded("phases", NAME), "bold"), "  ", ", ".join(phase.said for phase in phases))
