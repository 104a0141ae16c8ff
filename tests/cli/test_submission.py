"""`fedsim submit` where there is no SLURM: dry runs, and what is refused."""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from small_job import small_job

import fedsim
from fedsim.cli import submission
from fedsim.config import job as jobs
from fedsim.errors import BadInput
from fedsim.methods.fedavg import FedAvg

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def submit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Calls the command in an empty folder, with a PATH that has no SLURM; the exit code, the output and the notes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "job.toml").write_text(small_job(2))
    (tmp_path / "sweep.toml").write_text(small_job(2, sweep={"seed": [0, 1, 2], "train.lr": [0.1, 0.2]}))
    app = typer.Typer()
    submission.add(app)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = app(list(arguments), standalone_mode=False)
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_dry_run_prints_the_text_and_writes_nothing(submit: Call, tmp_path: Path) -> None:
    before = files(tmp_path)
    code, text, notes = submit("sweep.toml", "--dry-run", "--array", "1-4%2", "--set", "rounds=3", "--threads", "2")
    assert (code, files(tmp_path)) == (0, before)
    assert text.startswith("#!/bin/bash\n")
    assert "\n#SBATCH --job-name=sweep\n" in text
    assert "\n#SBATCH --cpus-per-task=2\n" in text
    assert "\n#SBATCH --array=0-3%2\n" in text
    assert notes == f"would be submitted: 4 runs, {tmp_path}/runs/slurm/array-0.sbatch\n"


def test_python_makes_the_same_text(submit: Call, tmp_path: Path) -> None:
    _, text, _ = submit("job.toml", "--dry-run", "--gpus", "2", "--ranks-per-gpu", "2", "--time", "2-12", "--out", "results")
    made = fedsim.submit("job.toml", out="results", gpus=2, ranks_per_gpu=2, time="2-12", dry_run=True)
    assert isinstance(made, fedsim.Submission)
    assert (made.texts, made.job_ids, made.run_files, dict(made.skipped)) == ([text], [], [Path("results/job.h5")], {})
    assert "\n#SBATCH --ntasks=5\n" in text
    with pytest.raises(BadInput, match="there is no option node"):
        fedsim.submit("job.toml", node=2)
    with pytest.raises(BadInput, match=r"fedsim\.submit needs at least one job"):
        fedsim.submit([])


def test_several_jobs_become_one_array(submit: Call, tmp_path: Path) -> None:
    made = fedsim.submit(["job.toml", "sweep.toml"], dry_run=True)
    assert len(made.texts) == 1
    assert "\n#SBATCH --array=0-6\n" in made.texts[0]
    assert "\n#SBATCH --job-name=runs\n" in made.texts[0]


def test_without_sbatch_there_is_one_message(submit: Call, tmp_path: Path) -> None:
    before = files(tmp_path)
    with pytest.raises(BadInput, match="there is no sbatch on this machine: call `fedsim submit` on a login node"):
        submit("job.toml")
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["job.toml", "--node", "2"], "there is no option --node. The options of a submission and their defaults:\n  --nodes = 1: "),
        (["job.toml", "--ranks-per-gpus=2"], "there is no option --ranks-per-gpus. "),
        (["job.toml", "--nodes", "0"], "--nodes = 0: should be a whole number, at least 1"),
        (["job.toml", "--array", "1"], "array '1': there is no run 1; there is one run, 0"),
        (["jobs.toml"], "jobs.toml: no such job file; did you mean job.toml or sweep.toml?"),
        (["job.toml", "--set", "train.rl=1"], "[train] has no field 'rl'"),
        (["job.toml", "job.toml"], "two runs would write runs/job.h5"),
        ([], "fedsim submit takes JOB.toml files, or --status FOLDER"),
        (["job.toml", "--resubmit"], "--resubmit goes with --status FOLDER"),
        (["job.toml", "--status", "runs"], "--status FOLDER takes no job files"),
        (["--status", "runs", "--nodes", "2"], "--nodes is for a submission"),
        (["--status", "."], "nothing was submitted into .: it has no slurm/runs.txt"),
        (["job.toml", "--dry-run", "--out", "a\\b"], "SLURM cannot write the output of jobs into a folder with a \\ in its name"),
    ],
)
def test_what_is_wrong_is_said_at_once(submit: Call, tmp_path: Path, arguments: list[str], why: str) -> None:
    before = files(tmp_path)
    with pytest.raises(BadInput) as error:
        submit(*arguments, *(["--dry-run"] if "--dry-run" not in arguments else []))
    assert why in str(error.value)
    assert files(tmp_path) == before


def test_a_site_gives_defaults(submit: Call, tmp_path: Path) -> None:
    (tmp_path / "config" / "fedsim").mkdir(parents=True)
    (tmp_path / "config" / "fedsim" / "slurm.toml").write_text('partition = "cpu"\nranks = 8\nmodules = "openmpi"\n')
    _, text, _ = submit("job.toml", "--dry-run", "--ranks", "4")
    assert "\n#SBATCH --partition=cpu\n" in text
    assert "\nmodule load openmpi || exit 2\n" in text
    assert ' --out "$out" --ranks 4\n' in text


def test_a_virtual_environment_that_is_not_there_is_named(submit: Call, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=f"venv {tmp_path}: there is no {tmp_path}/bin/fedsim"):
        fedsim.submit("job.toml", venv=str(tmp_path), dry_run=True)


def test_a_method_of_the_script_itself_is_refused(submit: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "Mine", FedAvg, raising=False)
    with pytest.raises(BadInput, match=r"write it to a file, such as mine\.py, and name it mine:Mine"):
        fedsim.submit("job.toml", set={"method": {"name": "__main__:Mine"}}, dry_run=True)


def test_a_resolved_job_is_the_same_job() -> None:
    """What a submission writes for each run: read again, it computes the same."""
    for file in sorted((Path(__file__).parents[2] / "jobs").glob("*.toml")):
        for run in jobs.runs(jobs.load(file))[:2]:
            again = jobs.check(tomllib.loads(jobs.resolved(run)), run.name)
            assert (jobs.identity(again), again.name, again.execution) == (jobs.identity(run), run.name, run.execution)


def test_a_submitted_folder_is_named_as_the_shell_names_it(submit: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other nodes may know a folder by the name of a link alone."""
    (tmp_path / "real").mkdir()
    (tmp_path / "home").symlink_to("real")
    (tmp_path / "real" / "job.toml").write_text(small_job(2))
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.setenv("PWD", str(tmp_path / "home"))
    assert f"\n#SBATCH --chdir={tmp_path}/home\n" in submit("job.toml", "--dry-run")[1]
    monkeypatch.setenv("PWD", "/")
    assert f"\n#SBATCH --chdir={os.path.realpath(tmp_path)}/real\n" in submit("job.toml", "--dry-run")[1]


def test_every_option_that_a_message_names_is_an_option_of_the_command(submit: Call, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as error:
        submit("job.toml", "--node", "2")
    named = {line.split()[0] for line in str(error.value).splitlines()[1:]}
    app = typer.Typer()
    submission.add(app)
    assert named <= {option for parameter in typer.main.get_command(app).params for option in parameter.opts}
    _, text, _ = submit("job.toml", "--dry-run", "--time", "1", "--warning", "20", "--venv", sys.prefix, "--scratch", "/local")
    assert "\n#SBATCH --signal=B:USR1@20\n" in text
    with pytest.raises(BadInput, match="a longer --time or a smaller --warning is needed"):
        submit("job.toml", "--dry-run", "--time", "1")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("runs", "--set", "rounds=3", "--resubmit"), "--set changes a job; --status FOLDER knows the jobs as they were submitted"),
        (("runs", "--out", "other", "--resubmit"), "--out other: --status FOLDER names the folder itself"),
        (("runs",), "--status runs: there is no such folder; name the folder of --out"),
        (("job.toml",), "--status job.toml: it is a file; name the folder of --out"),
    ],
)
def test_what_a_status_cannot_use_is_refused(submit: Call, words: tuple[str, ...], why: str) -> None:
    with pytest.raises(BadInput, match=why):
        submit("--status", *words)
