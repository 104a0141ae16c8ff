"""A run file that HDF5 does not open: its first bytes are written anew, and what was cut off is filled up, in the memory.

HDF5's superblock of version 0, which fedsim's files have, is the same in each of them but for the address of the file's end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import h5py
from fedsim_analysis import run_file

LARGEST = 2**31  # bytes of a file that is looked into in the memory
SIGNATURE = b"\x89HDF\r\n\x1a\n"
END = slice(40, 48)  # of the superblock: the address of the file's end
WRITABLE = 1  # a flag of H5LTopen_file_image
SUPERBLOCK = 96  # bytes, with the entry of the root group


class Unopened(ValueError):
    """A file that cannot be looked into either way, and why."""


@contextmanager
def anyhow(path: Path) -> Iterator[tuple[h5py.File, bool]]:
    """The file, open for reading, and whether HDF5 opens it as it stands."""
    try:
        file, stands = run_file.apart(path), True
    except OSError:
        file, stands = _in_memory(path), False
    try:
        yield file, stands
    finally:
        file.close()


def _in_memory(path: Path) -> h5py.File:
    size = path.stat().st_size
    if size > LARGEST:
        raise Unopened(f"HDF5 cannot open it, and it is too large to be looked into otherwise ({size:,} bytes; at most {LARGEST:,})")
    content = path.read_bytes()
    end = max(int.from_bytes(content[END], "little") if content[:40] == _superblock()[:40] else 0, len(content))
    if not SUPERBLOCK < end <= 16 * len(content) + SUPERBLOCK:
        end = len(content)
    begin = _superblock()[: END.start] + end.to_bytes(8, "little") + _superblock()[END.stop :]
    filled = begin + content[SUPERBLOCK:] + bytes(max(end - len(content), 0))
    try:
        return image(filled)
    except (OSError, RuntimeError, ValueError) as error:
        raise Unopened("HDF5 cannot open it, even with a new superblock") from error


def without(path: Path, name: str) -> h5py.File:
    """The file without one of its attributes, in the memory."""
    if path.stat().st_size > LARGEST:
        raise Unopened(f"the attribute {name!r} is damaged, and the file is too large to be looked into otherwise")
    file = h5py.File(h5py.h5f.open_file_image(path.read_bytes(), WRITABLE))
    del file.attrs[name]
    return file


def image(content: bytes) -> h5py.File:
    """A file in the memory, for reading."""
    return h5py.File(h5py.h5f.open_file_image(content))


@cache
def _superblock() -> bytes:
    """The first bytes of a file that fedsim writes."""
    with h5py.File("superblock", "w", driver="core", backing_store=False) as file:
        file.create_group("rounds")
        file.flush()
        content: bytes = file.id.get_file_image()
    return content[:SUPERBLOCK]
