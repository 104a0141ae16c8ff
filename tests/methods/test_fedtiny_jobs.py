"""FedTiny as a user meets it: what a job may not ask for, and what a small run leaves on record."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from captured_console import console
from small_job import small_job

from fedsim.storage.reader import RunReader, read_model

SMOKE = small_job(6, partition={"public": 5}, method={"name": "fedtiny", "density": 0.2, "adjust_every": 2, "pool": 3})


@pytest.fixture
def fedsim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    return console(SMOKE, tmp_path, monkeypatch, capfd)


@pytest.mark.parametrize("command", ["run", "estimate"])
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["method.density=0.001"], "leaves 0 of 4,932 weights for the 3 layers to be pruned, each needs one: conv1 stays dense with 36"),
        (["method.density=0.0079"], "0.0079 leaves 2 of 4,932 weights for the 3 layers to be pruned, each needs one"),
        (["method.density=0.0"], "above 0 and at most 1"),
        (
            [
                "partition.name='dirichlet_class'",
                "partition.alpha=0.001",
                "partition.min_images=0",
                "partition.clients=30",
                "cohort.size=30",
            ],
            "[cohort] size = 30, but only 5 of 30 clients have training images; lower cohort.size",
        ),
        (["method.density=0.5", "method.tol=0", "method.spread=0.99", "model.width=5"], "none of 10,000 draws"),
        (["model.norm='none'"], 'selection = "vanilla" or "none"'),
        (["model.norm='group'"], 'selection = "vanilla" or "none"'),
        (["partition.public=1000"], "[partition] public = 1000 images per class, but class"),
        (["partition.public=0"], "partition.public = 5"),
        (["method.blocks='stages'"], "no stages in a model of conv2, fc1, fc2"),
        (["method.blocks='stage'"], "blocks"),
        (["method.blocks=0"], "blocks = 0: should be at least 1"),
        (["method.selection_clients=5"], "selection_clients: of 4 clients at most 4 can select"),
        (["method.adjust_fraction=0.51"], "adjust_fraction = 0.51: should be from 0 to 0.5"),
        (["method.adjust_fraction=-0.1"], "adjust_fraction = -0.1: should be from 0 to 0.5"),
        (["method.adjust_every=0"], "adjust_every = 0: should be at least 1"),
        (["method.stop_round=-1"], "stop_round = -1: should be at least 0"),
        (["method.class_weights=-1"], "class_weights = -1: should be at least 0"),
        (["method.class_weights=100", "method.density=0.1"], "a larger tol or fewer class_weights. The weights of the layers: "),
        (["method.pool=0"], "pool = 0: should be at least 1"),
        (["method.bn_passes=0"], "bn_passes = 0: should be at least 1"),
        (["method.probe_share=1.5"], "probe_share = 1.5"),
        (["method.growth='dense'"], 'growth = "dense": should be "batch" or "last_step"'),
        (["method.selection='accuracy'"], 'selection = "accuracy": should be "bn" or "vanilla" or "none"'),
        (["method.r_stop=3"], "[method] has no field 'r_stop'"),
    ],
)
def test_what_a_job_may_not_ask_for(fedsim, tmp_path, command, settings, said) -> None:
    code, message = fedsim(command, *settings)
    assert code == 2
    assert message.startswith("smoke.toml: ")
    assert said in message
    assert "Traceback" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["smoke.toml"]


def test_pretraining_that_diverges_ends_a_run_before_its_first_round(fedsim, tmp_path) -> None:
    """An estimate trains nobody, the server neither."""
    settings, said = ["train.lr=1e30"], "pretraining on the public images diverged"
    code, message = fedsim("run", *settings)
    assert (code, said in message) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["smoke.toml"]
    assert fedsim("estimate", *settings)[0] == 0


@pytest.mark.parametrize(
    "settings",
    [
        ["method.density=0.008"],
        ["model.norm='none'", "method.selection='none'", "method.pool="],
        ["model.norm='group'", "method.selection='vanilla'"],
        ["partition.public=0", "method.pretrain_epochs=0"],
        ["method.selection_clients=4", "method.blocks=100", "method.stop_round=0"],
    ],
)
def test_what_the_messages_advise_runs(fedsim, settings) -> None:
    assert fedsim("run", "rounds=2", *settings) == (0, "")


def test_the_smoke_job_leaves_its_resources_on_record(fedsim, tmp_path) -> None:
    assert fedsim("run") == (0, "")
    reader, model = RunReader(tmp_path / "runs/smoke.h5"), read_model(tmp_path / "runs/smoke.h5")
    assert reader.rounds == 6
    density, layers = reader.column("density"), reader.layers("density")
    sizes = np.array([model[f"w/{layer}.weight"].numel() for layer in reader.labels("layer")])
    assert density.min() >= 0.98 * 0.2
    assert density.max() <= 0.2
    np.testing.assert_allclose((layers * sizes).sum(1) / sizes.sum(), density)
    assert (layers[:, 0] == 1).all()
    assert (layers == layers[0]).all()
    grown, pruned = reader.layers("grown"), reader.layers("pruned")
    np.testing.assert_array_equal(grown, pruned)
    np.testing.assert_array_equal(grown.sum(1)[1:], reader.column("weights_swapped")[1:])
    assert [np.flatnonzero(row).tolist() for row in grown] == [[], [], [3], [], [2], [], [1]]  # from the output to the input
    assert reader.column("adjusted_block")[[2, 4, 6]].tolist() == [3, 2, 1]
    assert np.isnan(reader.column("adjusted_block")[[1, 3, 5]]).all()
    assert reader.column("candidates")[0] == 3
    assert 1 <= reader.column("chosen_candidate")[0] <= 3
    assert reader.column("candidate_loss")[0] <= reader.column("pool_loss")[0]
    for name in ("bytes_up", "bytes_down", "train_flops"):
        np.testing.assert_array_equal(np.nansum(reader.clients(name), 1), reader.column(name))
    plain, adjusting = reader.column("max_client_flops_share")[[1, 3, 5]], reader.column("max_client_flops_share")[[2, 4, 6]]
    assert plain.max() < adjusting.min() < 1
    assert (np.nanmax(reader.clients("memory"), 1) == reader.column("max_client_memory")).all()
    up, down = reader.column("bytes_up"), reader.column("bytes_down")
    assert (up[[2, 4, 6]] == up[1] + 4 * 8 * reader.column("weights_swapped")[[2, 4, 6]]).all()
    assert (up[[3, 5]] == up[1]).all()
    assert down[2] == down[4] == down[6]
    changed = np.minimum(4 * 2 * reader.column("weights_swapped")[[2, 4]], sizes[[3, 2]] // 8)  # what came and what went, or a bit for each
    assert (down[[3, 5]] == down[2] + 4 * changed).all()


MPIRUN = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")


@pytest.mark.full
@pytest.mark.skipif(MPIRUN is None, reason="needs the extra [mpi]")
@pytest.mark.processes
def test_check_14_three_ranks_agree_with_one_process_bit_for_bit(fedsim, tmp_path) -> None:
    assert fedsim("run") == (0, "")
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
    crowded = {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
    command = [str(MPIRUN), "-n", "3", sys.executable, "-m", "fedsim", "run", "smoke.toml", "--out", "ranks.h5"]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, **allowed, **crowded}, capture_output=True, check=True, timeout=240)
    alone, ranks = RunReader(tmp_path / "runs/smoke.h5"), RunReader(tmp_path / "ranks.h5")
    assert (alone.attributes["ranks"], ranks.attributes["ranks"]) == (1, 3)
    assert ranks.attributes["weights_sha256"] == alone.attributes["weights_sha256"]
    for name in ("accuracy", "weights_swapped", "chosen_candidate", "candidate_loss", "bytes_up", "bytes_down", "train_flops"):
        np.testing.assert_array_equal(ranks.column(name), alone.column(name))
    for r in range(7):
        assert all(torch.equal(mask, ranks.masks(r)[key]) for key, mask in alone.masks(r).items())
