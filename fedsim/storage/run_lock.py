"""One run writes a run file at a time: a lease on RUN.h5.lock, which says who holds it.

The file is made whole or not at all (`link`), names its holder by a random token, and is touched every BEAT seconds by a thread. Where
the kernel's lock (`fcntl.lockf`, POSIX) is to be had, the holder has that too: it ends with its process, however that ends, so on one
machine the next run begins at once. A holder on another machine, whose lock may not be seen here (NFS with `nolock` or `local_lock`,
Lustre without `flock`), is watched: it lives if it touches the file, and is taken over after PATIENCE seconds in which it does not.
Clocks are never compared. Whoever takes over from token X first makes `.fedsim-X.next`, which can be made once, and renames it over the
lock; one who died between is replaced at that name the same way. So of many who take over, one wins.

A holder that was stopped for longer finds by `check`, before each write, that the lease is another's. A process that is forked holds none.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedsim_analysis.foreign_text import printable
from fedsim_analysis.watch import lock
from fedsim_analysis.watch.lock import BEAT, PATIENCE, Note, Sight, look

from fedsim.errors import BadInput, CannotWrite, naming_path
from fedsim.storage.checkpoint import folder_of

NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)  # what link says where there are no hard links
GONE = (errno.ESTALE, errno.EIO, errno.ENOENT)  # what a touch says where the file is not there any more
LOOK, LOOKS = 0.1, 100  # seconds between two looks at a holder that is ending, and how many there are
VANISHES = 100  # how often the folder of a lock may be gone when the lock is to be put there
LONGEST = 64  # letters of a name of a machine
GLANCE = 0.5  # seconds between two looks at a holder that is watched
OURS: set[tuple[int, Path]] = set()  # (process, lock): the kernel lets a process take its own lock twice
AMONG_THREADS = threading.Lock()  # of OURS


def _quiet(line: str) -> None:
    pass


@contextmanager
def holding(
    run: Path,
    since: str,
    sleep: Callable[[float], object],
    say: Callable[[str], object] = _quiet,
    job: str = "",
    restarts: int = 0,
) -> Iterator[Lease]:
    """Until its end no other run may write the run file. BadInput where one writes it already.

    since: tells others when that began. say: hears what is waited for. job, restarts: the job of SLURM that this process belongs to, and
    how often it was requeued: its former processes have ended. A folder that cannot be written has no lease: whoever writes the run file
    there gets that error.
    """
    if not run.name:
        raise BadInput(f"{run} is a folder, not a run file; choose another --out")
    with naming_path(run, "; choose another --out"):
        folder_of(run).exists()  # the longest of its names
    path = lock_of(run)
    mine = os.getpid(), path
    with AMONG_THREADS:
        if mine in OURS:
            raise BadInput(_refusal(run, Note(host=socket.gethostname(), process=os.getpid())))
        OURS.add(mine)
    made = [folder for folder in path.parents if not folder.exists()]
    lease = Lease(run, path, Note(since=since, job=job, restarts=restarts))
    try:
        lease.take(sleep, say)
        yield lease
    finally:
        lease.end()
        OURS.discard(mine)
        for folder in made:
            with suppress(OSError):  # it is in use now
                folder.rmdir()


def followed(run: Path) -> Path:
    """The file that a link leads to, so that it is written there, and its checkpoints stand beside it. BadInput for a link in a circle."""
    with naming_path(run, "; choose another --out"):
        if not run.is_symlink():
            return run
        real = Path(os.path.realpath(run))
        if real.is_symlink():
            raise BadInput(f"{run} is a link that leads to itself; choose another --out")
    return real


def lock_of(run: Path) -> Path:
    """RUN.h5.lock beside the run file, the same whichever name the file is called by."""
    real = run.resolve()
    return real.with_name(real.name + ".lock")


class Lease:
    """The right to write one run file, from `take` to `end`."""

    def __init__(self, run: Path, path: Path, about: Note) -> None:
        self.run, self.path, self._about = run, path, about
        self._token = secrets.token_hex(8)
        self._vanished = 0
        self._handle: int | None = None  # None: there can be no lease, or it has ended
        self._owner = os.getpid()
        self._ended, self._using = threading.Event(), threading.Lock()

    def take(self, sleep: Callable[[float], object], say: Callable[[str], object]) -> None:
        """Waits for the lease, and has it. BadInput where another run lives that has it."""
        dying = 0
        try:
            while not self._begun():
                if self.path.is_dir():
                    raise BadInput(
                        f"{self.path} is a folder, and the lock of {self.run} needs a file of this name; remove it, or choose another --out"
                    )
                if (seen := look(self.path)) is None:
                    continue
                if seen.held and seen.note.lives() is False and dying < LOOKS:  # the kernel keeps its lock until its last thread ends
                    dying += 1
                    sleep(LOOK)
                elif self._lives(self.path, seen, sleep, say):
                    raise BadInput(_refusal(self.run, seen.note))
                elif self._took_over(self.path, seen, sleep, say):
                    break
        except OSError:  # whoever writes the run file there says why
            self._let_go()
            return
        self._begin()

    def check(self) -> None:
        """CannotWrite where the lease is not ours any more: asked before each write. The touch asks a file server, not its cache."""
        if self._handle is None:
            return
        try:
            os.utime(self._handle)
        except OSError as error:
            if error.errno in GONE:
                raise CannotWrite(self._lost()) from None
        if not os.fstat(self._handle).st_nlink or not self._is_ours(self.path):
            raise CannotWrite(self._lost())

    def end(self) -> None:
        """Lets go."""
        self._ended.set()
        if os.getpid() == self._owner:
            with suppress(OSError):  # the disk can only be read now, or is gone: who ended the run says so
                if self._is_ours(self.path):  # or another run has it now
                    self.path.unlink(missing_ok=True)
            self._let_go()

    def _let_go(self) -> None:
        with self._using:
            if self._handle is not None:
                os.close(self._handle)
            self._handle = None

    def _begun(self) -> bool:
        """Puts our note at the place of the lock, unless something is there."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return self._placed(self.path)
        except FileNotFoundError:  # a run that was refused has just removed the folder, which was its
            self._vanished += 1
            if self._vanished > VANISHES:  # it is no such run: the folder takes no files, as /proc
                raise
        return False

    def _begin(self) -> None:
        try:
            threading.Thread(target=self._beat, name="lease", daemon=True).start()
        except RuntimeError as error:
            self.end()
            raise BadInput(f"{self.run} cannot be held: {error}; raise the limit on processes (ulimit -u)") from None

    def _beat(self) -> None:
        """Touches the lock: that needs neither room on the disk nor a clock. Signals go to the main thread."""
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while not self._ended.wait(BEAT):
            with suppress(OSError), self._using:
                if self._handle is not None:
                    os.utime(self._handle)

    def _is_ours(self, path: Path) -> bool:
        return self._handle is not None and _is(self._handle, path)

    def _lost(self) -> str:
        try:
            if not self.run.parent.exists():
                return f"the folder of {self.run} is gone, and the run has stopped; what it wrote since the last copy of it is lost with it"
            now = Note.of(self.path.read_bytes())
        except OSError:
            return f"{self.path} was removed, so that another run may write {self.run}; this one has stopped, and the same command goes on"
        return f"{self.run} is being written by another run ({_who(now)}), which took over while this one stood still; this one has stopped"

    def _placed(self, path: Path) -> bool:
        """Puts our note, whole, at `path`, unless something is there."""
        aside = self.path.with_name(f".fedsim-{self._token}")
        handle = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            self._note(handle)
            os.link(aside, path)
            done = True
        except OSError as error:
            done = _is(handle, path)  # a file server may do what it is asked twice, and then say that it was done already
            if not done and error.errno in NO_LINKS:
                os.close(handle)
                handle = -1
                return self._placed_by_name(path)
            if not done and error.errno != errno.EEXIST:
                raise
        finally:
            aside.unlink(missing_ok=True)
            if handle >= 0 and not _is(handle, path):
                os.close(handle)
        return self._has(handle) if done else False

    def _placed_by_name(self, path: Path) -> bool:
        """The same on a file system without hard links: for an instant the note is empty, and who sees it so waits."""
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        self._note(handle)
        return self._has(handle)

    def _has(self, handle: int) -> bool:
        if self._handle is not None:
            os.close(self._handle)
        self._handle = handle
        return True

    def _note(self, handle: int) -> None:
        """Writes down who holds it. A disk without room has none for a note either, and the lease holds without it."""
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locks = True
        except OSError:
            locks = False
        mine = {"host": socket.gethostname(), "process": os.getpid(), "since": self._about.since, "began": lock.began(os.getpid())}
        mine |= {"token": self._token, "boot": lock.boot(), "processes": lock.process_table(), "locks": locks}
        mine |= {"job": self._about.job, "restarts": self._about.restarts}
        with suppress(OSError):
            os.pwrite(handle, json.dumps(mine).encode(), 0)
            os.fsync(handle)

    def _lives(self, path: Path, seen: Sight, sleep: Callable[[float], object], say: Callable[[str], object]) -> bool:
        """Whether the holder of a lock lives; where that cannot be seen, whether it touches the lock within PATIENCE."""
        note = seen.note
        if seen.held:
            return True
        found = note.lives()
        if seen.held is False and (note.here and note.locks if note.token else note.process is not None):
            if not (note.token and found) or note.process == os.getpid():
                return False  # else it lives, and has closed a copy of the file, with which the kernel's lock goes: it is watched
        elif found is not None and note.here:
            return found and note.process != os.getpid()  # one before had our number, as in a container that was started again
        if note.job and note.job == self._about.job and note.restarts < self._about.restarts:
            return False
        if not note.token and note.process is not None:  # an earlier fedsim, which touches nothing
            return True
        say(f"{self.run} has a lock of {_who(note)}, which cannot be asked from here; waiting up to {PATIENCE:.0f} s for a sign of life")
        for _ in range(int(PATIENCE / GLANCE)):
            sleep(GLANCE)
            now = look(path)
            if now is None or not now.same(seen):
                return now is not None and now.mark == seen.mark
        return False

    def _took_over(self, path: Path, dead: Sight, sleep: Callable[[float], object], say: Callable[[str], object]) -> bool:
        """Replaces what a dead holder left at `path`; False where another was quicker."""
        step = self.path.with_name(f".fedsim-{dead.mark}.next")
        if not self._placed(step):
            other = look(step)
            if other is None or self._lives(step, other, sleep, say) or not self._took_over(step, other, sleep, say):
                sleep(LOOK)
                return False
        now = None if self._is_ours(path) else look(path)
        if now is None or now.mark != dead.mark:
            if self._is_ours(step):
                step.unlink(missing_ok=True)
            return self._is_ours(path)
        with suppress(FileNotFoundError):  # one that had stood still woke up, and put ours there
            step.rename(path)
        return self._is_ours(path)


def _is(handle: int, path: Path) -> bool:
    """Whether the open file still has this name."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def _who(note: Note) -> str:
    return f"process {note.process} on {printable(note.host)[:LONGEST]}" if note.process is not None and note.host else "another process"


def _refusal(run: Path, note: Note) -> str:
    since = f", since {printable(note.since)[:LONGEST]}" if note.since else ""
    remove = "" if note.token or note.here else f" (if it has ended, remove {lock_of(run).name})"
    return f"{run} is being written by another run ({_who(note)}{since}); wait until that has ended{remove}, or choose another --out"
