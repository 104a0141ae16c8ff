"""What commands leave behind has the user's umask, is never executable, and nothing is put into a shared temporary folder."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from captured_console import Fedsim
from fedsim_analysis.report import files
from rich.console import Console
from small_job import small_job

from fedsim.core import compiled
from fedsim.storage import disk_room
from fedsim.storage.doctor.command import doctor

COMMANDS = (
    ("run", "job.toml", "--out", "runs/a.h5"),
    ("show", "runs/a.h5"),
    ("export", "runs/a.h5"),
    ("export", "runs/a.h5", "--to", "safetensors"),
    ("export", "runs/a.h5", "--to", "csv"),
    ("export", "runs/a.h5", "--to", "netcdf"),
    ("compare", "runs"),
    ("report", "runs", "--out", "page/report.html"),
)


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place that other users see as this one does: the temporary folder of the system."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "shared"))
    for name in ("TMPDIR", "TMP", "TEMP"):
        monkeypatch.setenv(name, str(tmp_path / "shared"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "shared").mkdir()
    return tmp_path / "shared"


@pytest.mark.parametrize("umask", [0o077, pytest.param(0o022, marks=pytest.mark.full)], indirect=True)
def test_files_have_the_users_umask_and_are_not_executable(
    fedsim: Fedsim, tmp_path: Path, shared: Path, umask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compiled, "cache_folder", compiled.cache_folder.__wrapped__)
    (tmp_path / "job.toml").write_text(small_job(2, evaluate={"every": 1}))
    for command in COMMANDS:
        ended = fedsim(*command)
        assert ended.code == 0, ended.err
    run = tmp_path / "runs" / "a.h5"
    run.write_bytes(run.read_bytes()[:-5000])
    run.chmod(0o600)
    assert doctor(run, True, Console(quiet=True)) == 0
    made = [path for path in tmp_path.rglob("*") if path != shared]
    assert {"a.h5", "a.pt", "a.safetensors", "a.nc", "report.html", "a.h5.checkpoint", "cache"} <= {path.name for path in made}
    modes = {str(path.relative_to(tmp_path)): stat.S_IMODE(path.stat().st_mode) for path in made}
    wrong = {name: oct(mode) for name, mode in modes.items() if mode & umask or (mode & 0o111 and (tmp_path / name).is_file())}
    assert not wrong
    assert not list(shared.iterdir())
    assert not [name for name in modes if name.endswith((".new", ".part", ".mended"))]


def test_a_link_in_the_place_of_a_file_that_is_written_aside_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"of somebody")
    writes = {"file.new": disk_room.put, f".file.{os.getpid()}.part": files.put}
    for name, put in writes.items():
        (tmp_path / name).symlink_to(tmp_path / "elsewhere")
        put(tmp_path / "file", b"ours")
        assert (tmp_path / "file").read_bytes() == b"ours"
        assert (tmp_path / "elsewhere").read_bytes() == b"of somebody"
        assert not (tmp_path / name).exists()
