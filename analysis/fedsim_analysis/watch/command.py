"""`fedsim watch`: looks at the files of runs every so often, and shows them until they end. The runs do not notice."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from types import FrameType

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.text import Text

from fedsim_analysis import run_file
from fedsim_analysis.watch import many_runs, one_run
from fedsim_analysis.watch.plain import Lines
from fedsim_analysis.watch.runs import UNREAD, Watched
from fedsim_analysis.watch.signs import ascii_only

EVERY = 2.0  # seconds between two looks
REST = 19.0  # a look of a second is followed by 19 s of rest: a slow file system is read a twentieth of the time at most
SPARED = 180.0  # a second of a core, of a look and its frame, is followed by as many: a run on that core loses less than 1 %
LONGEST = 20.0  # seconds of that rest, at most: of many runs none loses much
STEP = 0.25  # seconds between two looks at the size of the terminal
LONG = 1.0  # seconds of a look, after which those that have been read are shown
NEWS, REDRAW = "news", "redraw"
WHOLE = 100_000  # lines that the last frame may have
INTERRUPTED = 3  # the exit code of fedsim for what a signal stopped
SIGNALS = ("SIGTERM", "SIGHUP")  # that end the view as Ctrl-C does


def watch(path: str | Path, every: float = EVERY, console: Console | None = None, wait: bool = False, runs: int = 0) -> int:
    """Shows a run, or the runs of a folder, until they end. The exit code: 0 all are done, 1 some failed, 2 some cannot be read,
    3 some stopped, or a signal ended the view.

    every: seconds between two looks, or more where a look takes long. wait: whether to wait for runs that have not begun or have stopped.
    runs: how many runs the folder will have at least; watch waits for them.
    Raises FileNotFoundError where there is nothing to watch, and ValueError for what is no run file.
    """
    console = console or Console(emoji=False)
    watched = Watched(Path(path), wait, runs)
    _check(watched)
    with _handled(dict.fromkeys(SIGNALS, _end)), np.errstate(all="ignore"):  # a value that was recorded may be any
        if console.is_terminal and not console.is_dumb_terminal and not console.is_jupyter:
            return _in_terminal(watched, every, console)
        return _in_lines(watched, every, console)


def _check(watched: Watched) -> None:
    """FileNotFoundError where there is nothing to watch, ValueError for what is no run file."""
    path, hint = watched.path, "--wait waits until there is one"
    if not path.exists() and not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent}, in which {path.name} could be")
    watched.find()
    if watched.wait or watched.expected:
        return
    if watched.folder:
        if not watched.runs:
            raise FileNotFoundError(f"there is no run file in the folder {path}; {hint}")
        return
    watched.look()
    if watched.runs[0].state.ended or watched.runs[0].state.name == UNREAD:
        run_file.read(path, lambda file: None, time.sleep) if path.exists() else _refuse(path, hint)


def _refuse(path: Path, hint: str) -> None:
    raise FileNotFoundError(f"there is no run file {path}, and no run that is to write it; {hint}")


def _end(number: int, _: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def _handled(handlers: Mapping[str, Callable[[int, FrameType | None], None]]) -> Iterator[None]:
    """Signals that this system has are handled so until the end; nothing outside of the main thread, which alone has signals."""
    before = {}
    with suppress(ValueError):
        before = {
            getattr(signal, name): signal.signal(getattr(signal, name), each) for name, each in handlers.items() if hasattr(signal, name)
        }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_terminal(watched: Watched, every: float, console: Console) -> int:
    """The whole screen, which is left as it was found; the last frame is printed after it."""
    interrupted = False
    try:
        with Live(console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False) as live, _paused_by(live):
            for _ in _looks(watched, every, console):
                live.update(_screen(watched, console), refresh=True)
    except KeyboardInterrupt:
        interrupted = True
    console.print(_screen(watched, console, live=False))
    return _left_alone(watched, console) if interrupted else watched.code()


@contextmanager
def _paused_by(live: Live) -> Iterator[None]:
    """Ctrl-Z gives the screen back until the process goes on."""

    def pause(number: int, _: FrameType | None) -> None:
        live.console.set_alt_screen(False)
        live.console.show_cursor(True)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)  # it stops here
        signal.signal(number, pause)
        live.console.set_alt_screen(True)
        live.console.show_cursor(False)
        live.refresh()

    with _handled({"SIGTSTP": pause}):
        yield


def _looks(watched: Watched, every: float, console: Console) -> Iterator[str]:
    """NEWS after each look at the runs, until they have ended; REDRAW where the screen has another size, or a look takes long."""
    for number in count():
        began, used, drawn = time.monotonic(), time.process_time(), time.monotonic()
        for _ in watched.looking():
            if time.monotonic() - drawn >= LONG:
                yield REDRAW
                drawn = time.monotonic()
        looked = time.monotonic() - began
        yield NEWS
        if watched.ended():
            return
        spared = min(SPARED * (time.process_time() - used), LONGEST) if number else 0.0  # at first libraries begin
        until, size = time.monotonic() + max(every, REST * looked, spared), console.size
        while (rest := until - time.monotonic()) > 0:
            time.sleep(min(rest, STEP))
            size, before = console.size, size
            if size != before:
                yield REDRAW


def _screen(watched: Watched, console: Console, live: bool = True) -> Text:
    width, height = console.size
    height, plain = height if live else (WHOLE if watched.folder else height - 1), console.options.ascii_only
    if watched.folder:
        lines = many_runs.frame(watched, width, height, plain, live)
    else:
        lines = one_run.frame(watched.runs[0], width, height, plain, live)
    return Text("\n", no_wrap=True, overflow="crop").join(lines)


def _in_lines(watched: Watched, every: float, console: Console) -> int:
    lines = Lines(watched)

    def say(line: str) -> None:
        text = ascii_only(line) if console.options.ascii_only else line
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    try:
        for look in _looks(watched, every, console):
            for line in lines.news() if look is NEWS else ():
                say(line)
    except KeyboardInterrupt:
        return _left_alone(watched, console)
    return watched.code()


def _left_alone(watched: Watched, console: Console) -> int:
    """Says what becomes of the runs after the view has been ended."""
    going = sum(not run.state.ended for run in watched.runs)
    what = "the run goes on" if not watched.folder else f"{going} run{'s go' if going != 1 else ' goes'} on or will begin"
    console.print(f"watch has ended; {what}" if going else "watch has ended", highlight=False, markup=False)
    sys.stdout.flush()
    return INTERRUPTED
