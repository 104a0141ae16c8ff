"""The cache gives what this user or root wrote, where nobody else can, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsim.core import compiled, user_cache
from fedsim.simulation.planning import cache

SOMEBODY = 65533  # the number of a user that nobody here is
root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others")


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    user_cache.make(tmp_path / "cache")
    user_cache.put(tmp_path / "cache" / "code", b"mine")
    return tmp_path / "cache" / "code"


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_what_is_put_is_given_back_under_every_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        user_cache.make(tmp_path / "a" / "b")
        user_cache.put(tmp_path / "a" / "b" / "code", b"mine")
    finally:
        os.umask(before)
    assert user_cache.content(tmp_path / "a" / "b" / "code") == b"mine"
    assert (tmp_path / "a" / "b" / "code").stat().st_mode & 0o777 == 0o644 & ~umask
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["code"]


def linked(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


REFUSED: dict[str, Callable[[Path], object]] = {
    "a file that the group may write to": lambda path: path.chmod(0o664),
    "a file that all may write to": lambda path: path.chmod(0o646),
    "a folder that the group may write to": lambda path: path.parent.chmod(0o775),
    "a folder that all may write to, as a shared one": lambda path: path.parent.chmod(0o1777),
    "a link": linked,
    "a pipe": piped,
    "a folder in its place": lambda path: (path.unlink(), path.mkdir()),
}
OTHERS: dict[str, Callable[[Path], object]] = {
    "a file of another user": lambda path: os.chown(path, SOMEBODY, -1),
    "a folder of another user": lambda path: os.chown(path.parent, SOMEBODY, -1),
}


@pytest.mark.parametrize("kind", [*REFUSED, *(pytest.param(kind, marks=root) for kind in OTHERS)])
def test_what_others_may_have_written_is_not_read(kept: Path, kind: str) -> None:
    (REFUSED | OTHERS)[kind](kept)
    with pytest.raises(OSError, match=r".+"):
        user_cache.content(kept)
    assert cache.known(kept) is None


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o1777])
def test_a_folder_that_others_may_write_to_is_not_used(tmp_path: Path, mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor taken for one's own: code goes to the next place, and one line says so."""
    for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setattr(compiled.config, "CACHE_DIR", str(tmp_path / "NUMBA_CACHE_DIR"))
    folder = tmp_path / "NUMBA_CACHE_DIR" / "fedsim" / "kernels" / compiled.source_key(compiled.PACKAGE)
    folder.mkdir(parents=True)
    folder.chmod(mode)
    found = compiled.cache_folder.__wrapped__()
    assert str(found).startswith(str(tmp_path / "XDG_CACHE_HOME"))
    monkeypatch.setattr(compiled, "cache_folder", lambda: found)
    assert compiled.foreign() == [folder]
    assert not list(folder.iterdir())
    with pytest.raises(PermissionError, match="belongs to another user, or others may write to it"):
        user_cache.make(folder)


def test_a_plan_that_is_damaged_in_the_cache_is_measured_again(tmp_path: Path) -> None:
    from fedsim.simulation.planning.plan import _remembered

    cache.remember(tmp_path / "plans" / "a.json", "{")
    assert cache.known(tmp_path / "plans" / "a.json") == "{"
    assert _remembered(tmp_path / "plans" / "a.json") is None
