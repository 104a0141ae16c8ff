"""The jobs of adaptive dynamic pruning and FedDP: valid, and of the network they are meant for."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsim import models
from fedsim.config import job
from fedsim.nn.layers.input_gate import gates_of

JOBS = Path(__file__).parents[2] / "jobs"
ALL = sorted([*JOBS.rglob("adp*.toml"), *JOBS.rglob("feddp*.toml")])
REFERENCES = {
    "adp_dense": "fedavg",
    "adp_dense_shapes": "fedavg",
    "adp_static": "structured",
    "adp_soft": "feddp",
    "adp_dwfnp": "dwfnp",
    "adp_cifar10_dense": "fedavg",
}


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_every_job_is_valid(path) -> None:
    expected = REFERENCES.get(path.stem, "feddp" if path.stem.startswith("feddp") else "adp")
    for one in job.runs(job.load(path)):
        assert one.method.name == expected
        assert (one.model.gate_keep is not None) == (expected == "adp")


@pytest.mark.parametrize("name", ["adp_cifar10", "adp_cifar10_vgg11", "adp_cifar10_resnet32"])
def test_the_authors_setting_is_theirs(name) -> None:
    one = job.runs(job.load(JOBS / f"{name}.toml"))[0]
    train, data, partition = one.train, one.data, one.partition
    assert (one.rounds, partition.clients, one.cohort.of(10), partition.alpha, partition.min_images) == (100, 10, 10, 0.1, 10)
    assert (train.epochs, train.batch, train.lr, train.momentum, train.weight_decay, train.schedule) == (
        10,
        64,
        0.01,
        0.9,
        1e-5,
        "constant",
    )
    assert (data.augments(), data.crop_pad, data.crop_border, data.normalise) == (("crop", "flip"), 4, "reflect", False)
    assert one.model.norm == "batch"
    gates = gates_of(models.build(one.model, (3, 32, 32), 10, 0)).values()
    residual = "resnet" in one.model.name
    assert {gate.sigmoid for gate in gates} == {True}
    assert {float(gate.bias.detach()[0]) for gate in gates} == {float(not residual)}
