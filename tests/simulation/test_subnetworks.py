"""Sub-networks of clients: what is recorded of them is what their really smaller networks come to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cases import ROUNDS, images, run, table
from fedsim_analysis import compare
from fedsim_analysis.comparison import readable, tell
from hypothesis import given
from hypothesis import strategies as st

from fedsim import models
from fedsim.config.job import check
from fedsim.core import tree
from fedsim.core.keys import GATE
from fedsim.costs import profile
from fedsim.costs.flops import forward_flops
from fedsim.fleet.charging.bills import Bills
from fedsim.models.settings import ModelSettings
from fedsim.nn import profiler
from fedsim.nn.net import Net
from fedsim.pruning.gates import never_empty
from fedsim.simulation import subnetworks
from fedsim.simulation.experiment import build_experiment
from fedsim.simulation.round_record import row_of
from fedsim.storage.reader import RunReader

SHAPE = (1, 8, 8)
MODELS = {
    "cnn": ModelSettings(name="cnn", width=4),
    "resnet8": ModelSettings(name="resnet8", width=4, norm="group", standardise=True),
    "no norm": ModelSettings(name="cnn", width=4, norm="none"),
}


def made(name: str) -> tuple[Net, profile.ModelProfile]:
    module = models.build(MODELS[name], SHAPE, 10, 0)
    return Net(module), profiler.profile(module, SHAPE)


def drawn(net: Net, clients: int, seed: int = 0) -> torch.Tensor:
    u = torch.rand(clients, net.channels.n, generator=torch.Generator().manual_seed(seed))
    return never_empty(u < 0.5, u, net.channels.widths)


def halved(net: Net) -> Net:
    return net.cut({group.name: torch.arange(group.size // 2 + 1) for group in net.channels.groups})


def flops(net: Net) -> int:
    """Of one image through the module itself."""
    return forward_flops(profiler.profile(net.plain(net.initial), SHAPE))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run file of clients with gates in one folder, "run.h5", beside a plain one."""
    where = tmp_path_factory.mktemp("personal")
    images(where)
    assert run("gated", "serial", where, where / "run.h5") == 0
    assert run("fedavg", "serial", where, where / "plain.h5") == 0
    return where


# ---- figures


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_figures_are_those_of_the_network_that_is_really_cut(name: str, cut: bool) -> None:
    net, model_profile = made(name)
    net = halved(net) if cut else net
    hard = drawn(net, 4)
    rounds, columns = subnetworks.of_clients(net, model_profile, net.initial, hard)
    small = [net.cut(net.channels.kept(gate)) for gate in hard]
    counted = [sum(value.numel() for key, value in one.initial.items() if key.startswith("w/")) for one in small]
    assert columns["parameters"].tolist() == counted
    assert columns["inference_flops"].tolist() == [flops(one) for one in small]
    assert columns["gates_open"].tolist() == pytest.approx([float(gate.float().mean()) for gate in hard])
    assert rounds["client_parameters"] == np.mean(counted)
    assert rounds["client_inference_share"] == pytest.approx(rounds["client_inference_flops"] / forward_flops(model_profile))


@pytest.mark.parametrize("name", MODELS)
def test_a_server_s_model_is_reported_once_it_is_cut_or_gated(name: str) -> None:
    net, model_profile = made(name)
    assert subnetworks.sizes(net, model_profile, net.initial) == {}
    small = halved(net)
    told = subnetworks.sizes(small, model_profile, small.initial)
    count = sum(value.numel() for key, value in small.initial.items() if key.startswith("w/"))
    assert told["parameters"] == count
    assert told["inference_share"] == flops(small) / forward_flops(model_profile)
    assert told["parameters_share"] == count / model_profile.parameters
    gate = net.channels.gate(small.kept)
    assert subnetworks.sizes(net, model_profile, net.initial | {GATE: gate}) == told


def test_a_group_that_is_cut_to_one_channel_counts_as_such() -> None:
    net, model_profile = made("cnn")
    small = net.cut({group.name: torch.arange(1 if group.name == "conv1" else group.size) for group in net.channels.groups})
    assert subnetworks.in_use(small, model_profile, {})["conv1"] == 9
    assert subnetworks.sizes(small, model_profile, small.initial)["inference_share"] == flops(small) / forward_flops(model_profile)


def test_a_row_counts_gates_cuts_and_masks() -> None:
    net, model_profile = made("cnn")
    gate = drawn(net, 1)[0]
    used = {layer.name: layer.weights for layer in model_profile.layers} | net.used({GATE: gate})
    by_gate = row_of(model_profile, Bills(), None, net.initial | {GATE: gate}, {}, {}, net)
    small = net.cut(net.channels.kept(gate))
    by_cut = row_of(model_profile, Bills(), None, small.initial, {}, {}, small)
    for row in (by_gate, by_cut):
        assert row.values["density"] == sum(used.values()) / model_profile.weights
        assert row.values["inference_flops"] == flops(small)
        assert row.layers["density"].tolist() == [used[layer.name] / layer.weights for layer in model_profile.layers]
    masked = {"mask/fc1.weight": torch.arange(4096).view(128, 32) % 4 == 0}
    row, plain = row_of(model_profile, Bills(), None, masked, {}, {}, net), row_of(model_profile, Bills(), None, masked, {}, {})
    assert row.values["density_maskable"] == 0.25
    assert {name for name, value in row.values.items() if value != plain.values[name]} == {"train_loss"}  # not-a-number in both


def test_a_cut_counts_what_it_takes_from_masks() -> None:
    net, model_profile = made("cnn")
    before = {"mask/fc1.weight": torch.arange(4096).view(128, 32) % 4 == 0}
    small = net.cut({group.name: torch.arange(group.size // (2 if group.name == "fc1" else 1)) for group in net.channels.groups})
    row = row_of(model_profile, Bills(), None, net.compact(before, small.kept, removed=False), before, {}, small)
    assert row.layers["pruned"].tolist() == [0, 0, 512, 0]
    assert not row.layers["grown"].any()


@given(st.integers(2, 6), st.integers(0, 99))
def test_overlap_is_the_mean_over_pairs(clients: int, seed: int) -> None:
    hard = torch.rand(clients, 9, generator=torch.Generator().manual_seed(seed)) < 0.5
    hard[:, 0] = True
    sets = [set(gate.nonzero().flatten().tolist()) for gate in hard]
    pairs = [len(a & b) / len(a | b) for i, a in enumerate(sets) for b in sets[:i]]
    assert subnetworks.mean_overlap(hard) == pytest.approx(np.mean(pairs))


def test_of_many_clients_evenly_chosen_ones_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subnetworks, "COMPARED_UP_TO", 3)
    hard = torch.eye(7).bool()
    hard[[0, 3, 6]] = torch.tensor([[1, 1, 0, 0, 0, 0, 0]] * 3).bool()
    assert subnetworks.mean_overlap(hard) == 1


def test_one_client_overlaps_with_nobody() -> None:
    net, model_profile = made("cnn")
    assert "client_overlap" not in subnetworks.of_clients(net, model_profile, {}, drawn(net, 1))[0]


# ---- on record


def test_a_run_records_every_evaluated_client(folder: Path) -> None:
    reader = RunReader(folder / "run.h5")
    job = check(table("gated", "serial", folder))
    parts = build_experiment(job)
    for r, cut in ((1, False), (ROUNDS, True)):
        net = parts.setting.net
        if cut:
            index = {key[6:]: value for key, value in reader.model().items() if key.startswith("index/")}
            net = net.cut(index)
        ids, hard = reader.gates(r)
        assert ids.tolist() == [0, 1, 2, 3, 4]
        assert reader.groups(r) == {group.name: group.size for group in net.channels.groups}
        rounds, columns = subnetworks.of_clients(net, parts.model_profile, {}, torch.from_numpy(hard))
        for name, values in columns.items():
            assert reader.clients(name, r).tolist() == values.tolist()
        for name, value in rounds.items():
            assert reader.column(name)[r] == value
        accuracy = reader.clients("accuracy", r)
        assert reader.column("worst_client")[r] == np.flatnonzero(accuracy == accuracy.min())[0]


def test_a_run_without_gates_records_nothing_new(folder: Path) -> None:
    reader = RunReader(folder / "plain.h5")
    new = {"inference_share", "parameters", "parameters_share", "gates_open", "inference_flops"}
    assert not new & set(reader.names("clients"))
    assert not (new - {"inference_flops"}) & set(reader.names())
    assert not {name for name in reader.names() if name in ("client_overlap", "worst_client", "client_parameters")}
    assert not [key for key in reader.model() if key.startswith(("index/", "gate/"))]


def test_the_final_weights_are_small_and_hashed_with_their_places(folder: Path) -> None:
    reader = RunReader(folder / "run.h5")
    model = reader.model()
    assert model["w/conv2.weight"].shape == (6, 3, 3, 3)
    assert {key: len(value) for key, value in model.items() if key.startswith("index/")} == {
        "index/conv1": 3,
        "index/conv2": 6,
        "index/fc1": 96,
    }
    assert tree.sha256_of(model) == reader.attributes["weights_sha256"]
    assert reader.column("inference_share")[-1] == reader.column("inference_flops")[-1] / reader.column("inference_flops")[0]


def test_the_gates_of_all_clients_with_images_are_there_at_the_end(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where fewer are evaluated, and where they are asked for in blocks."""
    monkeypatch.setattr("fedsim.simulation.evaluation.BLOCK", 2)
    out = tmp_path / "run.h5"
    assert run("gated", "serial", folder, out, change={"evaluate": {"every": 2, "clients": 2, "batch": 32}}) == 0
    mine, whole = RunReader(out), RunReader(folder / "run.h5")
    assert mine.gates(ROUNDS)[0].size == 2
    assert mine.gates()[0].tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(mine.gates()[1], whole.gates(ROUNDS)[1])


def test_of_too_many_clients_the_evaluated_ones_alone_are_kept(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.simulation.evaluation.GATES_UP_TO", 4)
    out = tmp_path / "run.h5"
    assert run("gated", "serial", folder, out, change={"evaluate": {"every": 1, "clients": 3, "batch": 32}}) == 0
    assert RunReader(out).gates()[0].tolist() == RunReader(out).gates(ROUNDS)[0].tolist()
    assert RunReader(out).gates()[0].size == 3


# ---- compared


def test_runs_with_sub_networks_are_compared_by_their_clients(folder: Path) -> None:
    both = compare([folder / "run.h5", folder / "plain.h5"])
    shown = readable(both)
    reader = RunReader(folder / "run.h5")
    first = shown[shown["method"] == "toys:Gated"].iloc[0]
    assert first["clients"] == f"{100 * reader.column('client_accuracy_macro')[-1]:.1f} %"
    assert first["lowest"] == f"{100 * reader.column('client_accuracy_min')[-1]:.1f} %"
    assert first["their FLOPs"] == f"{100 * reader.column('client_inference_share')[-1]:.1f} %"
    assert shown[shown["method"] == "fedavg"].iloc[0]["their FLOPs"] == "-"
    assert "lowest: " in tell(both)


def test_runs_without_sub_networks_are_compared_as_ever(folder: Path) -> None:
    plain = compare([folder / "plain.h5"])
    assert not {"clients", "lowest", "their FLOPs"} & set(readable(plain))
    assert "lowest: " not in tell(plain)
