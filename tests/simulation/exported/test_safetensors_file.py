"""safetensors files: the plain state_dict, bit for bit, and tied weights once."""

from __future__ import annotations

from pathlib import Path

import model_kinds
import pytest
import torch
from cases import run
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import nn

from fedsim.core.tree import sha256_of
from fedsim.errors import BadInput
from fedsim.simulation.export import export
from fedsim.simulation.exported import safetensors_file
from fedsim.simulation.exported.network import module_of, traced
from fedsim.storage.reader import RunReader


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("safetensors")
    assert run("static-mask", "serial", folder, folder / "run.h5") == 0
    return folder / "run.h5"


def written(module: nn.Module, path: Path) -> Path:
    path.write_bytes(safetensors_file.FORM.content(module, torch.zeros(1), {"fedsim.run": "naïve \x1b[1m"}))
    return path


def test_a_run_gives_its_state_dict(finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export(finished, None, None, Console(width=300), "safetensors")
    assert "safetensors.torch.load_file(" in capfd.readouterr().out
    module, found = module_of(finished), load_file(finished.with_suffix(".safetensors"))
    assert sha256_of(found) == sha256_of(module.state_dict())
    assert found["norm1.num_batches_tracked"].dtype == torch.int64
    nn.init.zeros_(module.get_parameter("fc2.bias"))
    assert str(module.load_state_dict(found)) == "<All keys matched successfully>"
    assert torch.equal(module.get_parameter("fc2.bias"), found["fc2.bias"])
    with safe_open(finished.with_suffix(".safetensors"), "pt") as file:
        facts = file.metadata()
    assert facts["fedsim.weights_sha256"] == RunReader(finished).attributes["weights_sha256"]
    assert "fedsim.client" not in facts


def test_tied_weights_stand_there_once_and_are_filled_twice(tmp_path: Path) -> None:
    module, _ = traced(model_kinds.tied())
    path = written(module, tmp_path / "tied.safetensors")
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"fedsim.run": "naïve \x1b[1m", "b.weight": "a.weight"}
    assert set(module.state_dict()) - set(load_file(path)) == {"b.weight"}
    other, _ = traced(model_kinds.tied())
    load_model(other, path)
    assert torch.equal(other.get_parameter("b.weight"), module.get_parameter("a.weight"))
    assert "which also fills b.weight, the same tensor as a.weight" in safetensors_file.FORM.how(path, module, "")


def test_parts_of_one_tensor_are_whole_tensors_in_the_file(tmp_path: Path) -> None:
    module, whole = nn.Module(), torch.arange(6.0).view(2, 3)
    for name, part in {
        "row": whole[0],
        "column": whole[:, 1],
        "empty": whole[:0],
        "none": whole[:0],
        "nan": torch.tensor(torch.nan),
    }.items():
        module.register_buffer(name, part)
    found = load_file(written(module, tmp_path / "parts.safetensors"))
    assert found["column"].tolist() == [1, 4]
    assert set(found) == {"row", "column", "empty", "none", "nan"}
    safetensors_file.FORM.read(tmp_path / "parts.safetensors", b"", module)


def test_a_file_with_other_tensors_is_refused(tmp_path: Path) -> None:
    module, _ = traced(model_kinds.residual())
    path = written(module, tmp_path / "net.safetensors")
    with torch.no_grad():
        module.get_parameter("a.weight")[0, 0, 0, 0] += 1e-7
    with pytest.raises(BadInput, match="the tensors in the file are not those of the module"):
        safetensors_file.FORM.read(path, b"", module)
