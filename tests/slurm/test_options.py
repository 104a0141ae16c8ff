"""What a submission can say, and what is refused; the defaults of a site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedsim.config.durations import seconds
from fedsim.errors import BadInput
from fedsim.slurm import sbatch_options, site
from fedsim.slurm.options import DEFAULTS, MEANING, Options, options_of


def test_defaults_and_what_follows_from_gpus() -> None:
    assert options_of() == Options()
    assert options_of().all_ranks == 3
    assert options_of({"gpus": 4, "ranks_per_gpu": 2}).all_ranks == 9
    assert options_of({"nodes": 5}).all_ranks == 5
    assert options_of({"launcher": "none"}).all_ranks == 1
    assert options_of({"time": 90}).time == "90"
    assert options_of({"nodes": 2, "ranks": 8}, {"ranks": 4, "nodes": None}) == Options(nodes=2, ranks=4)
    assert Options(nodes=2, time="90").given == {"nodes": 2, "time": "90"}
    assert MEANING.keys() == DEFAULTS.keys()


def test_an_unknown_option_lists_all_with_their_defaults() -> None:
    with pytest.raises(BadInput) as error:
        options_of({"node": 2, "time": "90"})
    message = str(error.value)
    assert message.startswith("there is no option node. The options of a submission and their defaults:\n")
    assert [line.split()[0] for line in message.splitlines()[1:]] == list(DEFAULTS)
    assert "  nodes = 1: nodes of a run\n" in message


def test_all_that_is_wrong_is_said_in_one_message() -> None:
    with pytest.raises(BadInput) as error:
        options_of({"nodes": 0, "ranks": True, "memory": "8GB", "time": "1:2:3:4", "launcher": "mpi"}, called=lambda name: f"--{name}")
    lines = str(error.value).splitlines()
    assert [line.split(" = ")[0] for line in lines] == ["--nodes", "--ranks", "--memory", "--time", "--launcher"]
    assert lines[0] == "--nodes = 0: should be a whole number, at least 1 (nodes of a run)"
    assert lines[4] == '--launcher = "mpi": there are mpirun, srun, none'


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"partition": "cpu\n#SBATCH --uid=0"}, "line breaks"),
        ({"modules": "gcc\x1b[31m"}, "line breaks and other signs"),
        ({"account": "a b"}, "a name without spaces"),
        ({"modules": "gcc 'x"}, "quotation mark"),
        ({"gpus": 2, "ranks_per_gpu": 3, "ranks": 6}, "2 GPUs and rank 0, which serves, are 7; leave ranks out"),
        ({"ranks_per_gpu": 2}, "say also how many GPUs: gpus"),
        ({"gpus": 3, "nodes": 2}, "which 2 nodes cannot share evenly"),
        ({"nodes": 4, "ranks": 2}, "2 ranks cannot fill so many nodes"),
        ({"launcher": "none", "ranks": 2}, "it starts one process"),
        ({"time": 1}, "60 seconds, and the run is warned 60 seconds before the end"),
        ({"array": "0-"}, "array '0-'"),
        ({"sbatch": "--mem=4G"}, "--mem is written by fedsim itself; say --memory"),
        ({"sbatch": "-N 4"}, "-N is written by fedsim itself; say --nodes"),
        ({"sbatch": "-J name"}, "-J is written by fedsim itself"),
        ({"sbatch": "--part=gpu"}, "--part is written by fedsim itself"),  # sbatch takes the beginning of a name for the name
        ({"sbatch": "--gres=gpu:2", "gpus": 2}, "--gres is written by fedsim itself; say --gpus"),
        ({"sbatch": "exclusive"}, "'exclusive' belongs to no option"),
        ({"sbatch": "--exclusive yes no"}, "'no' belongs to no option"),
        ({"sbatch": "--comment='x"}, "No closing quotation"),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, Any], why: str) -> None:
    with pytest.raises(BadInput) as error:
        options_of(values)
    assert why in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_further_options_keep_their_values() -> None:
    text = "--exclusive --constraint='a|b' -w n1 -C x --mem-per-cpu=4G --gres=gpu:1"
    pairs = [("--exclusive", ""), ("--constraint", "a|b"), ("-w", "n1"), ("-C", "x"), ("--mem-per-cpu", "4G"), ("--gres", "gpu:1")]
    assert sbatch_options.options(text) == pairs
    assert list(sbatch_options.wrong(text, gpus=False)) == []


@pytest.mark.parametrize(
    ("time", "expected"),
    [("90", 5400), ("1:30", 90), ("1:30:00", 5400), ("2-12", 216_000), ("2-12:30", 217_800), ("0-0:0:7", 7), ("unlimited", float("inf"))],
)
def test_times_as_slurm_writes_them(time: str, expected: float) -> None:
    assert seconds(time) == expected


@pytest.fixture
def site_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "fedsim").mkdir()
    assert site.path() == tmp_path / "fedsim" / "slurm.toml"
    return site.path()


def test_the_defaults_of_a_site_give_way_to_the_command_line(site_file: Path) -> None:
    assert site.defaults() == {}
    site_file.write_text('partition = "cpu"\naccount = "p1"\nmodules = "gcc openmpi/5"\nwarning = 120\nranks-per-gpu = 1\n')
    options = options_of(site.defaults(), {"partition": "gpu"})
    assert options == Options(partition="gpu", account="p1", modules="gcc openmpi/5", warning=120)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("partitions = 'cpu'", "there is no option partitions. The options"),
        ("nodes = 'two'", 'nodes = "two": should be a whole number'),
        ("time = 12:00:00", "time = 12:00:00: should be a text in quotation marks"),
        ("[nodes]\nx = 1", "nodes = "),
        ("nodes", "line 1: not valid TOML"),
        ("array = '%4'", "array belongs on the command line"),
    ],
)
def test_a_wrong_file_of_a_site_is_named(site_file: Path, text: str, why: str) -> None:
    site_file.write_text(text)
    with pytest.raises(BadInput) as error:
        site.defaults()
    assert str(error.value).startswith(str(site_file))
    assert why in str(error.value)
