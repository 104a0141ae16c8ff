"""sweep.json in the folder of a sweep: which runs there will be and how each ended, so that others see what has not begun or has failed.

    {"runs": {"NAME.h5": {"rounds": 60, "state": "waiting", "message": "", "host": "node1", "process": 12, "began": "4711"}}}

`state` is waiting, running, done, failed or stopped; host, process and began (in ticks of the kernel) name the sweep that the run belongs
to. The file is replaced as a whole, and touched every so often while the sweep lives. It decides nothing: a sweep goes on from the run
files alone, and a disk without room for it does no harm.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedsim_analysis.watch.lock import began
from fedsim_analysis.watch.planned import NAME, listed, lives

from fedsim.errors import NoRoom
from fedsim.storage import disk_room

BEAT = 30.0  # seconds between two signs of life
LONGEST = 300  # letters of a message


class SweepList:
    """The list of the runs of one sweep, each a file in the folder. Runs of other sweeps stay in it, if they live or left a run file."""

    def __init__(self, folder: Path, rounds: Mapping[str, int], now: float) -> None:
        """rounds: of each run, by the name of its file. now: seconds of a clock that only rises."""
        self.path, self.beaten = folder / NAME, now
        mine = {"host": socket.gethostname(), "process": os.getpid(), "began": began(os.getpid())}
        self.runs = {name: {"rounds": count, "state": "waiting", "message": "", **mine} for name, count in rounds.items()}
        self._write()

    def note(self, states: Mapping[str, tuple[str, str]], now: float) -> None:
        """Writes down the news of runs, (state, message) by the names of their files; without news gives a sign of life, if one is due."""
        news = {name: {"state": state, "message": message[:LONGEST]} for name, (state, message) in states.items()}
        if any(self.runs[name] | new != self.runs[name] for name, new in news.items()):
            for name, new in news.items():
                self.runs[name] |= new
            self.beaten = now
            self._write()
        elif now - self.beaten >= BEAT:
            self.beaten = now
            with suppress(OSError):
                os.utime(self.path)

    def _write(self) -> None:
        others = {name: entry for name, entry in listed(self.path).items() if name not in self.runs and self._stays(name, entry)}
        with suppress(OSError, NoRoom):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            disk_room.put(self.path, json.dumps({"runs": others | self.runs}, indent=1).encode())

    def _stays(self, name: str, entry: Any) -> bool:
        return isinstance(entry, dict) and ((self.path.parent / name).is_file() or lives(entry, 0.0))
