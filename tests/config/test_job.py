"""The job file: what it accepts, what it resolves to, and what it says when it is wrong."""

from __future__ import annotations

import json
import tomllib
from dataclasses import fields
from datetime import date
from pathlib import Path
from typing import Any

import h5py
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.config.job import Job, check, identity, load, resolved, runs
from fedsim.core.types import LocalTraining
from fedsim.data.partition import PartitionSettings
from fedsim.data.settings import DataSettings
from fedsim.errors import BadInput
from fedsim.federated.aggregation import FedProx
from fedsim.models.settings import ModelSettings

ROOT = Path(__file__).parents[2]
FEDAVG = {"method": {"name": "fedavg"}}
METHOD = '[method]\nname = "fedavg"\n'


@pytest.fixture
def file(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        path = tmp_path / "x.toml"
        path.write_text(text)
        return path

    return write


def nested(depth: int) -> dict[str, Any]:
    return {"a": nested(depth - 1)} if depth else {}


def faults(table: dict[str, Any]) -> list[str]:
    with pytest.raises(BadInput) as caught:
        check(table, "x.toml")
    return str(caught.value).splitlines()


def fault(table: dict[str, Any]) -> str:
    (line,) = faults(table)
    return line


def test_all_but_the_method_has_a_default() -> None:
    job = check(FEDAVG)
    assert (job.data, job.partition, job.model) == (DataSettings(), PartitionSettings(), ModelSettings())
    assert job.cohort.of(7) == 7
    assert job.cohort.of(500) == 10
    assert (job.evaluate.of(1_000), job.evaluate.of(1_001)) == ("all", "cohort")


def test_local_training_by_default_is_what_core_says() -> None:
    assert check(FEDAVG).train.training(1, True) == LocalTraining()


def test_steps_replace_epochs() -> None:
    training = check(FEDAVG | {"train": {"steps": 5, "weight_decay": 0.5}}).train.training(9, augment=False)
    assert (training.epochs, training.steps, training.decay, training.rounds, training.augment) == (0, 5, 0.5, 9, False)
    assert training.feed().steps == 5


def test_whole_numbers_are_numbers_and_lists_are_tuples() -> None:
    job = check(FEDAVG | {"train": {"lr": 1, "schedule": "step", "milestones": [0.25]}, "data": {"augment": ["crop"]}})
    assert job.train.lr == 1.0
    assert job.train.milestones == (0.25,)
    assert job.data.augment == ("crop",)


def test_name_is_the_files_unless_the_job_says_otherwise(file: Any) -> None:
    assert load(file(METHOD)).name == "x"
    assert load(file('name = "y"\n' + METHOD)).name == "y"


def test_overrides_are_toml_or_else_text(file: Any) -> None:
    job = load(file(METHOD), ["train.lr=0.5", "data.download=true", "train.schedule=step", "train.milestones=[0.5]", "seed=3"])
    assert (job.train.lr, job.data.download, job.train.schedule, job.train.milestones, job.seed) == (0.5, True, "step", (0.5,), 3)


@pytest.mark.parametrize("item", ["foo", "=3", "", "train.lr"])
def test_an_override_without_key_or_value_is_refused(file: Any, item: str) -> None:
    with pytest.raises(BadInput, match=r"write section\.field=value"):
        load(file(METHOD), [item])


def test_an_override_below_a_plain_value_is_refused(file: Any) -> None:
    with pytest.raises(BadInput, match="seed is a value, not a section"):
        load(file("seed = 1\n" + METHOD), ["seed.x=3"])


def test_the_resolved_job_says_every_default_and_reads_back() -> None:
    job = check(FEDAVG | {"train": {"steps": 3}, "partition": {"clients": 40}, "sweep": {"seed": [0, 1]}})
    text = resolved(job)
    table = tomllib.loads(text)
    assert table["cohort"] == {"size": 10}
    assert table["train"]["lr"] == LocalTraining.lr
    assert "epochs" not in table["train"]
    assert table["sweep"] == {"seed": [0, 1]}
    assert resolved(check(table)) == text


finite = st.floats(0, 10, allow_nan=False)


@given(
    seed=st.integers(0, 2**63 - 1),
    lr=finite,
    clients=st.integers(1, 10**6),
    steps=st.none() | st.integers(1, 100),
    name=st.text(st.characters(exclude_characters="/", exclude_categories=["C", "Z"]), min_size=1),
)
def test_resolving_twice_changes_nothing(seed: int, lr: float, clients: int, steps: int | None, name: str) -> None:
    table = FEDAVG | {
        "name": name,
        "seed": seed,
        "partition": {"clients": clients},
        "train": {"lr": lr} | ({"steps": steps} if steps else {}),
    }
    job = check(table)
    again = check(tomllib.loads(resolved(job)))
    assert resolved(again) == resolved(job)
    assert (again.train, again.seed, again.name) == (job.train.model_copy(update={"epochs": again.train.epochs}), seed, name)


def test_identity_forgets_how_and_where_but_nothing_else() -> None:
    plain = identity(check(FEDAVG))
    assert identity(check(FEDAVG | {"execution": {"threads": 2}, "data": {"root": "/elsewhere", "download": True}})) == plain
    others = [{"seed": 1}, {"rounds": 7}, {"train": {"lr": 0.1}}, {"cohort": {"size": 3}}, {"data": {"name": "shapes"}}]
    assert len({plain, *(identity(check(FEDAVG | other)) for other in others)}) == 6
    assert identity(check(FEDAVG | {"cohort": {"size": 10}})) == plain, "a default written out is the same job"


def test_fedprox_is_fedavg_with_another_aggregation() -> None:
    job = check({"method": {"name": "fedprox"}, "train": {"fedprox_mu": 0.5}})
    assert job.train.aggregation() == FedProx(fedprox_mu=0.5)
    assert job.method.use == check(FEDAVG).method.use
    assert "means train.aggregate = 'fedprox'" in fault({"method": {"name": "fedprox"}, "train": {"aggregate": "fedavg"}})


def test_a_sweep_makes_every_run_the_last_field_fastest() -> None:
    job = check(FEDAVG | {"name": "a", "sweep": {"train": {"lr": [0.1, 0.2]}, "seed": [3, 4]}})
    made = runs(job)
    assert [(run.name, run.train.lr, run.seed) for run in made] == [
        ("a-lr0.1-seed3", 0.1, 3),
        ("a-lr0.1-seed4", 0.1, 4),
        ("a-lr0.2-seed3", 0.2, 3),
        ("a-lr0.2-seed4", 0.2, 4),
    ]
    assert not any(run.sweep for run in made)


def test_a_swept_default_follows_what_it_depends_on() -> None:
    made = runs(check(FEDAVG | {"sweep": {"partition.clients": [4, 40]}}))
    assert [run.cohort.of(run.population) for run in made if run.population] == [4, 10]
    made = runs(check(FEDAVG | {"sweep": {"method.name": ["fedprox", "fedavg"]}}))
    assert [run.train.aggregate for run in made] == ["fedprox", "fedavg"]
    (run,) = runs(check({"method": {"name": "fedprox"}, "sweep": {"method.name": ["fedavg"]}}))
    assert run.train.aggregate == "fedavg"


def test_an_override_fixes_a_swept_field(file: Any) -> None:
    job = load(file(METHOD + '[sweep]\n"train.lr" = [0.1, 0.2]\nseed = [0, 1]'), ["train.lr=0.3"])
    assert list(job.sweep) == ["seed"]
    assert {run.train.lr for run in runs(job)} == {0.3}


@pytest.mark.parametrize("sweep", [{"train.lrr": [1]}, {"train.lr": [-1]}, {"train.lr": []}, {"train.lr": 1}, {"seed": [1, 1]}, 3])
def test_a_fault_in_a_sweep_is_reported_when_the_job_is_read(sweep: Any) -> None:
    assert "sweep" in fault(FEDAVG | {"sweep": sweep})


UNKNOWN = "x.toml: [{}] has no field {!r} (did you mean {!r}?). [{}] has: "


def test_a_misspelt_field_is_named_beside_the_right_ones() -> None:
    line = fault(FEDAVG | {"data": {"nmae": "digits"}})
    assert line.startswith(UNKNOWN.format("data", "nmae", "name", "data"))
    assert all(f.name in line for f in fields(DataSettings))


def test_a_misspelt_section_and_a_field_without_its_section() -> None:
    lines = faults(FEDAVG | {"dta": {}, "lr": 0.1})
    assert "a job has no field 'dta' (did you mean 'data'?). A job has: " in lines[0]
    assert "[partition]" in lines[0]
    assert "no field 'lr' (it belongs to [train])" in lines[1]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"rounds": "ten"}, 'rounds = "ten": should be a whole number, at least 1; the default is 100'),
        ({"rounds": -1}, "rounds = -1: should be a whole number, at least 1"),
        ({"rounds": True}, "rounds = true: should be a whole number"),
        ({"seed": -1}, "seed = -1: should be a whole number, at least 0"),
        ({"name": "a/b"}, 'name = "a/b": should be a text that can name a file'),
        ({"train": {"lr": "fast"}}, '[train] lr = "fast": should be a number, at least 0; the default is 0.05'),
        ({"train": {"lr": float("nan")}}, "[train] lr = nan: should be a number"),
        ({"train": {"batch": 2.5}}, "[train] batch = 2.5: should be a whole number, at least 1, at most 1000000; the default is 64"),
        ({"train": {"momentum": 1.0}}, "[train] momentum = 1.0: should be a number, at least 0, below 1"),
        ({"train": {"schedule": "warm"}}, 'should be "constant" or "cosine" or "exponential" or "step"; the default is "constant"'),
        ({"train": {"milestones": [0.5, 2.0]}}, "[train] milestones = [0.5, 2.0]: should be a list, each a number, above 0, below 1"),
        ({"train": {"aggregate": "sum"}}, "[train] aggregate = 'sum' is not known. There are: fedavg, fedprox"),
        ({"train": {"epochs": 1, "steps": 2}}, "[train] has epochs = 1 and steps = 2; give one of them"),
        ({"train": {"optimiser": "adam", "momentum": 0.9}}, '[train] optimiser = "adam" has moments of its own; leave out momentum = 0.9'),
        ({"cohort": {"size": 11}}, "[cohort] size = 11 is more than the population; there are 10 clients"),
        ({"evaluate": {"clients": 11}}, "[evaluate] clients = 11 is more than the population; there are 10 clients"),
        ({"evaluate": {"clients": "some"}}, '[evaluate] clients = "some": should be "all" or "cohort" or a whole number, at least 1'),
        ({"model": {"match_density": 0.0}}, "x.toml: [model] match_density = 0.0: should be above 0 and at most 1"),
        ({"execution": {"plan": "fast"}}, 'plan = "fast": should be "auto", "reference" or the run file whose plan is taken'),
        ({"execution": {"time_limit": 0}}, "time_limit = 0: should be a number of minutes, above 0, or a time as SLURM writes it: 90 (min"),
        ({"execution": {"time_limit": "1h"}}, "[execution] time_limit = '1h' is no time; write one as SLURM does: 90 (minutes), 1:30"),
        ({"execution": {"time_limit": "0:00"}}, "[execution] time_limit = '0:00': should be above 0"),
        ({"execution": {"time_limit": True}}, "time_limit = true: should be a number of minutes, above 0, or a time"),
        ({"data": "digits"}, '[data] is a section, not "digits": write [data] and its fields below it'),
        ({"data": {"image_size": "big"}}, '[data] image_size = "big": should be a whole number'),
        ({"data": {"name": "cifar"}}, "[data] name = 'cifar' is not known (did you mean 'cifar10'?). There are: digits"),
        ({"partition": {"clients": 0}}, "[partition] clients = 0 must be at least 1"),
        ({"name": "a\nb"}, 'name = "a\\nb": should be a text that can name a file: not empty, without / and line breaks'),
        ({"name": date(2026, 1, 2)}, 'name = 2026-01-02 is a date or a time; no field takes one. A text stands in quotes: "2026-01-02"'),
        ({"sweep": {"train": {"lr": [date(2026, 1, 2)]}}}, "sweep.train.lr = 2026-01-02 is a date or a time"),
        ({"data": {"root": object()}}, "data.root is of type object; a job has texts, numbers, true and false, lists and tables"),
        ({"data": {"root": "a\0"}}, r"data.root = 'a\x00' has a sign that no text of a job can have"),
        ({"data": nested(30)}, "data.a.a.a.a"),
        ({"sweep": {"seed": [*range(200)], "rounds": [*range(1, 101)]}}, "[sweep] makes 200 x 100 = 20,000 runs; at most 10,000"),
        ({"rounds": 10**18}, "rounds = 1000000000000000000 is too large: should be at most 2,147,483,647"),
        ({"train": {"steps": 10**18}}, "[train] steps = 1000000000000000000 is too large: should be at most 2,147,483,647"),
        ({"train": {"lr": 1e300}}, "[train] lr = 1e+300 is too large: should be at most 1e+38"),
        ({"train": {"lr": float("inf")}}, "[train] lr = inf: should be a number, at least 0, and finite; the default is 0.05"),
        ({"train": {"batch": 10**9}}, "batch = 1000000000: should be a whole number, at least 1, at most 1000000; the default is 64"),
        ({"execution": {"threads": 10**9}}, "threads = 1000000000: should be a whole number, at least 1, at most 1024"),
        ({"model": {"width": 0}}, "[model] width = 0: should be at least 1"),
        ({"model": {"norm": "btch"}}, "[model] norm = 'btch' is not known (did you mean 'batch'?). There are: batch, group, none, nsconv"),
        ({"model": {"gate_keep": 0.5, "gate_bias": float("inf")}}, "[model] gate_bias = inf: should be a finite number"),
        ({"data": {"name": "file"}}, '[data] name = "file" needs path, your HDF5 or npz file, for example path = "mine.h5"'),
        ({"data": {"path": "mine.h5"}}, '[data] path applies to name = "file"; leave it out for digits'),
        ({"data": {"root": [1] * 1_000}}, "1, 1, 1 …: should be a text"),
        ({"method": {"name": "dwfnp", "tau": 0.0}}, "[method] tau = 0.0: should be above 0"),
        ({"method": {"name": "dwfnp", "hyper_lr": float("inf")}}, "[method] hyper_lr = inf: should be at least 0, and finite"),
        ({"method": {"name": "dwfnp", "bias": float("nan")}}, "[method] bias = nan: should be a finite number"),
        ({"method": {"name": "fedmef", "extrusion_rounds": 10}}, "extrusion_rounds = 10: should be below adjust_every = 10"),
        ({"method": "fedavg"}, "[method] is a section"),
        ({"method": {}}, "[method] needs a name. There are: adp, at_init, dwfnp"),
        ({"method": {"name": 3}}, "[method] needs a name"),
        ({"method": {"name": "fedagv"}}, "[method] name = 'fedagv' is not known (did you mean 'fedavg'?). There are: "),
        ({"method": {"name": "fedavg", "x": 1}}, "[method] has no field 'x'. fedavg has no fields of its own"),
        ({"method": {"name": "nowhere:Mine"}}, "module 'nowhere' cannot be imported: ModuleNotFoundError"),
    ],
)
def test_what_cannot_be_is_named_with_what_would_be_right(table: dict[str, Any], said: str) -> None:
    line = fault(FEDAVG | table)
    assert line.startswith("x.toml: ")
    assert said in line


def test_all_faults_are_reported_at_once_each_once() -> None:
    lines = faults({"rounds": 0, "train": {"lr": "a", "batch": 0}, "evaluate": {"clients": []}, "method": {"name": "fedavg", "a": 1}})
    assert len(lines) == 5
    assert all(line.startswith("x.toml: ") for line in lines)


def test_each_number_that_is_too_large_has_its_line() -> None:
    lines = faults(FEDAVG | {"rounds": 10**12, "train": {"epochs": 10**12}})
    assert [line.split(" = ")[0] for line in lines] == ["x.toml: rounds", "x.toml: [train] epochs"]


def test_a_file_may_begin_with_a_mark_of_its_byte_order(file: Any) -> None:
    assert load(file("\ufeffrounds = 3\n" + METHOD)).rounds == 3


def test_a_job_cannot_be_changed() -> None:
    job = check(FEDAVG)
    with pytest.raises(ValueError, match="frozen"):
        job.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed = 0\n[method\n", "x.toml, line 2: not valid TOML"),
        ("seed = 0\nrounds =", "x.toml, line 2: not valid TOML"),
        ('[method]\nname = "fed', "x.toml, line 2: not valid TOML"),
        ("seed = 0\nseed = 1\n", "x.toml, line 2: not valid TOML"),
        ("seed = 0\n", "x.toml: [method] needs a name"),
        (f"seed = {'[' * 5_000}{']' * 5_000}\n", "x.toml: lists or tables are nested too deeply"),
    ],
)
def test_a_truncated_file_is_reported_with_its_line(file: Any, text: str, said: str) -> None:
    with pytest.raises(BadInput) as caught:
        load(file(text))
    assert said in str(caught.value)


def test_every_prefix_of_a_job_file_is_a_job_or_one_clear_message(file: Any) -> None:
    text = (ROOT / "jobs/quickstart_dense.toml").read_text()
    refused = 0
    for end in range(0, len(text), 7):
        path = file(text[:end])
        if METHOD.strip() in text[:end] and _is_toml(text[:end]):
            continue
        with pytest.raises(BadInput, match=r"x\.toml"):
            load(path)
        refused += 1
    assert refused > len(text) // 14


def _is_toml(text: str) -> bool:
    try:
        return bool(tomllib.loads(text))
    except tomllib.TOMLDecodeError:
        return False


def test_a_file_that_is_not_there_or_not_a_text(tmp_path: Path, file: Any) -> None:
    file(METHOD)
    with pytest.raises(BadInput, match=r"no such job file; did you mean x\.toml"):
        load(tmp_path / "xx.toml")
    with pytest.raises(BadInput, match="cannot be read"):
        load(tmp_path)
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match="not a text in UTF-8"):
        load(tmp_path / "b.toml")
    h5py.File(tmp_path / "run.h5", "w").close()
    with pytest.raises(
        BadInput, match=r"run\.h5: an HDF5 file, and no job; a job is a TOML file\. `fedsim show .*run\.h5` shows a run file"
    ):
        load(tmp_path / "run.h5")


@pytest.mark.parametrize("path", sorted(ROOT.glob("jobs/**/*.toml")), ids=lambda path: path.stem)
def test_every_job_of_ours_is_one_and_says_only_what_it_changes(path: Path) -> None:
    job = load(path)
    assert isinstance(job, Job)
    assert json.loads(json.dumps(tomllib.loads(resolved(job))))["name"] == path.stem
    for run in runs(job):  # the whole job, as a run file holds it, is a job of the same name to others
        assert identity(check(tomllib.loads(resolved(run)))) == identity(run)


def test_the_benchmarks_are_the_ones_that_were_agreed() -> None:
    small, medium = load(ROOT / "jobs/bench/small.toml"), load(ROOT / "jobs/bench/medium.toml")
    for job, channels, size, images, cohort, width in ((small, 1, 8, 20, 50, 16), (medium, 3, 32, 50, 20, 32)):
        assert (job.data.name, job.data.channels, job.data.image_size, job.data.classes) == ("fake", channels, size, 10)
        assert (job.partition.clients, job.data.train_images, job.cohort.size) == (100, 100 * images, cohort)
        assert (job.train.batch, job.train.training(1, True).epochs, job.train.lr, job.rounds) == (10, 1, 0.05, 6)
        assert (job.model.name, job.model.width, job.model.norm, job.evaluate.every) == ("cnn", width, "none", 0)


def test_a_million_clients_differ_from_a_thousand_in_number_only() -> None:
    million, thousand = (tomllib.loads(resolved(load(ROOT / f"jobs/bench/{name}.toml"))) for name in ("million", "thousand"))
    assert (million["partition"].pop("clients"), thousand["partition"].pop("clients")) == (1_000_000, 1_000)
    assert (million["data"].pop("train_images"), thousand["data"].pop("train_images")) == (20_000_000, 20_000)
    assert (million.pop("name"), thousand.pop("name")) == ("million", "thousand")
    assert million.pop("evaluate")["every"] == thousand.pop("evaluate")["every"] == 0
    assert million == thousand


def test_a_natural_partition_has_a_client_for_each_user_unless_the_job_says_otherwise() -> None:
    table = {"method": {"name": "fedavg"}, "data": {"name": "file", "path": "own.h5"}, "partition": {"name": "natural"}}
    assert check(table).partition.clients == 0
    assert check(table | {"partition": {"name": "natural", "clients": 4}}).partition.clients == 4


def test_a_cohort_beyond_the_exact_sum_is_refused() -> None:
    table = {"method": {"name": "fedavg"}, "partition": {"name": "blocks", "clients": 40_000}, "cohort": {"size": 20_000}}
    with pytest.raises(BadInput, match="at most 16,384"):
        check(table)


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (90, 5400.0),
        (0.5, 30.0),
        ("90", 5400.0),
        ("30:00", 1800.0),
        ("01:00:00", 3600.0),
        ("2-12", 216000.0),
        ("1-00:30", 88200.0),
        ("1-00:00:01", 86401.0),
        ("UNLIMITED", float("inf")),
    ],
)
def test_a_time_limit_is_in_minutes_or_as_slurm_writes_it(file: Any, given: Any, seconds: float) -> None:
    """man sbatch, --time: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds."""
    job = check(FEDAVG | {"execution": {"time_limit": given}})
    assert job.execution.limit == seconds
    assert check(tomllib.loads(resolved(job))).execution == job.execution
    assert load(file(METHOD), [f"execution.time_limit={given}"]).execution.limit == seconds


def test_without_a_time_limit_there_is_none() -> None:
    assert check(FEDAVG).execution.limit is None
