"""`fedsim watch` as a person calls it: in a terminal, in a pipe, beside a real run, and what it leaves behind."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from fedsim_analysis.run_file import FORMAT
from fedsim_analysis.watch.command import watch
from fedsim_analysis.watch.plain import Lines
from fedsim_analysis.watch.runs import Watched
from rich.console import Console
from small_job import small_job
from terminal import CTRL_C, HANG, Terminal
from watched_runs import add, begun, held, killed, run_file

import fedsim
from fedsim.cli import commands
from fedsim.storage.reader import RunReader
from fedsim.storage.writer import RunWriter

LEFT, ENTERED, HIDDEN, SHOWN = b"\x1b[?1049l", b"\x1b[?1049h", b"\x1b[?25l", b"\x1b[?25h"
GATED = """
import time
from dataclasses import dataclass
from pathlib import Path

from fedsim.methods.fedavg import FedAvg


@dataclass(frozen=True)
class Gated(FedAvg):
    def round(self, setting, state, fleet, r):
        while r == 2 and not Path("open").exists():
            time.sleep(0.01)
        return super().round(setting, state, fleet, r)
"""


def said(path: Path, **more: object) -> tuple[int, list[str]]:
    """The exit code and the lines that go into a pipe."""
    console = Console(file=io.StringIO(), width=80)
    code = watch(path, 0.01, console, **more)  # type: ignore[arg-type]
    return code, console.file.getvalue().splitlines()  # type: ignore[attr-defined]


# What cannot be watched


def test_what_is_no_run_file_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = run_file(tmp_path / "whole.h5", 3)
    (tmp_path / "cut.h5").write_bytes(whole.read_bytes()[:1000])
    os.utime(tmp_path / "cut.h5", (0, 0))
    (tmp_path / "empty.h5").touch()
    (tmp_path / "foreign.h5").write_text("hello")
    run_file(tmp_path / "newer.h5", 1, format_version=99)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe.h5")
    expected = {
        "cut.h5": "cut.h5 cannot be read: ",
        "empty.h5": "empty.h5 cannot be read: it is empty",
        "foreign.h5": "foreign.h5 cannot be read: it is no HDF5 file; is it a run file of fedsim?",
        "newer.h5": f"in a newer format than this fedsim reads ({FORMAT}); upgrade fedsim",
        "none.h5": "there is no run file ",
        "no/run.h5": "there is no folder ",
        "folder": "there is no run file in the folder ",
        "pipe.h5": "pipe.h5 is a pipe or a device, and no run file",
    }
    for name, message in expected.items():
        monkeypatch.setattr(sys, "argv", ["fedsim", "watch", str(tmp_path / name)])
        with pytest.raises(SystemExit) as ended:
            commands.main()
        out, err = capfd.readouterr()
        assert (ended.value.code, out, err.count("\n")) == (2, "", 1), (name, out, err)
        assert message in err, (name, err)


# Into a pipe


def test_a_pipe_gets_a_line_for_news(tmp_path: Path) -> None:
    path = run_file(tmp_path / "run.h5", 20, finished=True)
    assert said(path) == (0, [f"{path}: done", "round 20/20  accuracy 20.0%  loss 1  density 0.0476  630 MB  2.5 s a round"])
    stopped = run_file(tmp_path / "stopped.h5", 12)
    code, lines = said(stopped)
    assert (code, len(lines)) == (3, 2)
    assert lines[0].startswith(f"{stopped}: stopped (no process writes it; ")
    assert lines[1] == "round 12/20  accuracy 10.0% (round 10)  loss 2  density 0.0769  234 MB  2.5 s a round"


@pytest.mark.parametrize(("planned", "every", "expected"), [(120, 1, range(0, 121, 3)), (40, 5, range(0, 41, 10))])
def test_a_run_is_about_sixty_lines_without_control_signs(tmp_path: Path, planned: int, every: int, expected: range) -> None:
    path, lines = tmp_path / "run.h5", list[str]()
    with begun(path, planned) as record, held(path):
        watched = Watched(path)
        news = Lines(watched)
        for r in range(planned + 1):
            record.row(r, {"density": 0.5} | ({"accuracy": 0.5} if r % every == 0 else {}))
            watched.look()
            lines += news.news()
        record.finish({}, "0" * 64)
    watched.look()
    lines += news.news()
    assert {int(line.split()[1].partition("/")[0]) for line in lines[1:-1]} >= set(expected)
    assert len(expected) <= len(lines) - 2 <= 60
    assert lines[-1].endswith("run.h5: done")
    assert all(line.isprintable() for line in lines)


def test_a_run_that_is_not_evaluated_has_a_line_now_and_then(tmp_path: Path) -> None:
    path, lines = tmp_path / "run.h5", list[str]()
    with begun(path, 40) as record, held(path):
        watched = Watched(path)
        news = Lines(watched)
        for r in range(41):
            record.row(r, {"density": 0.5, "seconds": 2.0})
            watched.look()
            lines += news.news()
    assert [line.split()[1] for line in lines[1:]] == [f"{r}/40" for r in range(0, 41, 4)]
    assert lines[2].startswith("round  4/40  density 0.5  0 B  2 s a round")


def test_a_folder_into_a_pipe(tmp_path: Path) -> None:
    run_file(tmp_path / "a.h5", 5, planned=5, finished=True)
    killed(run_file(tmp_path / "b\x1b[2J.h5", 2))
    (tmp_path / "c.h5").write_text("hello")
    code, lines = said(tmp_path)
    assert code == 2
    assert lines[0] == "a.h5: done, accuracy 5.0%"
    assert lines[1].startswith(r"b\x1b[2J.h5: stopped (process ")
    assert lines[-1] == "1 done, 1 stopped, 1 unreadable; 7 of 25 rounds"
    assert all(line.isprintable() for line in lines)


def test_a_locale_without_signs_gets_others(tmp_path: Path) -> None:
    path = run_file(tmp_path / "größe.h5", 3, planned=3, finished=True)
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert watch(path, 0.01, Console(file=stream, width=80)) == 0
    stream.flush()
    assert stream.buffer.getvalue().decode("ascii").splitlines()[0].endswith("gro?e.h5: done")


# In a terminal


@pytest.fixture
def going(tmp_path: Path) -> Iterator[tuple[Path, RunWriter]]:
    """A run that goes on, with 12 of 20 rounds."""
    path = tmp_path / "run.h5"
    record = begun(path)
    for r in range(13):
        add(record, r)
    with held(path):
        yield path, record
    record.close()


@pytest.mark.full
@pytest.mark.processes
def test_a_terminal_shows_the_run_grow_and_keeps_its_last_frame(going: tuple[Path, RunWriter]) -> None:
    path, record = going
    with Terminal(["watch", str(path), "--every", "0.1"]) as seen:
        seen.until(lambda: "round 12 of 20" in seen.text and "Ctrl-C" in seen.text)
        assert seen.lines[0] == "run.h5  running"
        assert seen.text.count("┌") == 4
        assert len(seen.lines) == 24
        add(record, 13)
        seen.until(lambda: "round 13 of 20" in seen.text)
        seen.resize(120, 40)
        seen.until(lambda: seen.text.count("┌") == 5 and "mean of 13 rounds" in seen.text)
        seen.resize(50, 9)
        seen.until(lambda: "┌" not in seen.text and "round 13 of 20" in seen.text)
        seen.resize(80, 24)
        for r in range(14, 21):
            add(record, r)
        record.finish({}, "0" * 64)
        assert seen.ended() == 0
        assert "run.h5  done" in seen.text
        assert "round 20 of 20" in seen.text
        assert "Ctrl-C" not in seen.text
    assert seen.written.index(ENTERED) < seen.written.index(LEFT)
    assert seen.written.rindex(SHOWN) > seen.written.rindex(HIDDEN)


@pytest.mark.processes
def test_ctrl_z_gives_the_terminal_back_for_a_while(going: tuple[Path, RunWriter]) -> None:
    shell = ("bash", "-mc", '"$@"; echo paused; read line; fg >/dev/null', "bash")
    with Terminal(["watch", str(going[0]), "--every", "0.1"], through=shell) as seen:
        seen.until(lambda: "Ctrl-C ends this view" in seen.text)
        seen.type(b"\x1a")
        seen.until(lambda: "paused" in seen.text)
        assert LEFT in seen.written
        assert seen.written.rindex(SHOWN) > seen.written.rindex(HIDDEN)
        seen.type(b"\n")
        seen.until(lambda: seen.written.count(ENTERED) == 2 and "Ctrl-C ends this view" in seen.text)
        seen.type(CTRL_C)
        assert seen.ended() == 3


@pytest.mark.processes
@pytest.mark.parametrize("how", ["Ctrl-C", pytest.param("SIGTERM", marks=pytest.mark.full), pytest.param("SIGHUP", marks=pytest.mark.full)])
def test_a_signal_ends_the_view_and_leaves_the_terminal_as_it_was(going: tuple[Path, RunWriter], how: str) -> None:
    with Terminal(["watch", str(going[0])]) as seen:
        seen.until(lambda: "Ctrl-C ends this view" in seen.text)
        if how == "Ctrl-C":
            seen.type(CTRL_C)
        else:
            seen.signal(signal.Signals[how])
        assert seen.ended() == 3
        assert (
            seen.lines[[*seen.lines, ""].index("") - 1] == "watch has ended; the run goes on"
            or "watch has ended; the run goes on" in seen.text
        )
    assert b"Traceback" not in seen.written
    assert LEFT in seen.written
    assert seen.written.rindex(SHOWN) > seen.written.rindex(HIDDEN)


@pytest.mark.processes
def test_without_colours_or_signs_or_a_cursor(tmp_path: Path) -> None:
    run_file(tmp_path / "run.h5", 20, finished=True)
    with Terminal(
        ["watch", "run.h5"], folder=tmp_path, NO_COLOR="1", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", LANG="C"
    ) as seen:
        assert seen.ended() == 0
        assert "round 20 of 20 ####" in seen.text
        assert b"\x1b[3" not in seen.written.replace(b"\x1b[3m", b"")  # no colour; 3 is italic
        assert seen.written.isascii()
    with Terminal(["watch", "run.h5"], folder=tmp_path, TERM="dumb") as seen:
        assert seen.ended() == 0
        assert seen.lines[:1] == ["run.h5: done"]
        assert b"\x1b" not in seen.written


# Beside a real run


@pytest.mark.processes
def test_a_real_run_is_watched_left_alone_and_watched_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "gated.py").write_text(GATED)
    (tmp_path / "job.toml").write_text(small_job(4, method={"name": "gated:Gated"}))
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fedsim", "run", "job.toml", "--out", "run.h5"]
    run = subprocess.Popen(command, cwd=tmp_path, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    try:
        with Terminal(["watch", "run.h5", "--wait", "--every", "0.1"], folder=tmp_path) as seen:
            seen.until(lambda: "round 1 of 4" in seen.text and f"process {run.pid} on " in seen.text)
            assert seen.lines[0] == "run.h5  running"
            seen.type(CTRL_C)
            assert seen.ended() == 3
            assert "watch has ended; the run goes on" in seen.text
        assert run.poll() is None
        with Terminal(["watch", ".", "--every", "0.1"], folder=tmp_path, width=120) as seen:
            seen.until(lambda: "1 running" in seen.text)
            (tmp_path / "open").touch()
            assert seen.ended() == 0
            assert "1 done" in seen.text
        assert run.wait(HANG) == 0, run.communicate()
    finally:
        run.kill()
        run.communicate()
    job = tomllib.loads(small_job(4))
    alone = fedsim.run(job, out=tmp_path / "alone.h5")
    assert RunReader(tmp_path / "run.h5", time.sleep).attributes["weights_sha256"] == alone.attributes["weights_sha256"] != ""
