"""What a run asks of its file system, recorded by strace, so that any moment of the writing can be made again."""

from __future__ import annotations

import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedsim.storage.checkpoint import SUFFIXES, folder_of

CALLS = (
    *("openat", "close", "lseek", "read", "write", "pwrite64", "sendfile", "copy_file_range", "ftruncate", "truncate", "fallocate"),
    *("rename", "unlink", "mkdir", "rmdir", "fsync", "fdatasync"),
)
LINE = re.compile(rb"^(\d+) +(\w+)\((.*)\) += (-?\d+)")
UNFINISHED = re.compile(rb"^(\d+) +(.*) <unfinished \.\.\.>$")
RESUMED = re.compile(rb"^(\d+) +<\.\.\. \w+ resumed>(.*)$")
WHOLE = 2**22  # bytes of a write that strace shows


@dataclass(frozen=True)
class Change:
    """One call that changes a file or a folder, or puts it onto the disk ("sync")."""

    call: str  # create write size rename unlink mkdir rmdir sync
    path: str  # relative to the folder of the run
    offset: int = 0  # of a write; of "size" the new size
    data: bytes = b""
    to: str = ""
    by: str = ""  # the system call
    count: int = 0  # of the calls of this name that its thread has made to these files, this one too


@dataclass
class Disk:
    """Files and folders as they are now, and of each file what would be left of it if the machine failed."""

    files: dict[str, bytearray] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    waiting: dict[str, list[tuple[int, bytes]]] = field(default_factory=dict)  # by path: writes that are in memory only
    safe: dict[str, bytes] = field(default_factory=dict)  # by path: the content when it was synced last

    def apply(self, change: Change) -> None:
        getattr(self, f"_{change.call}")(change)

    def put(self, folder: Path, lost: random.Random | None = None) -> None:
        """Writes everything into an empty folder. lost: of what was not synced a part is missing, as after the death of the machine."""
        for name in self.folders:
            (folder / name).mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content if lost is None else self._survived(name, lost))

    def _survived(self, name: str, draw: random.Random) -> bytes:
        """Folders, names and sizes are as they were; of the writes since the last sync some, all or none are there."""
        content, odds = bytearray(self.safe.get(name, b"")), draw.choice((0.0, 0.5, 0.9))
        for offset, data in self.waiting.get(name, []):
            if draw.random() < odds:
                content.extend(bytes(max(0, offset - len(content))))
                content[offset : offset + len(data)] = data
        size = len(self.files[name])
        return bytes(content[:size]) + bytes(max(0, size - len(content)))

    def _create(self, change: Change) -> None:
        self.files[change.path] = bytearray()
        self.waiting[change.path], self.safe[change.path] = [], b""

    def _write(self, change: Change) -> None:
        content, end = self.files[change.path], change.offset + len(change.data)
        content.extend(bytes(max(0, end - len(content))))
        content[change.offset : end] = change.data
        self.waiting[change.path].append((change.offset, change.data))

    def _size(self, change: Change) -> None:
        content = self.files[change.path]
        del content[change.offset :]
        content.extend(bytes(max(0, change.offset - len(content))))

    def _rename(self, change: Change) -> None:
        for table in (self.files, self.waiting, self.safe):
            table[change.to] = table.pop(change.path)  # type: ignore[attr-defined]

    def _unlink(self, change: Change) -> None:
        for table in (self.files, self.waiting, self.safe):
            del table[change.path]  # type: ignore[attr-defined]

    def _mkdir(self, change: Change) -> None:
        self.folders.append(change.path)

    def _rmdir(self, change: Change) -> None:
        self.folders.remove(change.path)

    def _sync(self, change: Change) -> None:
        if change.path in self.files:
            self.safe[change.path], self.waiting[change.path] = bytes(self.files[change.path]), []


def tracer(log: Path, run: Path, rounds: int) -> tuple[str, ...]:
    """The words that record what a command does to a run file and its checkpoints."""
    calls = f"trace={','.join(CALLS)}"
    return ("strace", "-f", "--seccomp-bpf", "-xx", "-s", str(WHOLE), "-o", str(log), "-e", calls, *_paths(run, rounds))


def killer(run: Path, rounds: int, call: str, number: int) -> tuple[str, ...]:
    """The words that kill a command when it begins its call `number`, from 1, of this name to these files: nothing of that call is done."""
    chosen = ("-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when={number}")
    return ("strace", "-f", "--seccomp-bpf", "-o", "/dev/null", *chosen, *_paths(run, rounds))


def _paths(run: Path, rounds: int) -> Iterator[str]:
    """-P and each path that a run may write."""
    folder = folder_of(run)
    own = [folder / f"{r:06d}{suffix}" for r in range(rounds + 1) for suffix in SUFFIXES if suffix != ".new"]
    for path in (run, folder, *own):
        yield from ("-P", str(path), "-P", f"{path}.new")


def missing() -> str:
    """Why nothing can be recorded here; empty where it can."""
    return "" if shutil.which("strace") else "strace is not installed (on Debian: apt install strace)"


def changes(log: Path, folder: Path) -> list[Change]:
    """All changes below the folder, in their order. ValueError where what strace has seen does not make these files."""
    reading = _Reading(folder, Disk())
    found = list(reading.changes(log))
    wrong = [name for name, content in reading.disk.files.items() if not (path := folder / name).exists() or path.read_bytes() != content]
    if wrong:
        raise ValueError(f"what strace has seen does not give {', '.join(wrong)}: a call or a file is missing in what it is asked for")
    return found


@dataclass
class _Reading:
    """The files that are open, and where in them the next write goes."""

    folder: Path
    disk: Disk
    names: dict[int, str] = field(default_factory=dict)
    places: dict[int, int] = field(default_factory=dict)

    def changes(self, log: Path) -> Iterator[Change]:
        counts: Counter[tuple[bytes, str]] = Counter()
        for thread, call, words, result in _lines(log):
            counts[thread, call] += 1
            for change in self._of(call, words, result) if result >= 0 else ():
                self.disk.apply(change)
                yield replace(change, by=call, count=counts[thread, call])

    def _of(self, call: str, words: list[bytes], result: int) -> Iterator[Change]:
        if call in ("rename", "unlink", "mkdir", "rmdir", "truncate"):
            yield from self._of_path(call, words)
        elif call == "openat":
            yield from self._opened(words, result)
        elif call in ("sendfile", "copy_file_range"):
            yield from self._copied(call, words, result)
        elif (number := int(words[0])) in self.names:
            yield from self._of_open(call, number, words, result)

    def _of_path(self, call: str, words: list[bytes]) -> Iterator[Change]:
        path = self._below(words[0])
        if path is None:
            return
        if call == "truncate":
            yield Change("size", path, int(words[1]))
        elif call == "rename":
            yield Change("rename", path, to=self._below(words[1]) or "")
            self.names = {number: (self._below(words[1]) or "") if name == path else name for number, name in self.names.items()}
        else:
            yield Change(call, path)

    def _opened(self, words: list[bytes], number: int) -> Iterator[Change]:
        path = self._below(words[1])
        self.names.pop(number, None)
        if path is None:
            return
        self.names[number], self.places[number] = path, 0
        if b"O_TRUNC" in words[2] or (b"O_CREAT" in words[2] and path not in self.disk.files):
            yield Change("create", path)

    def _of_open(self, call: str, number: int, words: list[bytes], result: int) -> Iterator[Change]:
        name = self.names[number]
        if call == "close":
            del self.names[number]
        elif call == "lseek":
            self.places[number] = result
        elif call == "read":
            self.places[number] += result
        elif call in ("fsync", "fdatasync"):
            yield Change("sync", name)
        elif call == "ftruncate":
            yield Change("size", name, int(words[1]))
        elif call == "fallocate":
            end = int(words[2]) + int(words[3])
            yield Change("size", name, max(end, len(self.disk.files[name])))
        elif call in ("write", "pwrite64"):
            if words[1].endswith(b"..."):
                raise ValueError(f"a write of {result} bytes to {name} was recorded in part")
            offset = self.places[number] if call == "write" else int(words[3])
            self.places[number] += result if call == "write" else 0
            yield Change("write", name, offset, _bytes(words[1])[:result])

    def _copied(self, call: str, words: list[bytes], result: int) -> Iterator[Change]:
        into, source = (int(words[0]), int(words[1])) if call == "sendfile" else (int(words[2]), int(words[0]))
        if into not in self.names or not result:
            return
        begin = int(words[2].lstrip(b"[").split(b"]")[0]) if call == "sendfile" and words[2] != b"NULL" else self.places[source]
        data = bytes(self.disk.files[self.names[source]][begin : begin + result])
        yield Change("write", self.names[into], self.places[into], data)
        self.places[into] += result

    def _below(self, word: bytes) -> str | None:
        path = Path(_bytes(word).decode())
        return str(path.relative_to(self.folder)) if path.is_relative_to(self.folder) else None


def _lines(log: Path) -> Iterator[tuple[bytes, str, list[bytes], int]]:
    """(thread, call, its arguments, what it returned) in the order in which the calls ended."""
    begun: dict[bytes, bytes] = {}
    with log.open("rb") as file:
        for line in file:
            line = line.rstrip(b"\n")
            if match := UNFINISHED.match(line):
                begun[match[1]] = match[1] + b" " + match[2]
                continue
            if match := RESUMED.match(line):
                line = begun.pop(match[1], b"") + match[2]
            if match := LINE.match(line):
                yield match[1], match[2].decode(), match[3].split(b", "), int(match[4])


def _bytes(word: bytes) -> bytes:
    """Of a text as strace -xx shows it."""
    return bytes.fromhex(word.strip(b'"').replace(b"\\x", b"").decode())
