"""ONNX files: any batch, torch's outputs to 1e-5, the weights bit for bit, pruned ones 0; what cannot be written says why."""

from __future__ import annotations

import io
import json
import logging
import sys
from pathlib import Path
from typing import Any

import model_kinds
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from cases import images, run
from final_networks import NORMED, final_of, forms_of, masks_of, net_of, shape_of
from onnx import numpy_helper
from rich.console import Console
from torch import Tensor, nn

from fedsim import models
from fedsim.errors import BadInput
from fedsim.simulation.export import export
from fedsim.simulation.exported import onnx_file
from fedsim.simulation.exported.network import module_of, traced
from fedsim.storage.reader import RunReader

FACTS = {"fedsim.fedsim": "0", "fedsim.run": "a run"}
LINES = {
    "gated": ("gated", {"model": {"name": "resnet8", "width": 4, "norm": "group", "standardise": True}}),
    "nsconv": ("fedmef", {}),
    "by-image": ("adp", {}),
    "random": ("adp", {"model": {"width": 4, "gate_keep": 0.5, "gate_choice": "random"}}),
}
QUICK = (("cnn", "batch", "affine"), ("resnet8", "group-ws", "norm"), ("resnet8", "nsconv", ""))
EXPLODING = [  # with values that no training has made, logits of so many such layers reach 1e37 and 1e22: rounding shows
    ("resnet56", ("batch", True)),
    ("resnet56", ("none", True)),
    ("mobilenet_v2_cifar", ("batch", True)),
]
TABLE = [
    pytest.param(name, norm, place, marks=() if (name, f"{norm[0]}{'-ws' * norm[1]}", place) in QUICK else pytest.mark.full)
    for name in models.FAMILIES
    for norm in NORMED
    for place in ("", "norm", "affine")
    if (name, norm) not in EXPLODING
    and not (name.startswith("mobilenet") and place)
    and not (place == "affine" and norm[0] in ("none", "nsconv"))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("onnx")
    images(where)
    return where


def finished(folder: Path, name: str) -> Path:
    """A finished run of LINES."""
    out, (line, change) = folder / f"{name}.h5", LINES[name]
    if not out.exists():
        assert run(line, "serial", folder, out, change=change) == 0
    return out


def said_of(path: Path, client: int | None, out: Path) -> str:
    """What an export as ONNX prints."""
    console = Console(width=300, file=io.StringIO(), record=True)
    export(path, client, out, console, "onnx")
    return console.export_text()


def outputs(path: Path, x: Tensor) -> Tensor:
    """By onnxruntime alone."""
    (logits,) = onnxruntime.InferenceSession(path).run(["logits"], {"images": x.numpy()})
    return torch.from_numpy(logits)


def stored(path: Path) -> dict[str, np.ndarray]:
    return {value.name: numpy_helper.to_array(value) for value in onnx.load(path).graph.initializer}


def written(module: nn.Module, x: Tensor, path: Path) -> Path:
    path.write_bytes(onnx_file.FORM.content(module, x, FACTS))
    return path


@pytest.mark.parametrize(
    ("name", "norm", "place"), TABLE, ids=lambda part: part if isinstance(part, str) else f"{part[0]}{'-ws' * part[1]}"
)
def test_every_model_norm_mask_and_gate(name: str, norm: tuple[str, bool], place: str, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    net, values = net_of(name, norm, place, torch.float32)
    held, x = masks_of(net, draw), torch.randn(5, *shape_of(name), generator=draw)
    for form in forms_of(net, draw)[-1:]:
        module, why = traced(final_of(name, net, values | held | form).module.float())
        assert why == ""
        path = written(module, x[:2], tmp_path / "net.onnx")
        for count in (1, 2, 5):
            with torch.no_grad():
                expected = module(x[:count])
            assert float((outputs(path, x[:count]) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
        inside = stored(path)
        for key, value in module.named_parameters():
            assert inside[key].tobytes() == value.detach().numpy().tobytes()
        for layer in held if not form else ():
            assert ((inside[f"{layer.removeprefix('mask/')}"] == 0) >= ~held[layer].numpy()).all()


RUNS = [("gated", 3), *(pytest.param(name, None, marks=pytest.mark.full) for name in ("gated", "by-image", "nsconv"))]


@pytest.mark.parametrize(("name", "client"), RUNS)
def test_a_run_is_written_evaluated_and_described(name: str, client: int | None, folder: Path, tmp_path: Path, capfd: Any) -> None:
    path = finished(folder, name)
    capfd.readouterr()
    said, reader = said_of(path, client, tmp_path / "net.onnx"), RunReader(path)
    assert capfd.readouterr() == ("", "")
    accuracy = f"{reader.column('accuracy')[-1] if client is None else reader.clients('accuracy')[-1, client]:.2%}"
    assert f": {accuracy}; recorded: {accuracy} (round 3)" in said
    assert "it reads float32 images (batch, 1, 8, 8): pixel values / 255, minus mean" in said
    x = torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = module_of(path, client)(x)
    assert float((outputs(tmp_path / "net.onnx", x) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    facts = {entry.key: entry.value for entry in onnx.load(tmp_path / "net.onnx").metadata_props}
    assert facts["fedsim.weights_sha256"] == reader.attributes["weights_sha256"]
    assert facts["fedsim.method"] == reader.attributes["method"]
    assert facts.get("fedsim.client") == (None if client is None else str(client))
    assert json.loads(facts["fedsim.classes"]) == [str(number) for number in range(10)]
    mean, std = json.loads(facts["fedsim.mean"]), json.loads(facts["fedsim.std"])
    assert (len(mean), len(std)) == (1, 1)
    assert 0 < mean[0] < std[0] < 1


def test_pruned_weights_are_the_zeros_of_the_masks(folder: Path, tmp_path: Path) -> None:
    path = finished(folder, "nsconv")
    said_of(path, None, tmp_path / "net.onnx")
    inside, model = stored(tmp_path / "net.onnx"), RunReader(path).model()
    masks = {key.removeprefix("mask/"): value for key, value in model.items() if key.startswith("mask/")}
    assert masks
    values = module_of(path).state_dict()
    for name, mask in masks.items():
        assert not inside[name][~mask.numpy()].any()
        assert np.array_equal(inside[name] == 0, values[name].numpy() == 0)
        assert 0.1 < (inside[name] == 0).mean() < 0.95


def test_paths_of_the_machine_are_not_in_the_file(folder: Path, tmp_path: Path) -> None:
    said_of(finished(folder, "nsconv"), None, tmp_path / "net.onnx")
    assert str(Path(models.__file__).parents[1]).encode() not in (tmp_path / "net.onnx").read_bytes()
    graph = onnx.load(tmp_path / "net.onnx")
    onnx.checker.check_model(graph, full_check=True)
    assert (graph.producer_name, [value.name for value in graph.graph.input], [value.name for value in graph.graph.output]) == (
        "fedsim",
        ["images"],
        ["logits"],
    )
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param


QUICK_KINDS = ("tied weights", "autograd.Function", "squeeze and excite")
KINDS = [pytest.param(kind, marks=() if kind in QUICK_KINDS else pytest.mark.full) for kind in model_kinds.EVERYWHERE]


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_users(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, *model_kinds.SHAPE)
    module, _ = traced(model_kinds.EVERYWHERE[kind]().eval())
    if kind in ("buffers of the model changed in place", "buffers of the model assigned"):
        with pytest.raises(BadInput, match=r"its forward changes (count|scale), and an ONNX network keeps nothing between two calls"):
            written(module, x, tmp_path / "net.onnx")
        return
    path = written(module, x, tmp_path / "net.onnx")
    for count in (1, 5):
        with torch.no_grad():
            expected = module(x[:count])
        assert float((outputs(path, x[:count]) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def deciding(m: Any, x: Tensor) -> Tensor:
    return m.head(m.conv(x) if x.sum() > 0 else m.conv(-x))


def of_one_size(m: Any, x: Tensor) -> Tensor:
    return m.head(m.conv(x)) * torch.ones(4, 1)


@pytest.mark.parametrize(("how", "reason"), [(deciding, "torch.export cannot follow its forward"), (of_one_size, "torch.export cannot")])
def test_what_cannot_be_written_says_why_in_one_line(how: Any, reason: str, tmp_path: Path, capfd: Any) -> None:
    module = model_kinds.Of(how, conv=model_kinds.conv(), head=model_kinds.head()).eval()
    with pytest.raises(BadInput, match=reason) as error:
        written(module, torch.zeros(4, 3, 8, 8), tmp_path / "net.onnx")
    assert len(str(error.value).splitlines()) == 1
    assert str(error.value).endswith("--to torch writes it")
    assert capfd.readouterr() == ("", "")
    assert not logging.root.manager.disable


def test_random_gates_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r'random\.h5 cannot be exported --to onnx: gates\.conv1 draws .*model\.gate_choice = "random"'):
        said_of(finished(folder, "random"), None, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", onnx_file.LIBRARIES)
def test_a_missing_library_is_named_before_anything_is_written(missing: str, folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(BadInput, match=rf"needs the extra `onnx` \(.*{missing}.*\); pip install 'fedsim\[onnx\]'"):
        said_of(finished(folder, "nsconv"), None, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_a_file_that_gives_something_else_is_not_kept(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """One weight less than 1e-4 off, which rounding does not explain."""
    whole = onnx_file._proto

    def wrong(model: Any) -> Any:
        graph = whole(model)
        (bias,) = [value for value in graph.graph.initializer if value.name == "fc2.bias"]
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(5e-4), "fc2.bias"))
        return graph

    monkeypatch.setattr(onnx_file, "_proto", wrong)
    with pytest.raises(BadInput, match="the file does not give what the torch module gives, and nothing was written"):
        said_of(finished(folder, "nsconv"), None, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())
