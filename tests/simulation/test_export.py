"""export: what is written runs without fedsim, is as small as it says, and gives the outputs that were evaluated."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest
import torch
from cases import images, run, table
from channel_models import close
from fedsim_analysis import checksums
from final_networks import NORMED, final_of, forms_of, masks_of, net_of, shape_of
from torch import Tensor

from fedsim import models
from fedsim.cli import commands
from fedsim.config.job import check
from fedsim.core import masks
from fedsim.core.keys import GATE
from fedsim.core.tree import under
from fedsim.errors import BadInput
from fedsim.models import settings
from fedsim.nn import profiler
from fedsim.nn.net import Net
from fedsim.simulation import subnetworks
from fedsim.simulation.experiment import build_experiment
from fedsim.simulation.exported import accuracy
from fedsim.simulation.exported.network import Final, _note, module_of, traced
from fedsim.storage.reader import RunReader

LINES = {
    "gated": ("gated", {}),
    "standardised": ("gated", {"model": {"name": "resnet8", "width": 4, "norm": "group", "standardise": True}}),
    "masked": ("static-mask", {}),
    "nsconv": ("fedmef", {}),
    "affine": (
        "adp",
        {
            "method": {"name": "adp", "export_gate": "folded"},
            "model": {"width": 4, "norm": "batch", "gate_keep": 0.5, "gate_place": "affine"},
        },
    ),
    "by-image": ("adp", {}),
    "plain": ("fedavg", {}),
}
OUTSIDE = """
import sys
sys.modules["fedsim"] = None
import torch
module = torch.load(sys.argv[1], weights_only=False)
assert not module.training
kinds = {type(layer).__module__.partition(".")[0] for layer in module.modules()}
assert kinds == {"torch"}, kinds
with torch.no_grad():
    torch.save((module(torch.load(sys.argv[2])), sum(value.numel() for value in module.parameters())), sys.argv[3])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run for each of LINES."""
    where = tmp_path_factory.mktemp("export")
    images(where)
    for name, (line, change) in LINES.items():
        assert run(line, "serial", where, where / f"{name}.h5", change=change) == 0
    return where


def x() -> Tensor:
    return torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(5))


def evaluated(folder: Path, name: str, client: int | None) -> Tensor:
    """The engine's own logits: the network in use, masks and the client's gate multiplied in."""
    line, change = LINES[name]
    reader, net = RunReader(folder / f"{name}.h5"), build_experiment(check(table(line, "serial", folder) | change)).setting.net
    model = reader.model()
    if index := {key[6:]: value for key, value in model.items() if key.startswith("index/")}:
        net = net.cut(index)
    held = under(model, "w/", "buf/", "mask/", "gate/")
    if client is not None:
        ids, hard = reader.gates()
        held |= {GATE: torch.from_numpy(hard[ids.tolist().index(client)])}
    return net.under_vmap()(held, x())[0]


def outside(path: Path, tmp_path: Path) -> tuple[Tensor, int]:
    """(logits, parameters) of an exported file in a process without fedsim."""
    torch.save(x(), tmp_path / "x.pt")
    command = [sys.executable, "-I", "-c", OUTSIDE, str(path), str(tmp_path / "x.pt"), str(tmp_path / "y.pt")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(tmp_path / "y.pt")


def fedsim(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["fedsim", *map(str, arguments)])
    return commands._outcome()


@pytest.mark.parametrize(
    ("name", "client"),
    [
        ("gated", 3),
        ("masked", None),
        *(
            pytest.param(*pair, marks=pytest.mark.full)
            for pair in (("gated", None), ("standardised", None), ("standardised", 1), ("plain", None))
        ),
    ],
)
@pytest.mark.processes
def test_what_is_written_runs_without_fedsim_and_gives_the_same(name, client, folder, tmp_path, monkeypatch) -> None:
    out = tmp_path / "model.pt"
    own = [] if client is None else ["--client", client]
    assert fedsim(monkeypatch, "export", folder / f"{name}.h5", "--to", "torch", *own, "--out", out) == 0
    logits, count = outside(out, tmp_path)
    expected = evaluated(folder, name, client)
    assert float((logits - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    with torch.no_grad():
        assert torch.equal(module_of(folder / f"{name}.h5", client)(x()), logits)
    reader = RunReader(folder / f"{name}.h5")
    if client is not None:
        assert count == reader.clients("parameters")[-1, client]
    elif name in ("gated", "standardised"):
        assert count == reader.column("parameters")[-1]


def test_it_says_what_it_wrote(folder, monkeypatch, capsys) -> None:
    path, reader = folder / "gated.h5", RunReader(folder / "gated.h5")
    assert fedsim(monkeypatch, "export", path, "--client", 3) == 0
    said = capsys.readouterr().out
    assert f"{reader.clients('parameters')[-1, 3]:,.0f} of 5,862 parameters" in said
    assert f"{reader.clients('inference_flops')[-1, 3]:,.0f} of 24,576 FLOP an image" in said
    accuracy = f"{reader.clients('accuracy')[-1, 3]:.2%}"
    assert f"accuracy of this file on its own test images: {accuracy}; recorded: {accuracy} (round 3)" in said
    assert f"wrote {folder / 'gated.client3.pt'}" in said
    assert fedsim(monkeypatch, "export", path) == 0
    assert (folder / "gated.pt").is_file()
    assert not list(folder.glob("*.new"))


@pytest.mark.parametrize(("name", "client"), [*((name, None) for name in LINES), ("gated", 2), ("affine", 2), ("by-image", 2)])
def test_every_file_is_evaluated_and_agrees_with_its_run(name, client, folder, tmp_path, monkeypatch, capsys) -> None:
    own = [] if client is None else ["--client", client]
    capsys.readouterr()
    assert fedsim(monkeypatch, "export", folder / f"{name}.h5", "--out", tmp_path / "model.pt", *own) == 0
    said, reader = capsys.readouterr().out, RunReader(folder / f"{name}.h5")
    accuracy = f"{reader.column('accuracy')[-1] if client is None else reader.clients('accuracy')[-1, client]:.2%}"
    where = "the global test set" if client is None else "its own test images"
    assert f"accuracy of this file on {where}: {accuracy}; recorded: {accuracy} (round 3)" in said
    assert "warning" not in said
    kept = sum(int(mask.sum()) for mask in under(reader.model(), "mask/").values())
    assert ("; masks keep " in said) == bool(kept)


def test_masks_are_counted_in_what_is_said(folder, tmp_path, monkeypatch, capsys) -> None:
    """By hand: kept entries of masked weights, and all others."""
    model = RunReader(folder / "masked.h5").model()
    weights = under(model, "w/")
    kept = sum(int(model["mask/" + key[2:]].sum()) if "mask/" + key[2:] in model else value.numel() for key, value in weights.items())
    whole = sum(value.numel() for value in weights.values())
    assert fedsim(monkeypatch, "export", folder / "masked.h5", "--out", tmp_path / "model.pt") == 0
    said = capsys.readouterr().out
    assert f"{whole:,} of {whole:,} parameters (100.0%); masks keep {kept:,} ({kept / whole:.1%}), the others are 0" in said


def test_a_client_of_folded_affine_gates_has_the_parameters_that_its_run_says(folder) -> None:
    """The constants in the place of the gates are the scales of its norms."""
    small = module_of(folder / "affine.h5", 2)
    assert sum(value.numel() for value in small.parameters()) == RunReader(folder / "affine.h5").clients("parameters")[-1, 2]


def changed(folder: Path, out: Path, change: Callable[[h5py.File], None]) -> Path:
    shutil.copy(folder / "masked.h5", out)
    with h5py.File(out, "r+") as file:
        change(file)
    return out


def test_a_file_that_is_worth_less_than_its_run_says_is_warned_of(folder, tmp_path, monkeypatch, capsys) -> None:
    def worse(file: h5py.File) -> None:
        file["rounds/accuracy"][-1] -= 0.5
        column = checksums.columns(file).index("rounds/accuracy")
        file["checksums/rows"][-1, column] = checksums.of_rows("rounds/accuracy", file["rounds/accuracy"][-1:])[0]

    assert fedsim(monkeypatch, "export", changed(folder, tmp_path / "run.h5", worse)) == 0
    said = capsys.readouterr().out
    assert "warning: 30 of 60 test images make the difference, and rounding explains" in said


def test_a_module_that_is_not_the_runs_network_is_not_written(folder, tmp_path, monkeypatch, capsys) -> None:
    def wrong(found: Final) -> torch.nn.Module:
        return found.net.plain(found.tree | {"w/fc2.bias": torch.arange(10.0)})

    monkeypatch.setattr(Final, "module", property(wrong))
    assert fedsim(monkeypatch, "export", folder / "masked.h5", "--out", tmp_path / "model.pt") == 2
    assert "the exported module is not the run's network, and nothing was written: for 30 of 30 images" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_rounding_may_exchange_logits_that_are_close() -> None:
    """One image whose two largest logits are nearly the same, two that are clear."""
    logits = torch.tensor([[1.0, 1.0 + 1e-6], [1.0, 0.0], [0.0, 1.0]])
    found = accuracy.measured(torch.nn.Identity(), [(logits, torch.tensor([0, 0, 0]))])
    assert (found.correct, found.images, found.near) == (1, 3, 1)
    assert not accuracy.lines_of(found, accuracy.Recorded(2 / 3, 5), None, "")[1:]
    assert accuracy.lines_of(found, accuracy.Recorded(1.0, 5), None, "")[1].startswith("warning: 2 of 3 test images")
    assert not accuracy.lines_of(found, accuracy.Recorded(1.0, 5), None, "a note that explains it")[1:]


def test_pruned_weights_are_exactly_zero(folder) -> None:
    model, values = RunReader(folder / "masked.h5").model(), module_of(folder / "masked.h5").state_dict()
    held = under(model, "mask/")
    assert held
    for key in held:
        assert torch.equal(values[key[5:]], masks.apply(model, held)["w/" + key[5:]])


def test_a_mask_hides_whatever_stands_below_it() -> None:
    module = models.build(settings.ModelSettings(name="cnn", width=4), (1, 8, 8), 10, 0)
    net, mask = Net(module), torch.arange(1280).view(10, 128) % 2 == 0
    found = Final(net, net.initial | {"mask/fc2.weight": mask}, profiler.profile(module, (1, 8, 8)))
    assert torch.equal(found.module.state_dict()["fc2.weight"] != 0, mask)


DEEP = ("resnet32", "resnet56", "vgg16")  # of the same blocks as others
QUICK = ("cnn", "lenet5", "resnet8", "vgg11")  # one of each kind of block; the others are of the full tests
FORMS = [
    pytest.param(name, norm, marks=() if name in QUICK else pytest.mark.full)
    for name in models.FAMILIES
    for norm in NORMED
    if name not in DEEP or norm[0] == "nsconv"
]


@pytest.mark.parametrize("place", ["", "norm", "affine"])
@pytest.mark.parametrize(("name", "norm"), FORMS, ids=lambda part: part if isinstance(part, str) else f"{part[0]}{'-ws' * part[1]}")
def test_every_model_norm_mask_and_gate_is_exported_as_it_is_evaluated(name, norm, place) -> None:
    if (name.startswith("mobilenet") and place) or (place == "affine" and norm[0] in ("none", "nsconv")):
        return  # its convolutions take no gates; there is no norm whose scale a gate could replace
    draw = torch.Generator().manual_seed(0)
    net, values = net_of(name, norm, place)
    images = torch.randn(2, *shape_of(name), generator=draw, dtype=torch.float64)
    held = masks_of(net, draw)
    for form in forms_of(net, draw):
        for under_masks in ({}, held):
            found = final_of(name, net, values | under_masks | form)
            small, why = traced(found.module.double())
            assert why == ""
            with torch.no_grad():
                logits, expected = small(images), net.under_vmap()(found.tree, images)[0]
            assert close(logits, expected, 1e-5), (list(form), bool(under_masks))
            if norm[0] != "nsconv" and not under_masks:  # a gain is multiplied into its filter
                assert sum(value.numel() for value in small.parameters()) == subnetworks.parameters(net, found.tree)


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v2_cifar"])
def test_depth_wise_filters_are_cut_too(name) -> None:
    """The module that an exported client of a mobilenet would be."""
    torch.manual_seed(0)
    module = models.build(settings.ModelSettings(name=name, width=8), (1, 8, 8), 10, 0)
    net = Net(module)
    gate = torch.rand(net.channels.n) < 0.5
    gate |= torch.cat([torch.arange(size) == 0 for size in net.channels.widths])
    found = Final(net, net.initial | {GATE: gate}, profiler.profile(module, (1, 8, 8)))
    small, why = traced(found.module)
    assert why == ""
    expected = net.under_vmap()(found.tree, x())[0]
    with torch.no_grad():
        assert torch.allclose(small(x()), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


FREE = """
from torch import nn

class Choosy(nn.Module):
    def __init__(self, n, classes):
        super().__init__()
        self.fc = nn.Linear(n, classes)

    def forward(self, x):
        x = x.flatten(1)
        return self.fc(x) if x.sum() < 1e9 else self.fc(-x)

def make(shape, classes):
    return Choosy(shape[0] * shape[1] * shape[2], classes)
"""


def test_a_model_that_cannot_be_traced_says_that_it_needs_its_class(folder, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "choosy_model.py").write_text(FREE)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "run.h5"
    assert run("fedavg", "serial", folder, path, change={"model": {"factory": "choosy_model:make"}}) == 0
    capsys.readouterr()
    assert fedsim(monkeypatch, "export", path) == 0
    assert "where choosy_model.Choosy can be imported, since torch.fx cannot trace it" in capsys.readouterr().out
    assert type(torch.load(tmp_path / "run.pt", weights_only=False)).__name__ == "Choosy"


# ---- bad input


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("gated", ["--to", "xml"], "--to xml: fedsim export writes torch, onnx, safetensors, csv, parquet, netcdf"),
        ("gated", ["--client", "5"], "has no client 5; its clients are 0 to 4"),
        ("gated", ["--client=-1"], "has no client -1"),
        ("plain", ["--client", "3"], "client 3 has no network of its own, since this run gave its clients no gates; leave out --client"),
        ("none", [], "there is no run file"),
        ("gated", ["--out", "RUN"], "the run file itself cannot be written over"),
        ("gated", ["--out", "FOLDER"], "a folder cannot be written over"),
        ("gated", ["--out", "FOLDER/none/model.pt"], "cannot be written: No such file or directory; choose another --out"),
    ],
)
def test_what_cannot_be_written_is_one_message(name, arguments, said, folder, tmp_path, monkeypatch, capsys) -> None:
    path = folder / f"{name}.h5"
    given = [entry.replace("RUN", str(path)).replace("FOLDER", str(tmp_path)) for entry in arguments]
    before = {file.name for file in folder.iterdir()}
    capsys.readouterr()
    assert fedsim(monkeypatch, "export", path, *given) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
    assert {file.name for file in folder.iterdir()} == before


def test_a_run_that_has_not_finished_is_refused(folder, tmp_path) -> None:
    asked = iter(range(1000))
    assert run("gated", "serial", folder, tmp_path / "run.h5", lambda: next(asked) >= 25) == 3
    with pytest.raises(BadInput, match="holds no final model yet: 1 of 3 rounds are done"):
        module_of(tmp_path / "run.h5", 3)


def test_a_client_whose_gates_were_not_kept_is_refused(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("fedsim.simulation.evaluation.GATES_UP_TO", 4)
    out = tmp_path / "run.h5"
    assert run("gated", "serial", folder, out, change={"evaluate": {"every": 1, "clients": 2, "batch": 32}}) == 0
    missing = sorted({0, 1, 2, 3, 4} - set(RunReader(out).gates()[0].tolist()))[0]
    with pytest.raises(BadInput, match=f"holds no network of client {missing}; it has those of the clients "):
        module_of(out, missing)


@pytest.mark.parametrize(("norm_over", "norm", "noted"), [("all", "group", True), ("kept", "group", False), ("all", "none", False)])
def test_norms_that_saw_closed_channels_are_noted(norm_over: str, norm: str, noted: bool, folder) -> None:
    job = check(
        table("gated", "serial", folder) | {"model": {"width": 4, "norm": norm}, "method": {"name": "structured", "norm_over": norm_over}}
    )
    assert ("norms saw the closed channels" in _note(job, {GATE: torch.ones(3)})) == noted
    assert _note(job, {}) == ""
