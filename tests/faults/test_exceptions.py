"""What goes wrong in a user's own code, or in the numbers: the job ends at once, says where, and keeps the rounds before."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import Console, Ended, Lab, assert_readable, rows

HERE = -1
AT_ONCE = 30  # seconds from the exception to the end of the job, on a machine that does other things too; a job that hangs takes more


@pytest.fixture
def failing(lab: Lab, console: Console) -> Callable[..., Ended]:
    """How the tiny job ends with a method that goes wrong in round 3, on so many ranks; 0: without mpirun; HERE: in this process."""

    def call(where: str, ranks: int = HERE) -> Ended:
        # Client 5 is in every round.
        arguments = ("--set", "method.name=own:Faulty", "--set", f"method.where={where}", "--set", "cohort.size=10")
        if ranks == HERE:
            ended = console(*arguments)
        else:
            running = lab.start(*arguments, ranks=ranks)
            running.until(2)
            ended = running.ended(within=AT_ONCE)
        assert ended.code == 1, ended.err
        assert rows(lab.folder / "run.h5") == 2
        assert_readable(lab.folder / "run.h5", 2)
        return ended

    return call


@pytest.mark.parametrize("ranks", [HERE, 3], ids=["here", "3"])
def test_an_exception_in_a_work_names_rank_client_round_and_step(failing: Callable[..., Ended], ranks: int) -> None:
    ended = failing("step", ranks)
    rank = "0" if ranks == HERE else "[12]"
    assert re.search(rf"^\[rank {rank}, client 5, round 3, Boom\.step 1\] ValueError: this is not what I wanted$", ended.err, re.M)
    assert str(Path("run.h5")) + " keeps the rounds before" in ended.err


@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=pytest.mark.full)])
def test_an_exception_in_a_round_shows_the_line_of_the_user(failing: Callable[..., Ended], ranks: int) -> None:
    ended = failing("round", ranks)
    assert "Traceback" in ended.err
    assert re.search(r'own\.py", line \d+, in round\n\s+raise KeyError\("the line of the user"\)', ended.err)


def test_a_loss_that_is_no_number_names_client_round_and_step(failing: Callable[..., Ended]) -> None:
    ended = failing("loss")
    assert "[rank 0, client 5, round 3, Lost.step 1] FloatingPointError: the loss is nan" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.full
def test_a_report_that_cannot_be_sent_ends_the_job(failing: Callable[..., Ended]) -> None:
    assert re.search(r"^\[rank [12], .*round 3.*\] TypeError: ", failing("report", ranks=3).err, re.M)


def test_an_exception_on_one_rank_while_it_starts_ends_the_job(lab: Lab) -> None:
    ended = lab.run("--set", "model.factory=own:heavy", "--set", "model.width=", "--set", "method.name=fedavg", ranks=3)
    assert ended.code == 1
    assert "LookupError: only on this rank" in ended.err
