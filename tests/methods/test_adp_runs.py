"""ADP through the command line: what a run records is what the exported networks do; stopped in its last round it goes on as it was."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from adp_federation import coloured
from cases import images, run
from torch import Tensor, nn

from fedsim.cli import commands
from fedsim.config.job import check
from fedsim.data.population import Population, populate
from fedsim.simulation.launchers import ranks
from fedsim.storage import checkpoint
from fedsim.storage.reader import RunReader

CLIENTS = 4
JOB = """
rounds = 8
[data]
name = "file"
path = "colours.h5"
[partition]
name = "natural"
clients = 0
min_images = 1
[cohort]
size = 3
[model]
width = 4
norm = "group"
gate_keep = 0.5
[train]
steps = 2
batch = 20
lr = 0.1
momentum = 0.9
[evaluate]
every = 8
[execution]
plan = "reference"
device = "cpu"
[method]
name = "adp"
"""
FORMS = {
    "live": [],
    "folded": ["method.export_gate=folded", "method.align=3"],
    "global": ["method.export=global"],
    "dynamic": ["method.export=none"],
    "personal": ["method.personalise=1"],
}
OUTSIDE = """
import sys
sys.modules["fedsim"] = None
import torch
module, x = torch.load(sys.argv[1], weights_only=False), torch.load(sys.argv[2])
assert not module.training
with torch.no_grad():
    torch.save(module(x), sys.argv[3])
"""


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


class Shell:
    """The console script in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "job.toml").write_text(JOB)
        with h5py.File(folder / "colours.h5", "w") as file:
            for ending, n, seed in (("", 60, 0), ("_test", 50, 1)):
                x, y, owners = coloured(n, seed)
                file[f"x{ending}"], file[f"y{ending}"] = x.numpy(), y.numpy()
                file[f"client{ending}"] = 2 * owners.numpy() + np.arange(2 * n) // (n - 20) % 2  # two red clients and two blue ones

    def __call__(self, capture: pytest.CaptureFixture[str] | None, *arguments: str) -> Ended:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            for name in ranks.RANK:
                patch.delenv(name, raising=False)
            patch.setattr(sys, "argv", ["fedsim", *arguments])
            if capture:
                capture.readouterr()
            with pytest.raises(SystemExit) as ended:
                commands.main()
            out, err = capture.readouterr() if capture else ("", "")
        return Ended(int(ended.value.code or 0), out, err)


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A finished run of each of FORMS."""
    made = Shell(tmp_path_factory.mktemp("adp"))
    for name, settings in FORMS.items():
        changed = [argument for setting in settings for argument in ("--set", setting)]
        assert made(None, "run", "job.toml", *changed, "--out", f"{name}.h5").code == 0, name
    return made


@pytest.fixture(scope="module")
def people(shell: Shell) -> Population:
    job = check(tomllib.loads(JOB.replace("colours.h5", str(shell.folder / "colours.h5"))))
    return populate(job.data, job.partition, job.seed)


def exported(shell: Shell, name: str, client: int | None = None) -> nn.Module:
    own = [] if client is None else ["--client", str(client)]
    assert shell(None, "export", f"{name}.h5", *own, "--out", "model.pt").code == 0
    return torch.load(shell.folder / "model.pt", weights_only=False)


def images_of(people: Population, client: int | None = None) -> tuple[Tensor, Tensor]:
    """A client's test images and labels, or all there are."""
    data = people.test
    index = torch.arange(len(data)) if client is None else torch.from_numpy(people.shards["test"].of(client))
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (data.mean, data.std))
    return (data.images(index).float() / 255 - mean) / std, data.labels(index)


def share(module: nn.Module, people: Population, client: int | None = None) -> float:
    x, y = images_of(people, client)
    with torch.no_grad():
        return float((module(x).argmax(1) == y).double().mean())


def selecting(module: nn.Module) -> bool:
    """Whether it chooses the largest gates of an image."""
    return any("topk" in str(node.target) for node in module.graph.nodes)


@pytest.mark.parametrize("name", ["live", "folded"])
def test_clients_networks_are_as_accurate_as_recorded(name, shell, people) -> None:
    reader = RunReader(shell.folder / f"{name}.h5")
    modules = [exported(shell, name, k) for k in range(CLIENTS)]
    own = [share(module, people, k) for k, module in enumerate(modules)]
    everywhere = [share(module, people) for module in modules]
    assert reader.clients("accuracy")[-1].tolist() == own
    assert reader.clients("global_accuracy")[-1].tolist() == everywhere
    assert reader.column("client_global_accuracy")[-1] == pytest.approx(np.mean(everywhere), abs=1e-12)
    assert np.isnan(reader.column("client_global_accuracy")[:-1]).all()
    assert reader.column("client_accuracy_macro")[-1] == pytest.approx(np.mean(own))
    sizes = people.shards["test"].sizes()
    assert reader.column("client_accuracy")[-1] == pytest.approx((np.array(own) * sizes).sum() / sizes.sum())
    assert len(set(everywhere)) > 1
    widths = {"live": (2, 4), "folded": (3, 6)}[name]
    for module in modules:
        assert not selecting(module)
        convs = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
        assert tuple(conv.out_channels for conv in convs) == widths
        assert any("gate" in key for key in module.state_dict()) == (name != "folded")


@pytest.mark.parametrize("name", ["live", "global", "dynamic", "personal"])
def test_the_network_of_all_is_as_accurate_as_recorded(name, shell, people) -> None:
    reader, module = RunReader(shell.folder / f"{name}.h5"), exported(shell, name)
    assert share(module, people) == reader.column("accuracy")[-1]
    assert selecting(module) == (name != "global")
    own = [share(module, people, k) for k in range(CLIENTS)]
    if name in ("global", "dynamic"):
        assert reader.clients("accuracy")[-1].tolist() == own
    else:
        assert reader.clients("gated_accuracy")[-1].tolist() == own
        assert reader.column("gated_accuracy")[-1] == reader.column("accuracy")[-1]
        right = sum(value * n for value, n in zip(own, people.shards["test"].sizes(), strict=True))
        assert reader.column("gated_client_accuracy")[-1] == pytest.approx(right / len(people.test))
        assert reader.column("gated_client_accuracy_min")[-1] == min(own)
        assert np.isnan(reader.column("gated_client_accuracy")[:-1]).all()


def test_forms_of_use_are_recorded_where_they_differ(shell) -> None:
    names = {
        name: {column for column in RunReader(shell.folder / f"{name}.h5").names() if column.endswith("_client_accuracy")} for name in FORMS
    }
    both = {"gated_client_accuracy", "personal_client_accuracy"}
    assert names == {name: both if name == "personal" else set() if name == "dynamic" else {"gated_client_accuracy"} for name in FORMS}


def test_one_training_serves_all_forms(shell) -> None:
    """What is exported, and how, changes no weight, and the network with its gates does what it does anywhere."""
    runs = {name: RunReader(shell.folder / f"{name}.h5") for name in FORMS}
    first = {key: value for key, value in runs["dynamic"].model().items() if key.startswith(("w/", "buf/"))}
    for name, reader in runs.items():
        model = reader.model()
        assert all(torch.equal(value, model[key]) for key, value in first.items()), name
        column = "client_accuracy" if name == "dynamic" else "gated_client_accuracy"
        assert reader.column(column)[-1] == runs["dynamic"].column("client_accuracy")[-1]


@pytest.mark.parametrize("name", ["personal", "local"])
def test_a_network_that_is_not_in_the_run_file_is_not_exported(name, shell, folder, capfd) -> None:
    path = folder / "whole.h5" if name == "local" else shell.folder / "personal.h5"
    ended = shell(capfd, "export", str(path), "--client", "1", "--out", "none.pt")
    assert ended.code == 2
    assert "of their own" in ended.err
    assert not (shell.folder / "none.pt").exists()


@pytest.mark.processes
def test_it_runs_without_fedsim(shell, people, tmp_path) -> None:
    module, x = exported(shell, "live", 2), images_of(people, 2)[0]
    torch.save(x, tmp_path / "x.pt")
    command = [sys.executable, "-I", "-c", OUTSIDE, str(shell.folder / "model.pt"), str(tmp_path / "x.pt"), str(tmp_path / "y.pt")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "y.pt"), module(x))


def test_show_tells_forms_and_shares(shell, capfd) -> None:
    shown = shell(capfd, "show", "personal.h5")
    reader = RunReader(shell.folder / "personal.h5")
    assert shown.code == 0
    text = " ".join(shown.out.split())
    for column in ("client_accuracy", "gated_client_accuracy", "personal_client_accuracy", "client_global_accuracy"):
        assert f"{100 * reader.column(column)[-1]:.1f}%" in text, column
    for column in ("active_share", "export_share", "varying_share"):
        assert f"{100 * reader.column(column)[-1]:.1f}%" in text, column


# ---- stopped


@pytest.mark.parametrize("name", FORMS)
def test_every_column_says_what_it_is(shell, name) -> None:
    with h5py.File(shell.folder / f"{name}.h5") as file:
        for group in ("rounds", "clients"):
            scales = ("round", "client")
            assert not [column for column in file[group] if column not in scales and not file[group][column].attrs["long_name"]]
        assert file["rounds/deploy_flops"].attrs["units"] == "FLOP"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("stopped")
    images(where)
    assert run("adp", "serial", where, where / "whole.h5", change=STOPPED) == 0
    return where


STOPPED = {
    "rounds": 2,
    "method": {"name": "adp", "gates": "local", "bn": "local", "export_gate": "folded", "personalise": 1},
    "train": {"epochs": 1, "batch": 10, "lr": 0.05, "momentum": 0.9, "aggregate": "scaffold"},
}


@pytest.mark.parametrize("after", [1, 5, 7, 14])  # questions of the last round: training has four packs, measuring four, then evaluation
def test_stopped_in_its_last_round_it_resumes_to_the_same(after, folder, tmp_path) -> None:
    out, asked = tmp_path / "run.h5", iter(range(1, 1000))

    def stopped() -> bool:
        return (checkpoint.folder_of(out) / "000001.json").exists() and next(asked) >= after

    assert run("adp", "serial", folder, out, stopped, change=STOPPED) == 3
    assert RunReader(out).rounds == 1
    assert run("adp", "serial", folder, out, change=STOPPED) == 0
    mine, whole = RunReader(out), RunReader(folder / "whole.h5")
    assert mine.attributes["weights_sha256"] == whole.attributes["weights_sha256"]
    assert np.array_equal(mine.gates()[1], whole.gates()[1])
    for name in ("accuracy", "global_accuracy", "gated_accuracy", "personal_accuracy", "bytes_up", "train_flops"):
        assert np.array_equal(mine.clients(name), whole.clients(name), equal_nan=True), name
    for name in ("active_share", "varying_share", "export_share", "train_loss", "bytes_down"):
        assert np.array_equal(mine.column(name), whole.column(name), equal_nan=True), name
