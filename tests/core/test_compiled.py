"""Where compiled code is kept: under a key of all sources, in a folder that can be written, or nowhere."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedsim.core import compiled, user_cache

PATIENCE = 200  # seconds
KERNELS = """
import sys
import numpy as np
from fedsim.core.compiled import cache_folder, inlined, kernel

@inlined
def twice(x):
    return 2 * x

@kernel
def double(x):
    return twice(x)

values = {"int": 3, "float": 1.5, "array": np.ones(3), "narrow": np.ones(3, np.float32)}
for name in sys.argv[1:]:
    assert np.all(double(values[name]) == 2 * values[name]), name
print(cache_folder(), sum(double.stats.cache_hits.values()))
"""
PLACES = {"NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "HOME"}


def started(folder: Path, *kinds: str, room: int | None = None, **places: str) -> subprocess.Popen[str]:
    """A process with a kernel of its own, whose cache lies where `places` say."""
    program = folder / "kernels_of_a_test.py"
    program.write_text(KERNELS)
    environment = {name: value for name, value in os.environ.items() if name not in PLACES} | places

    def limit() -> None:
        if room is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    command = [sys.executable, str(program), *kinds]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=limit)


def said(process: subprocess.Popen[str]) -> tuple[Path, int]:
    """The folder of the cache, and how many kernels came from it."""
    out, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    folder, loaded = out.split()
    return Path(folder), int(loaded)


def test_another_version_or_a_change_in_any_file_that_may_be_compiled_is_another_key(tmp_path, monkeypatch) -> None:
    for name in compiled.KEYED:
        shutil.copytree(compiled.PACKAGE / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    key = compiled.source_key.__wrapped__
    first = key(tmp_path)
    assert first == key(compiled.PACKAGE)
    changed = tmp_path / "kernels" / "vectors.py"  # no kernel is in it, others call what is
    changed.write_text(changed.read_text() + "\n")
    assert key(tmp_path) != first
    monkeypatch.setattr(compiled, "version", lambda name: "99.0")
    assert key(tmp_path).startswith("99.0-")


@pytest.mark.processes
def test_the_cache_is_where_the_user_says_or_the_users_or_beside_the_sources(tmp_path) -> None:
    named = {"NUMBA_CACHE_DIR": str(tmp_path / "named"), "XDG_CACHE_HOME": str(tmp_path / "xdg"), "HOME": str(tmp_path / "home")}
    wanted = [tmp_path / "named" / "fedsim", tmp_path / "xdg" / "fedsim", tmp_path / "home" / ".cache" / "fedsim"]
    runs = [started(tmp_path, "int", **dict(list(named.items())[at:])) for at in range(3)]
    runs.append(started(tmp_path, HOME="/dev/null"))
    found = [said(run)[0].parents[1] for run in runs]
    assert found == [*wanted, compiled.PACKAGE / "__pycache__"]
    assert said(started(tmp_path, "int", **named))[1] == 1  # loaded


@pytest.mark.processes
def test_of_processes_that_start_at_once_one_compiles_and_the_others_load(tmp_path) -> None:
    loaded = [said(run)[1] for run in [started(tmp_path, "int", "array", NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(3)]]
    assert sum(loaded) == 4  # two of the three load both, or one each that another has compiled


def test_a_process_that_does_not_end_its_turn_is_not_waited_for_for_ever(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(compiled, "LOOKS", 3)
    holder, other = compiled._Turn(tmp_path), compiled._Turn(tmp_path)
    assert holder.come()
    assert not other.come()
    holder.close()
    assert other.come()
    assert not compiled._Turn(tmp_path / "missing").come()
    other.close()


@pytest.mark.full
@pytest.mark.processes
def test_processes_that_compile_at_once_do_not_take_each_others_code(tmp_path) -> None:
    for _ in range(2):
        kinds = [["int", "array"], ["float", "narrow"], ["array", "float"], ["narrow", "int"]]
        loaded = [said(run)[1] for run in [started(tmp_path, *kind, NUMBA_CACHE_DIR=str(tmp_path)) for kind in kinds]]
    assert loaded == [2] * 4


def flipped(data: bytes) -> bytes:
    """A bit of each 64 bytes is another one: in the machine code too, which no pickle looks at."""
    return bytes(byte ^ (at % 64 == 40) for at, byte in enumerate(data))


@pytest.mark.full
@pytest.mark.processes
def test_damaged_files_and_a_full_disk_cost_time_alone(tmp_path) -> None:
    at = {"NUMBA_CACHE_DIR": str(tmp_path)}
    folder, _ = said(started(tmp_path, "int", "array", room=16, **at))
    assert not list(folder.iterdir())
    said(started(tmp_path, "int", "array", **at))
    files = sorted(folder.iterdir())
    assert len(files) == 2
    for damage in (lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"\x80\x05" + bytes(100), flipped):
        for file in files:
            file.write_bytes(damage(file.read_bytes()))
        assert said(started(tmp_path, "int", "array", **at))[1] == 0
        assert said(started(tmp_path, "int", "array", **at))[1] == 2


def test_folders_that_were_not_used_for_long_are_removed(tmp_path) -> None:
    for number in range(compiled.KEPT + 3):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "code").touch()
        os.utime(tmp_path / str(number), (number, number))
    compiled.remove_oldest(tmp_path)
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == list(range(3, compiled.KEPT + 3))


def test_a_user_without_a_home_has_a_cache_that_cannot_be_made(monkeypatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(NotADirectoryError):
        user_cache.user_cache().mkdir(parents=True)


@pytest.mark.full
@pytest.mark.processes
def test_a_run_on_a_read_only_image_without_a_home_says_once_that_it_compiles_each_time(tmp_path) -> None:
    package = tmp_path / "fedsim"
    shutil.copytree(compiled.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "__pycache__").touch()  # where no folder can be made, not by root either
    environment = {name: value for name, value in os.environ.items() if name not in PLACES}
    environment |= {"HOME": "/dev/null", "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    job = compiled.PACKAGE.parent / "jobs" / "quickstart_dense.toml"
    settings = ["--set", "rounds=1", "--set", "execution.plan=reference"]
    run = [sys.executable, "-m", "fedsim", "run", str(job), *settings, "--out", str(tmp_path / "run.h5")]
    done = subprocess.run(run, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    assert len(re.findall("every start compiles it again; NUMBA_CACHE_DIR", done.stdout)) == 1
    assert not done.stderr
