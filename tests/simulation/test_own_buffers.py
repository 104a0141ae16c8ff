"""Runs of a model whose forward changes its buffers: evaluated, resumed and exported with what clients have made of them on average."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import ROUNDS, run
from run_files import assert_same

from fedsim.simulation.exported.network import final
from fedsim.storage.reader import RunReader

CHANGE = {"model": {"factory": "model_kinds:brought"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("buffers")
    for fleet in ("serial", "packed"):
        assert run("fedavg", fleet, where, where / f"{fleet}.h5", change=CHANGE) == 0
    return where


def test_both_fleets_end_with_the_same_buffers_and_accuracies(folder) -> None:
    one, other = (RunReader(folder / f"{fleet}.h5") for fleet in ("serial", "packed"))
    mine, theirs = one.model(), other.model()
    assert int(mine["buf/1.count"]) == int(theirs["buf/1.count"]) >= 2 * ROUNDS
    assert mine["buf/1.begun"]
    assert torch.allclose(mine["buf/1.scale"], theirs["buf/1.scale"], atol=1e-5)
    assert not torch.equal(mine["buf/1.scale"], torch.ones(6, 1, 1))
    assert one.column("accuracy").tolist() == pytest.approx(other.column("accuracy").tolist(), abs=0.02)


def test_resumed_is_never_stopped(folder, tmp_path) -> None:
    out, asked = tmp_path / "run.h5", iter(range(1000))
    assert run("fedavg", "serial", folder, out, stopped=lambda: next(asked) >= 6, change=CHANGE) == 3
    assert RunReader(out).rounds < ROUNDS
    assert run("fedavg", "serial", folder, out, change=CHANGE) == 0
    assert_same(out, folder / "serial.h5")


def test_the_exported_module_has_them(folder) -> None:
    found, _, _ = final(folder / "serial.h5")
    model = RunReader(folder / "serial.h5").model()
    assert all(torch.equal(found.module.get_buffer(key.removeprefix("buf/")), model[key]) for key in model if key.startswith("buf/"))
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.allclose(found.module(x), found.net(found.tree, x)[0], atol=1e-5)
