"""Rank 0's side of a mirror: it starts the process that copies rows, tells it which ones there are, and hears if it fails."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from fedsim.errors import BadInput
from fedsim.simulation.mirrors import names

STARTS = 120.0  # seconds that a library may take to be imported, over a slow network too
ENDS = 10.0  # seconds that the run waits for the last rows at its end


class Mirror:
    """The copy that `[record] mirror` asks for. Nothing that happens to it can harm the run: the first fault is said once, in one line.

    BadInput at the start where the tracker's library is missing.
    """

    def __init__(self, name: str, out: Path, say: Callable[[str], None]) -> None:
        self.path, self._say = names.PLACES[name].path(out), say
        self._process: subprocess.Popen[bytes] | None = None  # None: it is not spoken to any more
        self._left: subprocess.Popen[bytes] | None = None  # it is ending by itself
        self._heard, theirs = os.pipe()
        os.set_blocking(self._heard, False)
        self._text = b""
        command = [sys.executable, "-P", "-m", "fedsim.simulation.mirrors.copying", name, str(out.absolute()), str(theirs)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,  # a launcher waits until nobody holds the output of a rank
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs,),
                start_new_session=True,  # signals to the run do not reach it
                env=names.environment(name, out),
            )
        except OSError as error:
            self._end(f"its process cannot be started: {error.strerror}")
            return
        finally:
            os.close(theirs)
        self._await_library(name)

    def __enter__(self) -> Mirror:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def begin(self, r: int) -> None:
        """The rows up to round `r` stand in the run file; -1: none."""
        self._tell(f"begin {r}\n")

    def row(self, r: int) -> None:
        """The row of round `r` stands in the run file. Returns at once."""
        self._tell(f"row {r}\n")

    def close(self) -> None:
        """Waits until all rows are copied, but not for long; the process goes on by itself if it takes longer."""
        if self._process is None:
            self._reap()
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(ENDS)
            self._hear()
            if self._process is not None and self._process.returncode:
                self._end(f"its process ended with code {self._process.returncode}")
        except subprocess.TimeoutExpired:
            self._say(f"note: {self.path} is still being written, by process {self._process.pid}")
            self._release()
            return
        self._release()
        self._reap()

    def _await_library(self, name: str) -> None:
        began = time.monotonic()
        while self._process is not None and b"\n" not in self._text:
            left = STARTS - (time.monotonic() - began)
            if left <= 0:
                self._process.kill()
                self._end(f"its library was not imported within {STARTS:.0f} s")
                return
            select.select([self._heard], [], [], left)
            self._read()
        if missing := self._answers().get("missing"):
            self._release()
            self._reap()
            raise BadInput(f"[record] mirror = \"{name}\" needs the extra `trackers` ({missing}); pip install 'fedsim[trackers]'")

    def _tell(self, line: str) -> None:
        if self._process is None:
            return
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        with suppress(BlockingIOError):  # it has more to read than a pipe holds; a later line tells of these rows too
            try:
                os.write(self._process.stdin.fileno(), line.encode())
            except BrokenPipeError:
                self._code()
        self._hear()

    def _hear(self) -> None:
        """Says why the process has stopped, if it has."""
        ended = self._process is not None and self._process.poll() is not None  # asked first: its last words come before its end
        self._read()
        known = self._answers()
        if reason := known.get("failed"):
            self._end(reason)
        elif ended and self._process is not None and "done" not in known:
            self._end(f"its process ended with code {self._process.returncode}")

    def _read(self) -> None:
        with suppress(BlockingIOError):
            while part := os.read(self._heard, 1 << 16):
                self._text += part
            if self._process is not None and b"\n" not in self._text:
                self._end(f"its process ended with code {self._code()}")

    def _code(self) -> int | None:
        """With what a process that has closed its pipes ends; None where it does not end at once."""
        assert self._process is not None
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        return self._process.returncode

    def _answers(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for line in self._text.split(b"\n")[:-1]:
            found |= json.loads(line)
        return found

    def _end(self, reason: str) -> None:
        self._say(f"note: the mirror {self.path} has failed ({reason}); the run goes on without it")
        self._release()

    def _release(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()
            self._left = self._process
        self._process = None
        if self._heard >= 0:
            os.close(self._heard)
        self._heard = -1

    def _reap(self) -> None:
        if self._left is not None:
            with suppress(subprocess.TimeoutExpired):
                self._left.wait(ENDS)
