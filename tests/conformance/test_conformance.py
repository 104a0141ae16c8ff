"""Every method on every fleet on 1, 2, 3 and 5 ranks: the same answer; stopped and resumed = never stopped; budgets; zeros; bytes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import FLEETS, HERE, ROUNDS, RUNS, SIZES, TABLE, run, table

from fedsim.config.job import check
from fedsim.costs import communication
from fedsim.errors import BadInput
from fedsim.simulation.experiment import build_experiment
from fedsim.storage import checkpoint
from fedsim.storage.reader import RunReader, read_model

NAMES = list(TABLE)
APART = ("seconds", "rank_bytes", "rank0_bytes", "rank0_messages")  # what may differ between two runs of one job
MPIRUN = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")


def sha(path: Path) -> str:
    return RunReader(path).attributes["weights_sha256"]


def rows(path: Path) -> dict[str, np.ndarray]:
    reader = RunReader(path)
    every = {f"rounds/{name}": reader.column(name) for name in reader.names("rounds") if name not in APART}
    every |= {f"clients/{name}": reader.clients(name) for name in reader.names("clients")}
    return every | {f"layers/{name}": reader.layers(name) for name in reader.names("layers")}


def same_rows(one: Path, other: Path) -> None:
    mine, theirs = rows(one), rows(other)
    assert mine.keys() == theirs.keys()
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)


@pytest.fixture(scope="session", params=[1, 2, 3, 5])
def ranks(request, folder, alone, ranks_environment) -> Path:
    """All lines of the table on all fleets inside one mpirun."""
    if MPIRUN is None:
        pytest.fail("no mpirun here: pip install 'fedsim[mpi]'")
    name = f"ranks{request.param}"
    command = [MPIRUN, "-n", str(request.param), sys.executable, str(HERE / "cases.py"), str(folder), name]
    done = subprocess.run(command, env=ranks_environment, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder / name


@pytest.mark.timeout(1500)  # the fixture that runs all ranks counts into its first test
@pytest.mark.parametrize(("name", "way"), RUNS)
def test_ranks_change_no_bit(name, way, alone, ranks) -> None:
    assert sha(ranks / f"{name}-{way}.h5") == sha(alone[name, way])
    same_rows(ranks / f"{name}-{way}.h5", alone[name, way])


@pytest.mark.parametrize(("name", "way"), [pair for pair in RUNS if pair[1] != "serial"])
def test_every_way_is_serial(name, way, alone) -> None:
    """One float32 step agrees to about 1e-6; ROUNDS rounds of up to 6 steps with momentum amplify that by less than 100."""
    serial, packed = (read_model(alone[name, kind]) for kind in ("serial", way))
    assert serial.keys() == packed.keys()
    for prefix in ("w/", "buf/"):
        largest = max((float(value.abs().max()) for key, value in serial.items() if key.startswith(prefix)), default=0)
        for key, value in serial.items():
            if key.startswith(prefix):
                assert float((value - packed[key]).abs().max()) <= 1e-4 * largest, key
    for key, value in serial.items():
        if key.startswith("mask/"):
            assert torch.equal(value, packed[key])
    mine, theirs = rows(alone[name, "serial"]), rows(alone[name, way])
    for column in ("rounds/bytes_up", "rounds/bytes_down", "rounds/train_flops", "clients/memory", "clients/samples"):
        np.testing.assert_array_equal(mine[column], theirs[column], err_msg=column)


@pytest.mark.parametrize("fleet", FLEETS)
@pytest.mark.parametrize("name", NAMES)
def test_stopped_and_resumed_is_never_stopped(name, fleet, alone, folder, tmp_path) -> None:
    """Stopped at the 5th question whether to stop, which comes before a pack of round 1 or 2; then, resumed, at the 6th."""
    out = tmp_path / "run.h5"
    for after in (5, 6):
        asked = iter(range(1000))
        assert run(name, fleet, folder, out, stopped=lambda asked=asked, after=after: next(asked) >= after) == 3
    assert RunReader(out).rounds < ROUNDS
    assert run(name, fleet, folder, out) == 0
    assert sha(out) == sha(alone[name, fleet])
    same_rows(out, alone[name, fleet])


def test_the_clients_accuracy_is_by_images_and_the_macro_by_clients(alone, folder) -> None:
    tests = build_experiment(check(table("fedavg", "serial", folder))).population.shards["test"].sizes()
    reader = RunReader(alone["fedavg", "serial"])
    each, tested = reader.clients("accuracy", ROUNDS), tests > 0
    assert reader.column("client_accuracy")[-1] == pytest.approx((each[tested] * tests[tested]).sum() / tests.sum())
    assert reader.column("client_accuracy_macro")[-1] == pytest.approx(each[tested].mean())
    assert reader.column("client_accuracy_min")[-1] == pytest.approx(each[tested].min())
    assert len(set(tests.tolist())) > 1


def test_a_checkpoint_rewrites_the_kept_states_of_its_round_alone(alone) -> None:
    path = alone["keeper", "serial"]
    manifest = json.loads(max(checkpoint.folder_of(path).glob("*.json")).read_text())["manifest"]
    took = np.flatnonzero(RunReader(path).clients("in_cohort", ROUNDS) == 1)
    assert manifest["kept"][f"{ROUNDS:06d}.kept.safetensors"] == took.tolist()
    assert len(took) < len(SIZES)


def test_many_clients_are_evaluated_in_parts_alike(alone, folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("fedsim.core.types.COHORT", 2)
    assert run("fedavg", "serial", folder, tmp_path / "run.h5") == 0
    same_rows(tmp_path / "run.h5", alone["fedavg", "serial"])


def test_a_run_does_not_go_on_from_another_jobs_checkpoint(folder, tmp_path, capsys) -> None:
    """Nor under another plan unsaid."""
    out, asked = tmp_path / "run.h5", iter(range(1000))
    assert run("fedavg", "serial", folder, out, lambda: next(asked) >= 25) == 3
    assert run("fedavg", "serial", folder, out, lambda: True, change={"execution": {"plan": "reference", "fleet": "packed"}}) == 3
    assert "fleet packed (plan: serial)" in capsys.readouterr().out
    found = checkpoint.latest(checkpoint.folder_of(out))
    checkpoint.save(checkpoint.folder_of(out), found.round, found.state, found.extra | {"job_sha256": "another's"})
    with pytest.raises(BadInput, match="are not of the run in"):
        run("fedavg", "serial", folder, out)


@pytest.mark.parametrize("fleet", FLEETS)
def test_kept_state_comes_back_at_the_next_visit(fleet, alone) -> None:
    """Every client counts its own visits in what it keeps."""
    reader = RunReader(alone["keeper", fleet])
    took = reader.clients("in_cohort") == 1
    for r in range(1, ROUNDS + 1):
        assert reader.column("visits")[r] == took[1 : r + 1].sum(0)[took[r]].sum()


def test_kept_states_of_rounds_without_a_checkpoint_are_in_the_next(alone, folder, tmp_path) -> None:
    out, name = tmp_path / "run.h5", ("keeper", "serial")
    seldom = {"execution": table(*name, folder)["execution"] | {"checkpoint_every": 2}}
    asked = iter(range(1000))
    assert run(*name, folder, out, lambda: next(asked) >= 33, change=seldom) == 3
    assert RunReader(out).rounds == 2
    assert run(*name, folder, out, change=seldom) == 0
    assert sha(out) == sha(alone[name])


@pytest.mark.parametrize("fleet", FLEETS)
@pytest.mark.parametrize("name", NAMES)
def test_density_never_exceeds_the_budget(name, fleet, alone) -> None:
    if TABLE[name].budget is not None:
        assert RunReader(alone[name, fleet]).column("density").max() <= TABLE[name].budget


@pytest.mark.parametrize("fleet", FLEETS)
@pytest.mark.parametrize("name", NAMES)
def test_pruned_weights_are_exactly_zero(name, fleet, alone) -> None:
    model = read_model(alone[name, fleet])
    masks = [key for key in model if key.startswith("mask/")]
    assert bool(masks) == TABLE[name].masked
    for key in masks:
        assert (model["w/" + key[5:]][~model[key]] == 0).all()
        assert (model["w/" + key[5:]][model[key]] != 0).any()


@pytest.mark.parametrize("name", NAMES)
def test_the_ledger_charges_what_would_be_encoded(name, alone, folder, tmp_path, monkeypatch) -> None:
    """Every size that the ledger charges is that of the real encoding, which decodes to what was sent."""
    seen, real = [], communication.heads

    def checked(tree, held=None, last=None):  # type: ignore[no-untyped-def]
        header, known = real(tree, held, last), {**(held or {}), **tree}
        for head in header:
            value = tree[head.key].float() if tree[head.key].is_floating_point() else tree[head.key]
            payload = communication._values(head, value, known, (last or {}).get(head.key)).tobytes()
            back = communication.decode(payload, [replace(head, dtype=value.dtype)], known, last)[head.key]
            assert len(payload) == head.size
            assert torch.equal(back, value), head.key  # a pruned weight that is not 0 would be lost
            seen.append(len(payload))
        return header

    monkeypatch.setattr(communication, "heads", checked)
    assert run(name, "serial", folder, tmp_path / "run.h5") == 0
    assert sum(seen) > 0
    same_rows(tmp_path / "run.h5", alone[name, "serial"])


def test_a_static_masks_bytes_by_hand(alone) -> None:
    """Dense first layer and free values 4 bytes each, kept weights 4, positions once to each client and again when they changed."""
    reader = RunReader(alone["static-mask", "serial"])
    model = read_model(alone["static-mask", "serial"])
    kept = sum(int(model[key].sum()) for key in model if key.startswith("mask/"))
    sizes = [model[key].numel() for key in model if key.startswith("mask/")]
    ones = [int(model[key].sum()) for key in model if key.startswith("mask/")]
    others = sum(value.numel() for key, value in model.items() if key[:2] in ("w/", "bu") and "mask/" + key[2:] not in model)
    positions = sum(min(4 * one, -(-size // 8)) for one, size in zip(ones, sizes, strict=True))
    up = reader.clients("bytes_up", 1)
    down = reader.clients("bytes_down", 1)
    took = reader.clients("in_cohort", 1) == 1
    assert took.sum() == 4
    assert (up[took] == 4 * (kept + others)).all()
    assert (down[took] == 4 * (kept + others) + positions).all()
    later = np.nansum(reader.clients("in_cohort"), axis=0)
    third = reader.clients("bytes_down", 3)
    assert (third[reader.clients("in_cohort", 3) == 1] > 4 * (kept + others)).all()
    assert later.max() == 3


@pytest.mark.parametrize("fleet", FLEETS)
def test_one_client_with_all_the_data_is_plain_sgd(fleet, folder, tmp_path) -> None:
    """torch's own module and optimiser on the same batches give the same weights."""
    from fedsim import models
    from fedsim.fleet.batches import Batches, Round

    made = table("fedavg", fleet, folder) | {
        "data": {"name": "digits"},
        "partition": {"name": "iid", "clients": 1},
        "cohort": {"size": 1},
        "rounds": 1,
    }
    out = tmp_path / "one.h5"
    assert run("fedavg", fleet, folder, out, change=made) == 0
    parts = build_experiment(check(made))
    module = models.build(parts.job.model, (1, 8, 8), 10, parts.job.seed)
    optimiser = torch.optim.SGD(module.parameters(), 0.05, 0.9, weight_decay=1e-3)
    for step in Batches(parts.population, parts.setting.train.feed(), [0], [0], Round(0, 1), "cpu", torch.float32):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(module(step.x[0]), step.y[0]).backward()
        optimiser.step()
    model, state = read_model(out), module.state_dict()
    for key, value in model.items():
        assert torch.allclose(value, state[key.partition("/")[2]], atol=2e-3), key
    assert torch.allclose(model["w/fc2.weight"], state["fc2.weight"], atol=1e-4)


def test_speeds_are_of_the_work_that_was_done(alone) -> None:
    reader = RunReader(alone["fedtiny", "packed"])
    assert min(reader.attributes[f"peak_{what}"] for what in ("flops", "bytes")) > 1e6
    assert reader.speed("compute_flops") * reader.timing("compute") == pytest.approx(reader.column("train_flops"))
    assert (reader.speed("record_bytes")[1:] > 0).all()
    assert np.isnan(reader.speed("reduce_bytes")).all()


def test_rank_0_exchanges_as_many_messages_as_there_are_ranks_whatever_the_clients(alone, ranks) -> None:
    """A work costs four messages a rank that trains, and two down and one up for every level of the tree; a round has three works,
    each in four packs: the cohort's, and evaluation on shards of test images and on the clients' own."""
    processes, reader = int(ranks.name.removeprefix("ranks")), RunReader(ranks / "fedavg-serial.h5")
    training = min(processes - 1, 4)
    expected = 3 * (4 * training + 2 * (processes - 1).bit_length() + training.bit_length())
    assert (reader.column("rank0_messages")[2:] == expected).all()
    if processes > 1:
        sent, every = reader.column("rank0_bytes"), reader.column("rank_bytes")
        assert (sent == every).all() == (processes < 4)
        reduced = reader.speed("reduce_bytes") * reader.timing("reduce")
        model = sum(value.numel() for value in read_model(alone["fedavg", "serial"]).values())
        assert (reduced[1:] >= 8 * model * min(processes - 1, 4)).all()
