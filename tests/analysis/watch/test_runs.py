"""How a run fares: what its file, its lock and the list of its sweep say together."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from fedsim_analysis.watch import runs as module
from fedsim_analysis.watch.lock import began
from fedsim_analysis.watch.runs import AGAIN, DONE, FAILED, RUNNING, STOPPED, UNREAD, UNREADABLE, WAITING, Run, Watched
from watched_runs import SINCE, add, begun, elsewhere, held, killed, listed, run_file

from fedsim.storage.run_lock import lock_of
from fedsim.storage.writer import RunWriter


def looked(path: Path, times: int = 1, **more: object) -> Watched:
    watched = Watched(path, **more)  # type: ignore[arg-type]
    for _ in range(times):
        watched.look()
    return watched


def only(watched: Watched) -> Run:
    assert len(watched.runs) == 1
    return watched.runs[0]


# One run


def test_done(tmp_path: Path) -> None:
    watched = looked(run_file(tmp_path / "run.h5", 3, planned=3, finished=True))
    assert only(watched).state.name == DONE
    assert only(watched).rounds == (3, 3)
    assert np.isnan(only(watched).left())
    assert (watched.ended(), watched.code()) == (True, 0)


def test_running_and_how_much_time_is_left(tmp_path: Path) -> None:
    path = run_file(tmp_path / "run.h5", 7)
    with held(path) as process:
        watched = looked(path)
        run = only(watched)
        assert run.state.name == RUNNING
        assert run.state.why.startswith(f"process {process} on ")
        assert run.state.why.endswith(f" writes it since {SINCE}")
        assert 13 * 2.5 + 3 * 1 - 2.5 <= run.left() <= 13 * 2.5 + 3  # 10, 15 and 20 are evaluated; a part of round 8 is over
        assert (watched.ended(), watched.code()) == (False, 3)


def test_running_before_there_is_a_file(tmp_path: Path) -> None:
    with held(tmp_path / "run.h5"):
        run = only(looked(tmp_path / "run.h5"))
        assert (run.state.name, run.rounds) == (RUNNING, (0, 0))
        assert np.isnan(run.left())


def test_stopped_is_seen_at_once_where_nobody_had_seen_it_run(tmp_path: Path) -> None:
    watched = looked(run_file(tmp_path / "run.h5", 2))
    assert only(watched).state.name == STOPPED
    assert only(watched).state.why == f"no process writes it; {AGAIN}"
    assert (watched.ended(), watched.code()) == (True, 3)


def test_a_killed_run_is_said_to_be_one(tmp_path: Path) -> None:
    path = run_file(tmp_path / "run.h5", 2)
    process = killed(path)
    run = only(looked(path))
    assert run.state.name == STOPPED
    assert run.state.why.startswith(f"process {process} on ")
    assert run.state.why.endswith(f" has ended and did not say why: it was probably killed; {AGAIN}")


def test_a_run_that_ends_is_never_taken_for_stopped(tmp_path: Path) -> None:
    """Its lock goes after its last write; an old copy of the file, as a network may show it, is read anew."""
    path = tmp_path / "run.h5"
    record = begun(path, planned=2)
    watched = Watched(path)
    with held(path):
        for r in range(3):
            add(record, r)
            watched.look()
            assert only(watched).state.name == RUNNING
        record.close()
    watched.look()
    assert only(watched).state.name == RUNNING  # it may begin again, or have ended just now
    with RunWriter(path) as again:
        again.finish({}, "0" * 64)
    found = path.stat()
    only(watched).file._state = (found.st_mtime_ns, found.st_size, found.st_ino)  # nothing new, says the system
    watched.look()
    assert only(watched).state.name == DONE


def test_a_run_that_was_seen_to_run_stops_at_the_second_look(tmp_path: Path) -> None:
    path = run_file(tmp_path / "run.h5", 2)
    watched = Watched(path)
    with held(path):
        watched.look()
    states = []
    for _ in range(3):
        watched.look()
        states.append(only(watched).state.name)
    assert states == [RUNNING, STOPPED, STOPPED]


def test_with_wait_a_stopped_run_and_one_that_never_began_are_waited_for(tmp_path: Path) -> None:
    for path in (run_file(tmp_path / "run.h5", 2), tmp_path / "none.h5"):
        watched = looked(path, times=3, wait=True)
        assert (only(watched).state.name, watched.ended()) == (WAITING, False)
        with held(path):
            watched.look()
            assert only(watched).state.name == RUNNING


def test_a_process_that_cannot_be_asked_is_believed_as_long_as_news_come(tmp_path: Path) -> None:
    path = run_file(tmp_path / "run.h5", 2)
    elsewhere(path)
    run = only(looked(path))
    assert run.state.name == RUNNING
    assert run.state.why == "process 12 on node7 began to write it, and cannot be asked from here; last news just now"
    os.utime(path, (0, path.stat().st_mtime - 3600 - 60))
    run = only(looked(path))
    assert run.state.name == STOPPED
    assert run.state.why.startswith("no news for 1:01:0")
    assert run.state.why.endswith(f", and process 12 on node7 cannot be asked from here; if it has ended, {AGAIN}")


def test_a_lock_without_a_run_file_is_believed_for_a_while(tmp_path: Path) -> None:
    path = tmp_path / "run.h5"
    elsewhere(path)
    assert only(looked(path)).state.name == RUNNING
    os.utime(lock_of(path), (0, lock_of(path).stat().st_mtime - 3600))
    assert (only(looked(path)).state.name, only(looked(path)).state.why) == (STOPPED, "it never began")


def test_long_rounds_are_given_more_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENT", 1.0)
    path = run_file(tmp_path / "run.h5", 4)  # rounds of 2.5 s
    elsewhere(path)
    os.utime(path, (0, path.stat().st_mtime - 40))
    assert only(looked(path)).state.name == RUNNING
    os.utime(path, (0, path.stat().st_mtime - 60))
    assert only(looked(path)).state.name == STOPPED


def test_a_file_that_cannot_be_read_does_not_end_a_run_that_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "run.h5"
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with held(path):
        watched = looked(path, times=5)
        assert only(watched).state.name == RUNNING
        assert only(watched).file.trouble
    found = Watched(path)
    for expected in (UNREAD, UNREAD, UNREADABLE):
        found.look()
        assert only(found).state.name == expected
    watched.look()
    assert only(watched).state.name == UNREADABLE
    assert only(watched).state.why.startswith("cannot be read: ")
    assert (watched.ended(), watched.code()) == (True, 2)


def test_a_run_file_that_is_removed_is_gone(tmp_path: Path) -> None:
    path = run_file(tmp_path / "run.h5", 2, planned=2, finished=True)
    watched = looked(path)
    path.unlink()
    for _ in range(2):
        watched.look()
    assert (only(watched).state.name, only(watched).state.why) == (STOPPED, "its file is gone")


# A folder


def names(watched: Watched) -> dict[str, str]:
    return {run.path.name: run.state.name for run in watched.runs}


def test_a_folder_shows_all_runs_of_its_sweep(tmp_path: Path) -> None:
    run_file(tmp_path / "a-seed2.h5", 2, planned=2, finished=True)
    run_file(tmp_path / "a-seed10.h5", 1)
    run_file(tmp_path / "a-seed3.h5", 1)
    me = {"process": os.getpid(), "began": began(os.getpid())}
    listed(
        tmp_path,
        {
            "a-seed2.h5": {"state": "running", **me},  # which had not been written down yet
            "a-seed10.h5": {"state": "running", **me},
            "a-seed3.h5": {"state": "failed", "message": "the loss is nan", **me},
            "b-seed1.h5": {"state": "waiting", "rounds": 30, **me},
            "../secret.h5": {"state": "waiting", **me},
        },
    )
    with held(tmp_path / "a-seed10.h5"):
        watched = looked(tmp_path)
        found = {"a-seed2.h5": DONE, "a-seed3.h5": FAILED, "a-seed10.h5": RUNNING, "b-seed1.h5": WAITING}
        assert names(watched) == found
        assert list(names(watched)) == list(found)  # in the order of their numbers
        assert [run.rounds for run in watched.runs] == [(2, 2), (1, 20), (1, 20), (0, 30)]
        assert watched.runs[1].state.why == "the loss is nan"
        assert watched.count() == {RUNNING: 1, WAITING: 1, DONE: 1, FAILED: 1}
        assert (watched.ended(), watched.code()) == (False, 1)


@pytest.mark.parametrize("process", [1, 2**31 - 1, "x", None, -1])
def test_runs_of_a_sweep_that_was_killed_are_not_waited_for(tmp_path: Path, process: object) -> None:
    listed(tmp_path, {"a.h5": {"state": "waiting"}, "b.h5": {"state": "running"}}, process=process)  # type: ignore[arg-type]
    run_file(tmp_path / "b.h5", 1)
    if not isinstance(process, int):
        os.utime(tmp_path / "sweep.json", (0, 0))
    watched = looked(tmp_path)
    assert names(watched) == {"a.h5": STOPPED, "b.h5": STOPPED}
    assert watched.runs[0].state.why == "it never began, and its sweep has ended; the same `fedsim sweep` does it"
    assert (watched.ended(), watched.code()) == (True, 3)


def test_a_sweep_on_another_machine_lives_while_it_gives_signs(tmp_path: Path) -> None:
    listed(tmp_path, {"a.h5": {"state": "waiting", "host": "node7"}})
    assert names(looked(tmp_path)) == {"a.h5": WAITING}
    os.utime(tmp_path / "sweep.json", (0, (tmp_path / "sweep.json").stat().st_mtime - 3600))
    assert names(looked(tmp_path)) == {"a.h5": STOPPED}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"runs": 3}', '{"runs": {"a.h5": 3, "b": null}}', "[" * 5000, "\x00"])
def test_a_list_of_anything_is_borne(tmp_path: Path, text: str) -> None:
    (tmp_path / "sweep.json").write_text(text)
    run_file(tmp_path / "run.h5", 1, planned=1, finished=True)
    assert names(looked(tmp_path)) == {"run.h5": DONE}


def test_runs_that_come_later_and_go_are_seen(tmp_path: Path) -> None:
    run_file(tmp_path / "a.h5", 1, planned=1, finished=True)
    watched = looked(tmp_path, expected=2)
    assert (watched.ended(), watched.missing, watched.count()) == (False, 1, {WAITING: 1, DONE: 1})
    run_file(tmp_path / "b.h5", 1, planned=1, finished=True)
    watched.look()
    assert (names(watched), watched.ended(), watched.code()) == ({"a.h5": DONE, "b.h5": DONE}, True, 0)
    (tmp_path / "a.h5").unlink()
    watched.look()
    assert list(names(watched)) == ["b.h5"]


def test_files_that_did_not_change_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        run_file(tmp_path / f"{number}.h5", 1, planned=1, finished=number % 2 == 0)
        if number % 2:
            elsewhere(tmp_path / f"{number}.h5")
    watched = looked(tmp_path)
    opened: list[Path] = []
    original = module.RunFile._read

    def counted(self: module.RunFile, moved: bool) -> bool:
        opened.append(self.path)
        return original(self, moved)

    monkeypatch.setattr(module.RunFile, "_read", counted)
    watched.look()
    assert opened == []
    with RunWriter(tmp_path / "1.h5") as record:
        add(record, 2)
    watched.look()
    assert opened == [tmp_path / "1.h5"]
    assert lock_of(tmp_path / "1.h5").exists()
