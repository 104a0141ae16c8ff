"""An aggregation of one's own: `train.aggregate = "module:Class"`, on ranks, stopped and continued, and what is said of a wrong one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from own_module import put_module
from processes import HANG, MPIRUN, environment
from small_job import SMALL, small_job

import fedsim
from fedsim import BadInput
from fedsim.config import own_code
from fedsim.config.job import check, resolved
from fedsim.simulation.experiment import build_experiment
from fedsim.storage.reader import read_model

CODE = '''
from dataclasses import dataclass

import torch

from fedsim import FedAvg, tree


@dataclass(frozen=True)
class Moving(FedAvg):
    """The server goes a part of the way to the mean, and with momentum on. FedAvgM: Hsu et al., arXiv:1909.06335."""

    rate: float = 1.0
    beta: float = 0.0
    lr: float = 0.0  # of the clients: a field of [train]

    def init_memory(self, shared):
        return {"opt/velocity/" + key.removeprefix("w/"): torch.zeros_like(value) for key, value in tree.under(shared, "w/").items()}

    def server(self, memory, shared, total, setting):
        mean, _ = super().server(memory, shared, total, setting)
        velocity = {}
        for key in tree.under(shared, "w/"):
            name = "opt/velocity/" + key.removeprefix("w/")
            velocity[name] = self.beta * memory[name] + (mean[key] - shared[key])
            mean[key] = torch.lerp(shared[key], mean[key], self.rate) + self.rate * self.beta * memory[name]
        return mean, velocity


class Thawed(FedAvg):
    rate: float = 1.0


@dataclass(frozen=True)
class Foreign:
    pass


@dataclass(frozen=True)
class Needy(FedAvg):
    beta: float
    choice: str = "a"

    def __post_init__(self):
        if self.choice not in "ab":
            raise ValueError(f"choice = {self.choice!r}: should be a or b")
'''


@pytest.fixture(autouse=True)
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return put_module(tmp_path, "my_mean", CODE, monkeypatch)


def job(rounds: int = 2, aggregate: str = "my_mean:Moving", method: str = "fedavg", **own: Any) -> dict[str, Any]:
    train = SMALL["train"] | {"aggregate": aggregate} | ({"aggregate_fields": own} if own else {})
    return SMALL | {"rounds": rounds, "train": train, "method": {"name": method}}


def weights(room: Path, name: str, table: dict[str, Any]) -> dict[str, torch.Tensor]:
    fedsim.run(table, out=room / f"{name}.h5", progress=False)
    return read_model(room / f"{name}.h5")


def test_its_server_makes_the_next_model(room: Path) -> None:
    """All the way it is FedAvg to the bit; no way at all leaves the first weights; half of it is their mean."""
    plain = weights(room, "plain", job(1, "fedavg"))
    whole, none, half = (weights(room, f"rate{rate}", job(1, rate=rate)) for rate in (1.0, 0.0, 0.5))
    first = build_experiment(check(job(1))).setting.net.initial
    for key in (key for key in plain if key.startswith("w/")):
        assert torch.equal(whole[key], plain[key])
        assert torch.equal(none[key], first[key])
        torch.testing.assert_close(half[key].double(), (first[key].double() + plain[key].double()) / 2, rtol=1e-6, atol=1e-7)


def test_momentum_is_kept_over_a_stop(room: Path) -> None:
    table = job(3, beta=0.9)
    whole = fedsim.run(table, out=room / "whole.h5", progress=False)
    fedsim.run(table, out=room / "two.h5", progress=False, callback=lambda done: done.round == 1 and done.stop())
    again = fedsim.run(table, out=room / "two.h5", progress=False)
    without = fedsim.run(job(3), out=room / "without.h5", progress=False)
    assert again.attributes["weights_sha256"] == whole.attributes["weights_sha256"] != without.attributes["weights_sha256"]


@pytest.mark.processes
def test_ranks_change_no_bit(room: Path) -> None:
    one = fedsim.run(job(2, beta=0.9), out=room / "one.h5", progress=False)
    (room / "job.toml").write_text(small_job(2, train={"aggregate": "my_mean:Moving", "aggregate_fields": {"beta": 0.9}}))
    command = [str(MPIRUN), "-n", "3", sys.executable, "-m", "fedsim", "run", "job.toml", "--out", "three.h5"]
    subprocess.run(command, cwd=room, env=environment(), timeout=HANG, check=True, capture_output=True)
    assert fedsim.open_run(room / "three.h5").attributes["weights_sha256"] == one.attributes["weights_sha256"]


def test_fields_of_train_come_from_there(room: Path) -> None:
    table = job(beta=0.5)
    made = check(table | {"train": table["train"] | {"lr": 0.125}})
    aggregate = made.train.aggregation()
    assert (aggregate.lr, aggregate.beta, aggregate.rate, aggregate.called) == (0.125, 0.5, 1.0, "my_mean:Moving")
    assert own_code.names(made) == ["my_mean:Moving"]
    assert "aggregate_fields" not in resolved(check(job(aggregate="fedprox")))


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (job(aggregate="my_mean:Thawed"), "is not an aggregation: it lacks @dataclass(frozen=True)"),
        (job(aggregate="my_mean:Foreign"), "is not an aggregation: it lacks the base class fedsim.FedAvg"),
        (job(aggregate="my_mean:Nothing"), "my_mean has no 'Nothing'; it has Moving, Thawed, Foreign, Needy"),
        (job(aggregate="nowhere:Mean"), "module 'nowhere' cannot be imported"),
        (job(aggregate="fedavk"), "(did you mean 'fedavg'?). There are: fedavg, fedprox, fednova, scaffold; or \"package.module:Class\""),
        (job(gamma=1), "aggregate_fields has 'gamma', and my_mean:Moving does not read it from there; it has: rate, beta"),
        (job(lr=0.1), "aggregate_fields has 'lr', and my_mean:Moving does not read it from there; it has: rate, beta"),
        (
            job(aggregate="fedavg", beta=1),
            "'beta', and fedavg does not read it from there; it has no fields of its own",
        ),
        (job(beta="much"), "[train] aggregate_fields: beta: Input should be a valid number"),
        (job(aggregate="my_mean:Needy"), "[train] aggregate_fields: beta: "),
        (job(aggregate="my_mean:Needy", beta=1, choice="c"), "choice = 'c': should be a or b"),
    ],
)
def test_what_is_wrong_is_said_when_the_job_is_read(table: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput) as caught:
        check(table)
    assert said in str(caught.value)


@pytest.mark.parametrize("method", ["feddst", "lotteryfl", "flpqsu", "heterofl"])
def test_methods_that_average_in_a_way_of_their_own_refuse_it(room: Path, method: str) -> None:
    table = job(method=method) | {"partition": SMALL["partition"] | {"holdout": 0.2}}
    with pytest.raises(BadInput, match=r'"fedavg" or "fedprox"'):
        fedsim.run(table, out=room / "run.h5", progress=False)


def test_other_code_of_it_is_another_run(room: Path) -> None:
    fedsim.run(job(), out=room / "run.h5", progress=False, callback=lambda done: done.round == 1 and done.stop())
    (room / "my_mean.py").write_text(CODE + "\n# another thought\n")
    with pytest.raises(BadInput, match="was made by other code of my_mean:Moving"):
        fedsim.run(job(), out=room / "run.h5", progress=False)
