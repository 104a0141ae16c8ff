"""`fedsim doctor RUN.h5 [--mend]`."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from fedsim_analysis.foreign_text import printable
from fedsim_analysis.watch.lock import holder_of
from rich.console import Console

from fedsim.errors import BadInput, naming_path
from fedsim.storage import disk_room, run_lock
from fedsim.storage.doctor import checkpoints
from fedsim.storage.doctor.examination import ASIDE, Examined, examined, read, refuse_others
from fedsim.storage.doctor.findings import summed

BEFORE = ".before-mending"  # behind the name of the run file as it was
SHOWN = 30  # findings


def doctor(path: Path, mend: bool, console: Console, since: str = "", sleep: Callable[[float], object] = lambda seconds: None) -> int:
    """Prints what is wrong with a run, and mends what can be mended; 0: nothing is wrong, or now mended; 1: damage remains.

    BadInput where there is no run file. since: what the lock says about when the mending began. `sleep` waits, in seconds.
    """

    def say(line: str) -> None:
        console.print(printable(line), markup=False, highlight=False, soft_wrap=True)

    with naming_path(path):
        path = Path(os.path.realpath(path))
    refuse_others(path)
    holder = holder_of(path)
    if not mend:
        return _told(examined(path, sleep, holder), say)
    try:
        with run_lock.holding(path, since, sleep, say) as lease:
            found = examined(path, sleep, None if holder is None else replace(holder, writes=False))
            code = _told(found, say, mends=True)
            if not found.mendable:
                return code
            try:
                for line in _mended(found, lease.check):
                    say(f"mended: {line}")
            except OSError as error:
                say(f"not mended: {error.filename or path} cannot be written: {error.strerror}")
                return 1
    except BadInput as error:
        _told(examined(path, sleep, holder), say, mends=True)
        say(f"not mended: {error}")
        return 1
    after = examined(path, sleep, None)
    for line in after.damage:
        say(f"remains: {line}")
    if not after.damage:
        say(f"{path.name} is sound now: {', '.join(after.findings.seen)}")
    return int(bool(after.damage))


def _told(found: Examined, say: Callable[[str], None], mends: bool = False) -> int:
    """Says what was found; the exit code. mends: whether it is mended next."""
    wrong = found.findings.wrong
    for finding in wrong[:SHOWN]:
        say(f"found: {finding}")
    if len(wrong) > SHOWN:
        say(f"found: {len(wrong) - SHOWN} more like these")
    if not wrong:
        say(f"{found.path.name} is sound")
    if found.findings.seen:
        say(f"checked: {', '.join(found.findings.seen)}")
    if found.mendable and not mends:
        say(f"`fedsim doctor --mend {shlex.quote(str(found.path))}` mends it, on a copy{_losing(found)}")
    return int(bool(found.damage))


def _losing(found: Examined) -> str:
    if found.content is None:
        return ""
    return f"; this cannot be brought back: {summed(found.lost)}" if found.lost else "; nothing in the run file is lost"


def _mended(found: Examined, check: Callable[[], None]) -> Iterator[str]:
    """Mends checkpoints, the run file and leftovers; what was done. `check` raises where the lock is another's."""
    yield from checkpoints.mend(found.folder)
    for each in found.too_new:
        yield checkpoints.put_aside(each)
    for path in found.leftovers:
        path.unlink(missing_ok=True)
        yield f"{path.name} was removed"
    if found.content is not None:
        yield from _rewritten(found, found.content, check)


def _rewritten(found: Examined, content: bytes, check: Callable[[], None]) -> Iterator[str]:
    """Writes the run file anew beside the old one, checks it on the disk, and puts it in the place of the old one."""
    aside = found.path.with_name(found.path.name + ASIDE)
    try:
        disk_room.put(aside, content, called=found.path)
        now, reason = read(aside)
        if now is None or (found.checked is not None and len(now.refused) > len(found.checked.refused)):
            yield f"nothing of the run file: what was written anew is no better ({reason})"
            return
        check()
        yield _placed(found.path, aside)
        if found.lost:
            yield f"not brought back, as its attribute 'mended' says: {summed(found.lost)}"
    finally:
        aside.unlink(missing_ok=True)


def _placed(path: Path, aside: Path) -> str:
    """Gives the new file the name of the old one, which keeps another; the run file is there at every instant."""
    if not path.exists():
        aside.rename(path)
        return f"{path.name} was made anew"
    before = path.with_name(path.name + BEFORE)
    number = 1
    while before.exists():
        number += 1
        before = path.with_name(f"{path.name}{BEFORE}-{number}")
    try:
        os.link(path, before)
    except OSError:
        shutil.copy2(path, before)
    shutil.copymode(path, aside)
    aside.replace(path)
    return f"{path.name} was written anew; as it was it is {before.name}"
