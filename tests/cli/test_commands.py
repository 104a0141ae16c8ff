"""The command line as a user meets it: exit codes, one message and no traceback, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest
from captured_console import Ended, Fedsim
from small_job import FAKE, small_job

from fedsim.cli import commands
from fedsim.errors import BadInput, ClientFault, Stopped

ROOT = Path(__file__).parents[2]

SMALL = small_job(2, data=FAKE | {"train_images": 120})


@pytest.fixture
def fedsim(fedsim: Fedsim, tmp_path: Path) -> Fedsim:
    """In a folder that holds a small job."""
    (tmp_path / "small.toml").write_text(SMALL)
    return fedsim


# The command line itself


@pytest.mark.parametrize(
    "arguments", [["run"], ["run", "--foo"], ["fly"], ["run", "a.toml", "--resume", "perhaps"], ["sweep", "a.toml", "--processes", "0"]]
)
def test_a_mistyped_command_line_ends_with_2_and_the_usage(refuses: Callable[..., str], arguments: list[str]) -> None:
    assert "Usage: " in refuses(*arguments)


def test_no_command_is_answered_with_the_help(fedsim: Fedsim) -> None:
    ended = fedsim()
    assert ended.code == 2
    assert "estimate" in ended.out


LIGHT = """
import sys
from fedsim.cli import commands
for line in sys.stdin.read().splitlines():
    sys.argv[1:] = line.split()
    try:
        commands.main()
    except SystemExit as end:
        heavy = {"torch", "pandas", "h5py", "scipy", "sklearn", "numba", "numpy", "mpi4py", "torchvision"} & sys.modules.keys()
        print(f"ANSWERED {line}: {end.code} {sorted(heavy)}", file=sys.stderr)
"""
ANSWERED_AT_ONCE = {  # command line -> exit code
    **{
        f"{command} --help": 0
        for command in ("", "run", "sweep", "estimate", "methods", "show", "watch", "export", "compare", "report", "bench")
    },
    **dict.fromkeys(("methods", "methods structured", "--version"), 0),
    **dict.fromkeys(("fly", "run", "run --foo", "run a.toml --resume perhaps", "export a.h5 --to x", "methods fly", "bench fly"), 2),
    **{f"{command} no.toml": 2 for command in ("run", "sweep", "estimate", "bench sparse --job")},
    **{f"{command} no.h5": 2 for command in ("show", "export", "compare", "report")},
    **{f"{command} .": 2 for command in ("show", "export", "run")},
    "run pyproject.toml --set lr": 2,
}


@pytest.mark.processes
def test_help_and_mistyped_commands_are_answered_before_anything_heavy_is_imported() -> None:
    """One process for all of them: what one imports is still there after the next."""
    command = [sys.executable, "-c", LIGHT]
    ended = subprocess.run(command, input="\n".join(ANSWERED_AT_ONCE), capture_output=True, text=True, cwd=ROOT, check=True)
    told = [line for line in ended.stderr.splitlines() if line.startswith("ANSWERED")]
    assert told == [f"ANSWERED {line}: {code} []" for line, code in ANSWERED_AT_ONCE.items()]


@pytest.mark.processes
def test_importing_fedsim_does_not_import_torch() -> None:
    command = [sys.executable, "-c", "import fedsim, sys; print('torch' in sys.modules)"]
    assert subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout == "False\n"


def test_help_names_every_command(fedsim: Fedsim) -> None:
    names = ("run", "sweep", "estimate", "methods", "show", "export", "compare", "bench")
    assert all(command in fedsim("--help").out for command in names)


def test_brackets_in_the_help_are_shown(fedsim: Fedsim) -> None:
    assert "The section [sweep] of a job" in " ".join(fedsim("sweep", "--help").out.replace("│", " ").split())


@pytest.mark.processes
def test_python_m_fedsim_is_the_same_program() -> None:
    ended = subprocess.run([sys.executable, "-m", "fedsim", "run", "no.toml"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (ended.returncode, ended.stderr) == (2, "no.toml: no such job file\n")


def test_methods_are_listed_and_reported_one_by_one(fedsim: Fedsim) -> None:
    listed = fedsim("methods")
    assert listed.code == 0
    assert "fedavg" in listed.out
    assert "fedprox" in listed.out
    assert "McMahan" in fedsim("methods", "fedavg").out


def test_an_unknown_method_or_measurement_is_answered_with_all_there_are(refuses: Callable[..., str]) -> None:
    assert "There are: adp, at_init, dwfnp" in refuses("methods", "fedagv")
    assert "There are: " in refuses("bench", "flight")


def test_the_exit_code_says_how_it_ended(fedsim: Fedsim, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = {BadInput("no"): 2, ClientFault("[rank 1, client 3, round 2, Train.step 0] ValueError: x"): 1, Stopped("time limit"): 3}
    for error, code in ends.items():

        def end(*_: object, error: Exception = error, **__: object) -> int:
            raise error

        monkeypatch.setattr(commands, "app", end)
        assert fedsim("run") == Ended(code, "", f"{error}\n")


def test_ctrl_c_before_anything_has_begun(fedsim: Fedsim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "_load", lambda *_: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a run in this process may have left its own
    assert fedsim("estimate", "small.toml") == Ended(3, "", "stopped\n")
    signal.signal(signal.SIGINT, before)


def test_another_rank_leaves_the_word_to_rank_0(fedsim: Fedsim, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(commands.time, "sleep", waited.append)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "2")
    assert fedsim("run", "no.toml") == Ended(2, "", "[rank 2] no.toml: no such job file\n")
    assert waited == [commands.MESSAGE_PATIENCE]


# Jobs that cannot be, told before anything is computed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "method.hyperlr=1"], "[method] has no field 'hyperlr'. fedavg has no fields of its own"),
        (["--set", "train.epoch=1"], "[train] has no field 'epoch' (did you mean 'epochs'?). [train] has: epochs"),
        (["--set", "train.lr=fast"], '[train] lr = "fast": should be a number'),
        (["--set", "rounds=-1"], "rounds = -1: should be a whole number, at least 1"),
        (["--set", "cohort.size=5"], "[cohort] size = 5 is more than the population; there are 4 clients"),
        (["--set", "model.match='params'", "--set", "model.match_density=0"], "match_density = 0.0: should be above 0 and at most 1"),
        (["--set", "method.name=fedagv"], "did you mean 'fedavg'?"),
        (["--set", "sweep.seed=[0, 1]"], "[sweep] makes 2 runs and `fedsim run` does one: `fedsim sweep small.toml` does all"),
    ],
)
def test_a_wrong_job_is_one_message(refuses: Callable[..., str], arguments: list[str], said: str) -> None:
    message = refuses("run", "small.toml", *arguments)
    assert message.startswith("small.toml")
    assert said in message
    assert message.count("\n") == 1


def test_a_truncated_job_is_reported_with_its_line(refuses: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "cut.toml").write_text(SMALL[: SMALL.index('"iid"') + 3])
    assert "cut.toml, line 10: not valid TOML" in refuses("run", "cut.toml")


FORMER = {  # a --set under a former name -> the answer
    "execution.pack=2": "[execution] has no field 'pack' (it is called 'packs' now)",
    "execution.stacked=matmul": "[execution] has no field 'stacked' (it is called 'packed_conv' now)",
    "execution.memory_share=0.5": "[execution] has no field 'memory_share' (it is called 'gpu_memory_fraction' now)",
    "execution.fleet=graphed": '[execution] fleet = "graphed" (it is called "cuda_graph" now): should be "serial" or "packed" or',
    "partition.least=1": "[partition] has no field 'least' (it is called 'min_images' now)",
    "data.train=100": "[data] has no field 'train' (it is called 'train_images' now)",
    "train.mu=0.1": "[train] has no field 'mu' (it is called 'fedprox_mu' now)",
    "train.nova=samples": "[train] has no field 'nova' (it is called 'fednova_weights' now)",
}
FORMER_OF_METHODS = {
    ("fedtiny", "alpha"): "adjust_fraction",
    ("fedtiny", "stop"): "stop_round",
    ("fedmef", "swap"): "adjust_fraction",
    ("fedmef", "remark"): "remark_every_step",
    ("dwfnp", "keep"): "flops_share",
    ("dwfnp", "keep_client"): "client_flops_share",
    ("structured", "keep"): "flops_share",
    ("feddp", "fall"): "lr_decay_per_epoch",
}


@pytest.mark.parametrize(("setting", "answer"), FORMER.items())
def test_a_former_name_of_a_field_is_answered_with_the_new_one(refuses: Callable[..., str], setting: str, answer: str) -> None:
    message = refuses("run", "small.toml", "--set", setting)
    assert message.startswith(f"small.toml: {answer}")
    assert message.count("\n") == 1


@pytest.mark.parametrize(("method", "field"), FORMER_OF_METHODS)
def test_a_former_name_of_a_field_of_a_method(refuses: Callable[..., str], method: str, field: str) -> None:
    message = refuses("run", "small.toml", "--set", f"method.name={method}", "--set", f"method.{field}=1")
    new = FORMER_OF_METHODS[method, field]
    assert message.startswith(f"small.toml: [method] has no field {field!r} (it is called {new!r} now). {method} has: ")
    assert message.count("\n") == 1


@pytest.mark.parametrize(("former", "new"), commands.FORMER_BENCHES.items())
def test_a_former_name_of_a_bench(refuses: Callable[..., str], former: str, new: str) -> None:
    message = refuses("bench", former)
    assert message.startswith(
        f"fedsim bench {former}: there is no such measurement (it is called {new!r} now). There are: activations, adp"
    )
    assert message.count("\n") == 1


def test_every_bench_is_in_the_help(fedsim: Fedsim) -> None:
    files = {path.stem.replace("_", "-") for path in (ROOT / "fedsim/bench").rglob("*.py") if "def main(" in path.read_text()}
    assert set(commands.BENCHES) == files
    assert all(f"{name}: " in fedsim("bench", "--help").out for name in files)


# Bad input that only the data, the model or the disk can tell


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["data.name='digits'", "data.image_size=8"], "applies to shapes and fake"),
        (["partition.name='classes_per_client'", "partition.classes_per_client=5"], "classes_per_client"),
        (["partition.clients=100"], "clients"),
        (["model.name='resnet19'"], "resnet18"),
        (["model={factory='nowhere:make'}"], "nowhere"),
        (["model={factory='json:dumps'}"], "json:dumps"),
        (["model.name='vgg11'"], "vgg11"),
    ],
)
@pytest.mark.parametrize("command", ["run", "estimate"])
def test_what_data_and_model_refuse(refuses: Callable[..., str], command: str, settings: list[str], said: str) -> None:
    overrides = [argument for setting in settings for argument in ("--set", setting)]
    message = refuses(command, "small.toml", *overrides)
    assert message.startswith("small.toml: ")
    assert said in message


FAKE = '"fake"\nchannels = 1\nimage_size = 8\nclasses = 4\ntrain_images = 120\ntest_images = 40'


def test_a_missing_data_folder_is_reported_with_what_belongs_there(refuses: Callable[..., str], tmp_path: Path) -> None:
    job = SMALL.replace(FAKE, '"cifar10"\nroot = "nowhere"')
    (tmp_path / "cifar.toml").write_text(job)
    message = refuses("run", "cifar.toml")
    assert "nowhere" in message
    assert "cifar" in message


def test_a_data_folder_that_is_a_file_is_reported(refuses: Callable[..., str], tmp_path: Path) -> None:
    job = SMALL.replace(FAKE, '"cifar10"\nroot = "small.toml"')
    (tmp_path / "cifar.toml").write_text(job)
    assert "small.toml" in refuses("run", "cifar.toml")


def test_a_run_file_that_cannot_be_written(refuses: Callable[..., str]) -> None:
    for deep in ("small.toml/run.h5", "small.toml/below/run.h5"):
        said = refuses("run", "small.toml", "--out", deep)
        assert said == f"small.toml: {deep} cannot be written: small.toml is a file, not a folder; choose another --out\n"
    said = refuses("run", "small.toml", "--out", "run.h5", "--set", "execution.scratch=small.toml")
    assert "[execution] scratch = small.toml cannot be written: small.toml is a file, not a folder; choose another folder" in said
    assert "/proc/nowhere/run.h5" in refuses("run", "small.toml", "--out", "/proc/nowhere/run.h5")


def test_a_folder_in_the_place_of_a_run_file(refuses: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    said = refuses("run", "small.toml", "--out", "folder")
    assert said == "small.toml: --out folder is a folder; it must be the file to write, for example folder/small.h5\n"
    for empty in ("", ".", "/"):
        assert "is a folder, not a run file; choose another --out" in refuses("run", "small.toml", "--out", empty)
    assert "folder is a folder; give a run file; there is none in it" in refuses("show", "folder")
    assert "devices 'folder': this is a folder; give a TOML or CSV file" in refuses("devices", "folder")


def test_must_resume_needs_a_run(refuses: Callable[..., str]) -> None:
    assert "run.h5" in refuses("run", "small.toml", "--out", "run.h5", "--resume", "must")


def test_showing_what_is_no_run_file(refuses: Callable[..., str]) -> None:
    assert "no.h5" in refuses("show", "no.h5")
    assert "small.toml" in refuses("show", "small.toml")


# Runs


def test_a_run_ends_with_0_and_is_never_overwritten(fedsim: Fedsim, refuses: Callable[..., str], tmp_path: Path) -> None:
    first = fedsim("run", "small.toml")
    assert first.code == 0, first.err
    path = tmp_path / "runs/small.h5"
    with h5py.File(path, locking=False) as file:
        assert file.attrs["finished"]
        assert file.attrs["rounds"] == 2
    message = refuses("run", "small.toml", "--set", "seed=1")
    assert "runs/small.h5" in message
    assert "--out" in message
    assert "runs/small.h5" in refuses("run", "small.toml", "--resume", "never")
    before = path.read_bytes()
    again = fedsim("run", "small.toml")
    assert (again.code, path.read_bytes() == before) == (0, True)
    assert "finished" in again.out + again.err
    shown = fedsim("show", str(path))
    assert shown.code == 0
    assert "fedavg" in shown.out


def test_a_job_that_differs_in_execution_alone_is_the_same_job(fedsim: Fedsim) -> None:
    assert fedsim("run", "small.toml").code == 0
    assert fedsim("run", "small.toml", "--set", "execution.checkpoint_every=2").code == 0


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_what_was(fedsim: Fedsim, tmp_path: Path) -> None:
    ended = fedsim("run", "small.toml", "--set", "train.lr=1e30", "--set", "model.norm=none", "--set", "rounds=50")
    assert ended.code == 1
    assert "client" in ended.err
    assert "round" in ended.err
    assert "Traceback" not in ended.err
    with h5py.File(tmp_path / "runs/small.h5", locking=False) as file:
        assert 0 <= file.attrs["rounds"] < 50
        assert not file.attrs["finished"]


@pytest.mark.full
@pytest.mark.processes
def test_a_sweep_of_two_jobs_ends_in_one_table(fedsim: Fedsim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "smaller.toml").write_text(SMALL.replace("width = 4", "width = 2"))
    command = ["sweep", "small.toml", "smaller.toml", "--set", "sweep.seed=[0, 1]", "--processes", "1", "--out", "there"]
    first = fedsim(*command)
    assert first.code == 0, first.err
    assert sorted(path.name for path in tmp_path.glob("there/*.h5")) == [f"small{er}-seed{seed}.h5" for er in ("", "er") for seed in (0, 1)]
    table = first.out.split("\n\n")[1]
    assert [line.split()[:3] for line in table.splitlines()] == [["method", "width", "seeds"], ["fedavg", "4", "2"], ["fedavg", "2", "2"]]
    assert table == fedsim("compare", *sorted(map(str, tmp_path.glob("there/*.h5")))).out.split("\n\n")[0]
    monkeypatch.setitem(sys.modules, "fedsim_analysis", None)
    without = fedsim(*command)
    assert without.code == 0
    assert without.out.count("finished already") == 4
    assert "no table: fedsim compare needs the extra `analysis`" in without.out


def test_a_sweep_refuses_before_anything_begins(refuses: Callable[..., str]) -> None:
    assert "two runs would write" in refuses("sweep", "small.toml", "small.toml")
    message = refuses("sweep", "small.toml", "--set", 'sweep.train.lr=[0.1, "fast"]')
    assert message.startswith('small.toml, run small-lrfast of [sweep]: [train] lr = "fast"')


def test_estimate_says_bytes_and_computes_nothing(fedsim: Fedsim, tmp_path: Path) -> None:
    ended = fedsim("estimate", "small.toml")
    assert ended.code == 0, ended.err
    assert "B" in ended.out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("name", "moves"), [("rigl", True), ("feddst", True), ("magnitude", False)])
def test_estimate_says_where_training_decides_what_is_sent(fedsim: Fedsim, name: str, moves: bool) -> None:
    adjusts = ["--set", "method.adjust_every=1"] if moves else []
    ended = fedsim("estimate", "small.toml", "--set", f"method.name='{name}'", "--set", "method.density=0.5", *adjusts)
    assert ended.code == 0, ended.err
    assert ("training decides which weights move" in ended.out) == moves


MINE = """
from dataclasses import dataclass

from torch import nn

from fedsim.methods.fedavg import FedAvg


@dataclass(frozen=True)
class Mine(FedAvg):
    keep: float = 0.8  # kept share


def make(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))
"""


def test_a_method_and_a_model_of_ones_own_are_found_in_the_folder(fedsim: Fedsim, tmp_path: Path) -> None:
    (tmp_path / "my_room.py").write_text(MINE)
    assert "kept share" in fedsim("methods", "my_room:Mine").out
    settings = ["--set", "method.name=my_room:Mine", "--set", "method.keep=0.5", "--set", "model={factory='my_room:make'}"]
    ended = fedsim("run", "small.toml", *settings)
    assert ended.code == 0, ended.err
    assert fedsim("run", "small.toml", *settings).code == 0
    (tmp_path / "my_room.py").write_text(MINE + "# another thought\n")
    ended = fedsim("run", "small.toml", *settings)
    assert ended.code == 2
    assert "was made by other code of my_room:Mine or my_room:make; choose another --out" in ended.err


def test_a_fault_in_round_0_says_that_no_round_was_complete(fedsim: Fedsim, tmp_path: Path) -> None:
    (tmp_path / "falls.py").write_text(
        MINE + "\n\nclass Falls(Mine):\n    def model_of(self, net, sent):\n        raise ZeroDivisionError\n"
    )
    ended = fedsim("run", "small.toml", "--set", "method.name=falls:Falls")
    assert ended.code == 1
    assert "ZeroDivisionError" in ended.err
    assert "no round was complete" in ended.err


def test_compare_takes_folders(fedsim: Fedsim, refuses: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert refuses("compare", "empty").startswith("there is no run file in the folder empty; fedsim compare takes RUN.h5 files")
    for seed in ("0", "1"):
        assert fedsim("run", "small.toml", "--set", f"seed={seed}", "--out", f"both/{seed}.h5").code == 0
    assert fedsim("compare", "both").out == fedsim("compare", "both/0.h5", "both/1.h5").out
    assert "there is no run file in the folder empty" in fedsim("compare", "both", "empty").err


@pytest.mark.skipif(not Path(sys.executable).with_name("mpirun").exists(), reason="needs the extra [mpi]")
@pytest.mark.processes
def test_under_mpirun_one_rank_speaks_and_the_code_is_2(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("mpirun")), "-n", "3", sys.executable, "-m", "fedsim", "run", str(tmp_path / "no.toml")]
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
    crowded = {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **allowed, **crowded}, check=False)
    assert ended.returncode == 2
    assert ended.stderr.count("no such job file") == 1
    assert list(tmp_path.iterdir()) == []
