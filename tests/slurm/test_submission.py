"""`fedsim submit` on a real SLURM of two nodes whose arrays have three tasks at most: a sweep, of which a run fails, and its status."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from cluster import Cluster, missing, started, until
from small_job import small_job
from submitted import attributes

import fedsim
from fedsim.cli import submission
from fedsim.errors import BadInput
from fedsim.slurm.batch import restarts
from fedsim.slurm.batch.restarts import Restart

METHOD = '''
"""Federated averaging that waits in round 1 while there is a file `hold`, and fails with seed 0 while there is a file `fail`."""

import time
from dataclasses import dataclass
from pathlib import Path

from fedsim.methods.fedavg import FedAvg


@dataclass(frozen=True)
class Held(FedAvg):
    def round(self, setting, state, fleet, r):
        if setting.seed == 0 and Path("fail").exists():
            raise ValueError("seed 0 is not \\x1b[31mwanted")
        while r == 1 and Path("hold").exists():
            time.sleep(0.05)
        return super().round(setting, state, fleet, r)
'''
RUNS = [f"job-seed{seed}" for seed in range(4)]


@pytest.fixture(scope="module")
def small_arrays(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster with small arrays."""
    if lacking := missing():
        pytest.skip(f"no real SLURM here, {', '.join(lacking)} missing; on Debian: apt install slurmctld slurmd slurm-client munge")
    with started(tmp_path_factory.mktemp("slurm"), MaxArraySize=3) as cluster:
        yield cluster


@dataclass(frozen=True)
class Site:
    """A working folder of a user of the cluster."""

    cluster: Cluster
    folder: Path
    capsys: pytest.CaptureFixture[str]

    def submit(self, *arguments: str) -> tuple[int, list[str], list[str]]:
        """The exit code of `fedsim submit`, and the lines that it prints, to its output and as notes."""
        app = typer.Typer()
        submission.add(app)
        self.capsys.readouterr()
        code = app(list(arguments), standalone_mode=False)
        said = self.capsys.readouterr()
        return code, said.out.splitlines(), said.err.splitlines()

    def state(self, name: str) -> str:
        """What the status says of a run."""
        return self.states()[name]

    def states(self) -> dict[str, str]:
        _, lines, _ = self.submit("--status", "runs")
        return {name: line.split(None, 1)[1].split("  ")[0].strip() for line in lines[1:] if (name := line.split()[0]) in RUNS}

    def squeue(self) -> dict[str, str]:
        """The states of all jobs by their names, as SLURM itself gives them."""
        shown = self.cluster.call("squeue", "--noheader", "--array", "--states=all", "--format=%F_%K %T")
        return dict(line.split() for line in shown.splitlines())


@pytest.fixture
def site(small_arrays: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Site:
    for name, value in small_arrays.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    folder = tmp_path / "the user's work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    return Site(small_arrays, folder, capsys)


def until_state(site: Site, name: str, state: str) -> None:
    until(lambda: site.state(name) == state, 120, site.cluster.logs)


def test_a_sweep_is_submitted_watched_and_what_failed_is_submitted_again(site: Site) -> None:
    (site.folder / "mine.py").write_text(METHOD)
    (site.folder / "job.toml").write_text(small_job(2, method={"name": "mine:Held"}, sweep={"seed": [0, 1, 2, 3]}))
    (site.folder / "hold").touch()
    (site.folder / "fail").touch()

    code, text, notes = site.submit("job.toml", "--launcher", "none", "--array", "%2", "--time", "10")
    assert code == 0
    assert [line for line in text if line.startswith("#SBATCH --array")] == ["#SBATCH --array=0-2%1", "#SBATCH --array=0%1"]
    slurm = site.folder / "runs" / "slurm"
    assert "\n".join(text) == "\n\n".join((slurm / f"array-{number}.sbatch").read_text().rstrip() for number in (0, 1))
    first, second = (note.split()[1].rstrip(":") for note in notes[:2])

    until_state(site, RUNS[0], "failed")
    until_state(site, RUNS[1], "running")
    until_state(site, RUNS[3], "running")
    code, lines, _ = site.submit("--status", "runs")
    assert (code, lines[0]) == (1, "2 running, 1 waiting, 1 failed")
    states = site.squeue()
    assert states == {f"{first}_0": "FAILED", f"{first}_1": "RUNNING", f"{first}_2": "PENDING", f"{second}_0": "RUNNING"}
    failed, running, waiting = (" ".join(line.split()) for line in lines[1:4])
    assert failed.startswith(f"{RUNS[0]} failed job {first}_0 on one: FAILED, exit code 1; ")
    assert failed.endswith(r"ValueError: seed 0 is not \x1b[31mwanted")
    assert running.startswith(f"{RUNS[1]} running job {first}_1 on ")
    assert "; round 0/2; " in running
    assert waiting == f"{RUNS[2]} waiting job {first}_2 (JobArrayTaskLimit)"
    assert lines[-1] == "`fedsim submit --status runs --resubmit` submits 1 run again"

    code, text, notes = site.submit("job.toml", "--launcher", "none", "--array", "1-3")
    assert (code, text, notes[-1]) == (0, [], "nothing is left to submit")
    assert notes[1] == f"{RUNS[2]} is left out: it waits as job {first}_2"

    (site.folder / "fail").unlink()
    code, _, notes = site.submit("--status", "runs", "--resubmit")
    assert code == 0
    assert notes[0].split(": ")[1:] == [f"1 run, {slurm / RUNS[0]}.sbatch"]
    (site.folder / "hold").unlink()
    swept = site.folder / "swept"
    fedsim.sweep("job.toml", out=swept, processes=1, progress=False)
    until(lambda: set(site.states().values()) == {"done"}, 180, site.cluster.logs)
    assert site.submit("--status", "runs")[0] == 0
    assert len(site.squeue()) == 5  # no other run was submitted a second time
    hashes = [attributes(site.folder / "runs" / f"{name}.h5")["weights_sha256"] for name in RUNS]
    assert hashes == [attributes(swept / f"{name}.h5")["weights_sha256"] for name in RUNS]
    assert len(set(hashes)) == 4


def held(site: Site, *arguments: str) -> str:
    """Submits a run that SLURM keeps waiting; the number of its job."""
    (site.folder / "job.toml").write_text(small_job(2))
    code, _, notes = site.submit("job.toml", "--sbatch", "--hold", *arguments)
    assert code == 0
    return notes[0].split()[1].rstrip(":")


def status(site: Site) -> str:
    """The line of the only run."""
    code, lines, _ = site.submit("--status", "runs")
    assert code in (1, 3)
    return " ".join(lines[1].split())


def test_a_run_that_waits_is_submitted_once_and_as_one_job(site: Site) -> None:
    job = held(site)
    assert status(site) == f"job waiting job {job} (JobHeldUser)"
    restarts.write(Path("runs/job.h5"), [Restart(job, "2026-01-02T03:04:05+00:00", -1, "preempted")] * 2)
    assert status(site) == f"job requeued job {job} (JobHeldUser); requeued 2 times"
    again = site.submit("job.toml")
    assert (again[0], again[2]) == (0, [f"job is left out: it waits as job {job}", "nothing is left to submit"])
    with pytest.raises(BadInput, match=r"job waits or runs in SLURM as another job \(there rounds = 2, here 3\)"):
        site.submit("job.toml", "--set", "rounds=3")
    site.cluster.call("scancel", job)
    assert status(site) == f"job stopped job {job}: CANCELLED"
    code, text, notes = site.submit("--status", "runs", "--resubmit", "--dry-run", "--time", "20")
    assert code == 0
    assert {"#SBATCH --time=20", "#SBATCH --hold", "#SBATCH --job-name=job"} <= set(text)
    assert notes == [f"would be submitted: 1 run, {site.folder}/runs/slurm/job.sbatch"]
    assert status(site) == f"job stopped job {job}: CANCELLED"
    assert site.submit("--status", "runs", "--resubmit", "--ranks", "2")[0] == 0
    (again_job,) = (job for job, state in site.squeue().items() if state == "PENDING")
    assert status(site) == f"job waiting job {again_job.partition('_')[0]} (JobHeldUser)"
    assert "#SBATCH --ntasks=2" in (site.folder / "runs" / "slurm" / "job.sbatch").read_text()
    site.cluster.call("scancel", again_job.partition("_")[0])


def test_a_job_whose_number_was_not_noted_is_found_by_its_text(site: Site) -> None:
    """As after a kill of `fedsim submit` between the answer of sbatch and the note."""
    job = held(site)
    ledger = site.folder / "runs" / "slurm" / "submitted.json"
    table = json.loads(ledger.read_text())
    table["submissions"][0]["job"] = ""
    ledger.write_text(json.dumps(table))
    assert status(site) == f"job waiting job {job} (JobHeldUser)"
    assert site.submit("job.toml")[2][0] == f"job is left out: it waits as job {job}"
    site.cluster.call("scancel", job)


def test_a_job_that_slurm_no_longer_knows_is_lost_with_its_last_words(site: Site) -> None:
    job = held(site)
    site.cluster.call("scancel", job)
    slurm = site.folder / "runs" / "slurm"
    table = json.loads((slurm / "submitted.json").read_text())
    table["submissions"][0]["job"] = "4711"
    (slurm / "submitted.json").write_text(json.dumps(table))
    (slurm / "log" / "job-4711.out").write_text(
        "disk quota exceeded \x1b]0;x\x07\n\n-----\nslurmstepd: error: *** JOB 4711 CANCELLED ***\n"
    )
    assert status(site) == r"job lost SLURM no longer knows job 4711; disk quota exceeded \x1b]0;x\x07"
    assert site.submit("--status", "runs")[0] == 1


def test_where_slurm_does_not_answer_files_alone_speak(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    job = held(site)
    site.cluster.call("scancel", job)
    monkeypatch.setenv("PATH", str(site.folder))
    _, lines, _ = site.submit("--status", "runs")
    assert lines[:2] == ["1 unknown", "SLURM does not answer (there is no squeue on this machine); what follows is from files alone"]
    assert lines[2].split() == ["job", "unknown", "job", job]
    with pytest.raises(BadInput, match="which runs wait or run cannot be seen"):
        site.submit("--status", "runs", "--resubmit")


@pytest.mark.full
def test_a_run_of_three_ranks_on_two_nodes_has_the_weights_of_one_process(site: Site) -> None:
    (site.folder / "job.toml").write_text(small_job(2))
    assert site.submit("job.toml", "--nodes", "2", "--time", "10")[0] == 0
    alone = fedsim.run("job.toml", out="alone.h5", progress=False)
    until(lambda: site.submit("--status", "runs")[0] == 0, 180, site.cluster.logs)
    run = attributes(site.folder / "runs" / "job.h5")
    assert (run["ranks"], run["weights_sha256"].decode()) == (3, alone.attributes["weights_sha256"])


@pytest.mark.full
def test_what_was_submitted_before_a_refusal_stays_known(
    tmp_path: Path, site: Site, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With MaxJobCount, for which sbatch tries again for two minutes."""
    with started(tmp_path_factory.mktemp("few"), MaxArraySize=3, MaxJobCount=4) as few:
        monkeypatch.setenv("SLURM_CONF", few.environment["SLURM_CONF"])
        (site.folder / "job.toml").write_text(small_job(2, sweep={"seed": [0, 1, 2, 3, 4]}))
        code, _, notes = site.submit("job.toml", "--sbatch", "--hold")
        assert code == 1
        assert notes[-1] == "3 of 5 runs are submitted (job 1); the same command submits the rest later"
        _, lines, _ = site.submit("--status", "runs")
        assert lines[0] == "3 waiting, 2 not submitted"
        few.call("scancel", "1_0", "1_1")
        few.call("scancel", "1_2")


def test_what_slurm_refuses_is_said_in_its_words_and_not_noted(site: Site) -> None:
    (site.folder / "job.toml").write_text(small_job(2))
    with pytest.raises(BadInput, match="sbatch refused it: sbatch: error: invalid partition specified: nowhere"):
        site.submit("job.toml", "--partition", "nowhere")
    assert site.states() == {}
    assert [line.split()[1:] for line in site.submit("--status", "runs")[1][1:2]] == [["not", "submitted"]]
