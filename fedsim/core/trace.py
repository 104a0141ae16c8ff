"""Spans of time: what this process does when, for `fedsim run --trace`. Before a trace is begun, a span is nothing.

Who begins a trace gives it the clock. No result depends on it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from threading import current_thread
from types import TracebackType

MOST = 200_000  # spans of a process; a trace with more is too large for its viewers
NOTHING: AbstractContextManager[None] = nullcontext()
About = str | int | float


@dataclass(frozen=True)
class Span:
    """Something that took some time: `begin` by the clock of the trace, `about` it in words and numbers."""

    name: str
    begin: float  # seconds
    seconds: float
    thread: str
    about: dict[str, About]


@dataclass
class Trace:
    """The spans of this process, in the order in which they ended."""

    clock: Callable[[], float]
    spans: list[Span] = field(default_factory=list)
    left_out: int = 0  # later spans, where there are too many


_traces: list[Trace] = []  # the one in progress, if any


def begin(clock: Callable[[], float]) -> Trace:
    """From now on spans are noted, until `end`."""
    _traces[:] = [Trace(clock)]
    return _traces[0]


def end() -> None:
    """Spans are nothing again."""
    _traces.clear()


def span(name: str, **about: About) -> AbstractContextManager[None]:
    """Notes how long the block takes, under a name such as "evaluate", where a trace is in progress.

    >>> ticks = iter(range(10))
    >>> noted = begin(lambda: next(ticks))
    >>> with span("round", r=1), span("evaluate"):
    ...     pass
    >>> [(each.name, each.begin, each.seconds, each.about) for each in noted.spans]
    [('evaluate', 1, 1, {}), ('round', 0, 3, {'r': 1})]
    >>> end()
    """
    return _Open(_traces[0], name, about) if _traces else NOTHING


class _Open(AbstractContextManager[None]):
    """A span that goes on."""

    def __init__(self, trace: Trace, name: str, about: dict[str, About]) -> None:
        self._trace, self._name, self._about = trace, name, about

    def __enter__(self) -> None:
        self._begin = self._trace.clock()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if len(self._trace.spans) >= MOST:
            self._trace.left_out += 1
            return
        seconds = self._trace.clock() - self._begin
        self._trace.spans.append(Span(self._name, self._begin, seconds, current_thread().name, self._about))
