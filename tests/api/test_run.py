"""fedsim.run in one process: what a callback sees, how a run is stopped and continued, and what is opened afterwards."""

from __future__ import annotations

import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedsim


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_the_callback_sees_each_finished_round_and_its_model(folder: Any) -> None:
    seen: list[fedsim.FinishedRound] = []
    models: list[dict[str, torch.Tensor]] = []

    def watch(finished: fedsim.FinishedRound) -> None:
        seen.append(finished)
        models.append(weights(finished.model()))

    run = fedsim.run("small.toml", callback=watch, progress=False)
    assert [(each.round, each.rounds) for each in seen] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert [each.columns["density"] for each in seen] == run.column("density").tolist()
    np.testing.assert_array_equal([each.columns.get("accuracy", np.nan) for each in seen], run.column("accuracy"))
    final = weights(fedsim.export_module(run.path))
    assert all(torch.equal(final[name], value) for name, value in models[-1].items())
    assert all(not torch.equal(one["fc1.weight"], other["fc1.weight"]) for one, other in pairwise(models))


def test_a_model_of_the_callback_is_its_own(folder: Any) -> None:
    def spoil(finished: fedsim.FinishedRound) -> None:
        with torch.no_grad():
            for value in finished.model().parameters():
                value.zero_()

    spoiled = fedsim.run("small.toml", out="spoiled.h5", callback=spoil, progress=False)
    alone = fedsim.run("small.toml", out="alone.h5", progress=False)
    assert spoiled.attributes["weights_sha256"] == alone.attributes["weights_sha256"] != ""


def test_a_run_that_the_callback_stops_goes_on_by_the_same_call(folder: Any) -> None:
    seen: list[int] = []

    def watch(finished: fedsim.FinishedRound) -> None:
        seen.append(finished.round)
        if finished.round in (1, 3):
            finished.stop()

    first = fedsim.run("small.toml", out="two.h5", callback=watch, progress=False)
    assert (first.rounds, bool(first.attributes["finished"]), seen) == (1, False, [0, 1])
    second = fedsim.run("small.toml", out="two.h5", callback=watch, progress=False)
    assert (second.rounds, bool(second.attributes["finished"]), seen) == (3, True, [0, 1, 2, 3])  # a stop after the last is none
    fedsim.run("small.toml", out="two.h5", callback=watch, progress=False)
    assert seen == [0, 1, 2, 3]
    whole = fedsim.run("small.toml", out="one.h5", progress=False)
    assert second.attributes["weights_sha256"] == whole.attributes["weights_sha256"] != ""


def test_an_exception_of_the_callback_is_the_callers_own_and_the_rounds_before_stay(folder: Any) -> None:
    def fail(finished: fedsim.FinishedRound) -> None:
        if finished.round == 2:
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        fedsim.run("small.toml", callback=fail, progress=False)
    assert fedsim.open_run("runs/small.h5").rounds == 2
    assert fedsim.run("small.toml", progress=False).attributes["finished"]


def test_a_signal_raises_stopped_and_the_same_call_goes_on(folder: Any) -> None:
    def signalled(finished: fedsim.FinishedRound) -> None:
        if finished.round == 1:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(fedsim.Stopped, match=r"stopped; runs/small.h5 holds all complete rounds, and the same command goes on from there"):
        fedsim.run("small.toml", callback=signalled, progress=False)
    assert fedsim.open_run("runs/small.h5").rounds == 1
    assert fedsim.run("small.toml", progress=False).attributes["finished"]


def test_a_run_leaves_signals_and_threads_as_they_were(folder: Any) -> None:
    def mine(*_: object) -> None: ...

    signal.signal(signal.SIGINT, mine)
    torch.set_num_threads(2)
    fedsim.run("small.toml", set={"rounds": 1, "execution.threads": 1}, progress=False)
    assert signal.getsignal(signal.SIGINT) is mine
    assert torch.get_num_threads() == 2


def test_a_fault_in_a_clients_work_names_it(folder: Any) -> None:
    with pytest.raises(fedsim.ClientFault, match=r"^\[rank 0, client \d, round 2, Boom\.step 1\] ValueError: this is not what I wanted"):
        fedsim.run("small.toml", set={"method.name": folder.faulty()}, progress=False)
    assert fedsim.open_run("runs/small.h5").rounds == 1


def test_a_job_of_any_form_is_the_same_run(folder: Any) -> None:
    forms = [folder.path / "small.toml", "small.toml", folder.table | {"name": "small"}, fedsim.load_job("small.toml")]
    hashes = {fedsim.run(form, out=f"{i}.h5", progress=False).attributes["weights_sha256"] for i, form in enumerate(forms)}
    assert len(hashes) == 1
    assert fedsim.run(forms[2], progress=False).path == Path("runs/small.h5")


def test_the_estimate_is_what_the_run_is_charged(folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = fedsim.estimate("small.toml", progress=False)
    assert capsys.readouterr().out == ""
    run = fedsim.run("small.toml", progress=False)
    for name in ("bytes_up", "bytes_down", "train_flops", "max_client_memory", "density"):
        assert [row[name] for row in rows] == run.column(name).tolist(), name
    fedsim.estimate("small.toml")
    assert "whole run: " in capsys.readouterr().out


def test_a_run_is_opened_while_it_grows(folder: Any) -> None:
    rounds: list[int] = []

    def watch(finished: fedsim.FinishedRound) -> None:
        rounds.append(fedsim.open_run("runs/small.h5").rounds)

    fedsim.run("small.toml", callback=watch, progress=False)
    assert all(found in (r - 1, r) for r, found in enumerate(rounds)), "a row is written beside the training that follows"
    assert len(rounds) == 4
    for path, said in (("nowhere.h5", "there is no run file nowhere.h5"), ("small.toml", "small.toml cannot be read")):
        with pytest.raises(fedsim.BadInput, match=said):
            fedsim.open_run(path)


def test_the_exported_module_has_the_recorded_accuracy(folder: Any) -> None:
    run = fedsim.run("small.toml", set={"evaluate.every": 1}, progress=False)
    module = fedsim.export_module(run.path)
    from fedsim.data.population import populate

    job = fedsim.load_job("small.toml")
    test = populate(job.data, job.partition, job.seed).test
    every = torch.arange(len(test))
    x = (test.images(every).float() / 255 - torch.tensor(test.mean).view(-1, 1, 1)) / torch.tensor(test.std).view(-1, 1, 1)
    with torch.no_grad():
        right = (module(x).argmax(-1) == test.labels(every)).float().mean()
    assert abs(float(right) - run.column("accuracy")[-1]) < 1e-6
    assert not module.training
    with pytest.raises(fedsim.BadInput, match="client 3 has no network of its own"):
        fedsim.export_module(run.path, client=3)
    with pytest.raises(fedsim.BadInput, match=r"there is no run file nowhere.h5"):
        fedsim.export_module("nowhere.h5")


@pytest.mark.full
def test_a_long_run_is_reported_in_few_lines(folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fedsim.run("small.toml", set={"rounds": 200, "evaluate.every": 1, "data.train_images": 40, "data.test_images": 8})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("round ")]
    assert 20 < len(lines) <= 61
    assert lines[0].startswith("round   0/200  accuracy ")
    assert lines[-1].startswith("round 200/200  accuracy ")
    assert "\r" not in "".join(lines)


def test_a_run_file_that_is_a_link_is_written_where_it_leads(folder: Any) -> None:
    """So its lock, and its checkpoints, are the same by either name."""
    link = Path("link.h5")
    Path("disk").mkdir()
    link.symlink_to("disk/real.h5")

    def watch(finished: fedsim.FinishedRound) -> None:
        if finished.round == 1:
            for name in (link, Path("disk/real.h5")):
                with pytest.raises(fedsim.BadInput, match=r"real\.h5 is being written by another run"):
                    fedsim.run("small.toml", out=name, progress=False)
            finished.stop()

    assert fedsim.run("small.toml", out=link, callback=watch, progress=False).rounds == 1
    assert link.is_symlink()
    assert fedsim.run("small.toml", out="disk/real.h5", resume="must", progress=False).rounds == 3
    assert fedsim.run("small.toml", out=link, resume="must", progress=False).rounds == 3
    assert [path.name for path in Path().iterdir() if "link" in path.name] == ["link.h5"]


LATE = """
from dataclasses import dataclass

from fedsim.federated.averaged_round import AveragedState
from fedsim.methods.fedavg import FedAvg


@dataclass(frozen=True)
class Late(FedAvg):
    def round(self, setting, state, fleet, r):
        state, found = super().round(setting, state, fleet, r)
        if r == 2:
            from late_states import Later

            state = Later(**vars(state))
        return state, found
"""


def test_a_state_that_no_checkpoint_could_be_read_with_is_refused_when_it_appears(folder: Any) -> None:
    """Its class is not imported at the top of the method's module, and is unknown to the next start therefore."""
    Path("late_method.py").write_text(LATE)
    states = "from dataclasses import dataclass\nfrom fedsim.federated.averaged_round import AveragedState\n"
    Path("late_states.py").write_text(f"{states}@dataclass(frozen=True)\nclass Later(AveragedState):\n    pass\n")
    late = {"method.name": "late_method:Late"}
    with pytest.raises(fedsim.MethodFault, match=r"round \(r = 2\): a checkpoint .* could not be read: 'late_states:Later'"):
        fedsim.run("small.toml", set=late, out="late.h5", progress=False)
