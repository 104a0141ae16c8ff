"""How functions are compiled, and where the machine's code is kept, so that only the first start on a machine compiles.

A kernel gives the same bits in the process that compiles it and in those that load it: nothing here lets the compiler choose an order
of sums, and what a kernel calls becomes part of it. Code is kept under a key of fedsim's version and of all sources that may
be compiled, for numba knows a function by its own file alone and would go on calling the former code of another file.
"""

from __future__ import annotations

import fcntl
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Event
from typing import Any

from llvmlite import __version__ as llvmlite_version
from numba import __version__ as numba_version
from numba import config as numba_config
from numba import njit
from numba.core import caching
from numba.core.runtime import rtsys
from numba.core.serialize import dumps

from fedsim.core import user_cache

config: Any = numba_config
PACKAGE = Path(__file__).parents[1]
KEYED = ("core", "kernels")  # packages that may hold compiled code
KEPT = 8  # folders, each of another version or other sources
CHECKSUM = 32  # bytes
LOOK, LOOKS = 0.02, 3_000  # seconds between two looks whether it is this process's turn to compile, and looks: a minute


def kernel(function: Callable[..., Any]) -> Any:
    """Decorates what Python calls: compiled at its first call on this machine, later loaded."""
    made: Any = njit(nogil=True)(function)
    if not config.DISABLE_JIT and cache_folder():
        made._cache = _Cache(function)
        made.compile = made._cache.once(made.compile)
    return made


def inlined(function: Callable[..., Any]) -> Any:
    """Decorates what kernels call: it becomes part of each of them."""
    return njit(nogil=True, forceinline=True)(function)


# ---- where code is kept
@cache
def cache_folder() -> Path | None:
    """The folder for this version's code: the first that can be written, else the first that is there; None if there is none."""
    folders = [folder for folder in _folders() if user_cache.is_own(folder)]
    return next(filter(_writable, folders), None) or next(filter(os.path.isdir, folders), None)


def foreign() -> list[Path]:
    """The folders that would be preferred, and are not used, since another user may have written to them."""
    folders, chosen = _folders(), cache_folder()
    preferred = folders[: folders.index(chosen)] if chosen in folders else folders
    return [folder for folder in preferred if not user_cache.is_own(folder)]


def _folders() -> list[Path]:
    return [place / "kernels" / source_key(PACKAGE) for place in places()]


def places() -> list[Path]:
    """Folders that may hold code, the preferred one first: numba's own setting, the user's cache, beside the sources."""
    named = [Path(config.CACHE_DIR) / "fedsim"] if config.CACHE_DIR else []
    return [*named, user_cache.user_cache(), PACKAGE / "__pycache__"]


@cache
def source_key(package: Path) -> str:
    """Of fedsim's version and of all sources of `package` that may be compiled."""
    digest = sha256()
    for path in sorted(path for name in KEYED for path in (package / name).rglob("*.py")):
        digest.update(f"{path.relative_to(package)} {sha256(path.read_bytes()).hexdigest()}\n".encode())
    try:
        known = version("fedsim")
    except PackageNotFoundError:  # a checkout that is not installed
        known = "0"
    return f"{known}-{digest.hexdigest()[:16]}"


def _writable(folder: Path) -> bool:
    """Whether files can be made in the folder; it is made, and marked as used."""
    try:
        fresh = not folder.is_dir()
        user_cache.make(folder)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    with suppress(OSError):
        os.utime(folder)
        if fresh:
            remove_oldest(folder.parent)
    return True


def remove_oldest(kernels: Path) -> None:
    """Leaves the folders that were used last. A process that uses another one loses nothing but time."""
    for folder in sorted(kernels.iterdir(), key=lambda one: one.stat().st_mtime)[:-KEPT]:
        shutil.rmtree(folder, ignore_errors=True)


# ---- how numba keeps it
class _Locator(caching._CacheLocator):
    def __init__(self, function: Any) -> None:
        self._function, self._py_file = function, function.__code__.co_filename

    @classmethod
    def from_function(cls, function: Any, file: str) -> _Locator:
        return cls(function)

    def get_cache_path(self) -> str:
        return str(cache_folder())

    def get_source_stamp(self) -> str:
        return source_key(PACKAGE)

    def get_disambiguator(self) -> str:
        return f"{self._function.__module__}-{self._function.__code__.co_firstlineno}"


class _Implementation(caching.CompileResultCacheImpl):
    _locator_classes: list[type[object]] = [_Locator]  # noqa: RUF012 - as numba declares it


class _Files:
    """A file for every signature and processor. Its checksum says that it is whole, and of this numba and these sources; else it is as
    if it were not there: a single wrong bit in machine code may end the process, or compute something else.

    In numba's one index for all signatures, two processes that save at once may take the same number, and then one finds the other's code.
    """

    def __init__(self, folder: str, name: str, stamp: str) -> None:
        self._folder, self._name = Path(folder), name
        self._made_by = f"{numba_version} {llvmlite_version} {stamp}"

    def load(self, key: Any) -> Any:
        data = user_cache.content(self._path(key))
        checksum, code = data[:CHECKSUM], data[CHECKSUM:]
        # numba has no other form for this than a pickle, and machine code could do anything in any form. So what counts is who wrote it:
        # `content` gives only files that this user or root wrote, in a folder where nobody else can write.
        return pickle.loads(code) if checksum == self._checksum(key, code) else None

    def save(self, key: Any, data: Any) -> None:
        code = dumps(data)
        user_cache.put(self._path(key), self._checksum(key, code) + code)

    def _path(self, key: Any) -> Path:
        return self._folder / f"{self._name}-{sha256(repr(key).encode()).hexdigest()[:16]}.code"

    def _checksum(self, key: Any, code: bytes) -> bytes:
        return sha256(f"{self._made_by} {key!r} ".encode() + code).digest()


class _Turn:
    """Whose turn it is to compile on this machine: of those that share a folder of code. The system ends a turn with its process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._handle: int | None = None

    def come(self) -> bool:
        """Waits for this process's turn. False where another's lasts too long, or the folder knows no locks: then all compile at once."""
        try:
            self._handle = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            for _ in range(LOOKS):
                with suppress(BlockingIOError):
                    fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return True
                Event().wait(LOOK)
        except OSError:
            pass
        self.close()
        return False

    def close(self) -> None:
        """Ends the turn, if it is this process's."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


class _Cache(caching.FunctionCache):
    """A file that cannot be read or written, or is damaged, costs the time to compile, no more."""

    _impl_class = _Implementation

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        locator = self._impl.locator
        self._cache_file: Any = _Files(locator.get_cache_path(), self._impl.filename_base, locator.get_source_stamp())
        self._turn = _Turn(Path(locator.get_cache_path()))

    def once(self, compile: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The function that compiles a signature, or loads it: one process at a time, and the others load what it has made."""

        def compiled(sig: Any) -> Any:
            try:
                return compile(sig)
            finally:
                self._turn.close()

        return compiled

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """What is kept; where there is nothing, once more when it is this process's turn to compile."""
        found = self._kept(sig, target_context)
        if found is None and self._turn.come():
            found = self._kept(sig, target_context)
        return found

    def _kept(self, sig: Any, target_context: Any) -> Any:
        """As numba's, without all that compiling needs (`target_context.refresh`), whose import takes half a second."""
        rtsys.initialize(target_context)  # kernels may take memory
        with suppress(OSError):
            return self._load_overload(sig, target_context)
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError):
            super().save_overload(sig, data)
