"""Beside: one task at a time in a thread; its error comes out where it is waited for."""

from __future__ import annotations

import threading

import pytest

from fedsim.storage.places.beside import Beside


def test_a_task_runs_beside_and_the_next_waits_for_it() -> None:
    done: list[str] = []
    gate, beside = threading.Event(), Beside()

    def first() -> None:
        gate.wait(60)
        done.append("first")

    beside.begin(first, lambda: done.append(threading.current_thread().name))
    assert done == []
    gate.set()
    beside.begin(lambda: done.append("second"), lambda: done.append("after the second"))
    assert done[:2] == ["first", threading.current_thread().name]
    beside.wait()
    assert done[2:] == ["second", "after the second"]
    beside.wait()
    assert len(done) == 4


def test_an_error_is_raised_once_and_nothing_follows_it() -> None:
    followed: list[int] = []
    beside = Beside()

    def fail() -> None:
        raise LookupError("the disk")

    beside.begin(fail, lambda: followed.append(1))
    with pytest.raises(LookupError, match="the disk"):
        beside.begin(lambda: followed.append(2))
    assert not beside.failed
    beside.wait()
    assert followed == []


def test_without_threads_a_task_runs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    done: list[int] = []
    beside = Beside()
    beside.begin(lambda: done.append(1))
    assert done == [1]
