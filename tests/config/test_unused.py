"""Fields that a job does not use: they are refused, for they would make another job that computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedsim.config.job import check, identity, load, recorded, runs
from fedsim.core.types import LocalTraining
from fedsim.data.partition import FIELDS, NAMES
from fedsim.data.population import populate
from fedsim.errors import BadInput

Table = dict[str, Any]
FEDAVG: Table = {"method": {"name": "fedavg"}}


def joined(*tables: Table) -> Table:
    """One table; sections are put together."""
    found: Table = {}
    for table in tables:
        for section, value in table.items():
            found[section] = {**found.get(section, {}), **value} if isinstance(value, dict) else value
    return found


def fault(table: Table) -> str:
    with pytest.raises(BadInput) as caught:
        check(table, "x.toml")
    return str(caught.value)


CASES: dict[str, tuple[Table, Table]] = {  # what is given, and what makes a use of it
    "data.crop_pad": ({"data": {"crop_pad": 2}}, {"data": {"augment": ["crop"]}}),
    "data.crop_border": ({"data": {"crop_border": "reflect"}}, {"data": {"augment": ["crop"]}}),
    "data.cutout": ({"data": {"cutout": 4}}, {"data": {"augment": ["cutout"]}}),
    "partition.beta": ({"partition": {"name": "dirichlet_client", "beta": 0.3}}, {"partition": {"sizes": "dirichlet"}}),
    "partition.sigma": ({"partition": {"name": "dirichlet_client", "sigma": 0.3}}, {"partition": {"sizes": "lognormal"}}),
    "partition.max_tries": ({"partition": {"name": "iid", "max_tries": 3}}, {"partition": {"name": "quantity_dirichlet"}}),
    "devices.unfit": ({"devices": {"unfit": "error"}}, {"devices": {"name": "phones"}}),
    "model.width": ({"model": {"factory": "a:b", "width": 8}}, {"model": {"factory": None}}),
    "model.name": ({"model": {"factory": "a:b", "name": "resnet18"}}, {"model": {"factory": None}}),
    "model.norm_weight": ({"model": {"norm": "none", "norm_weight": 0.5}}, {"model": {"norm": "group"}}),
    "model.detach_shortcut": ({"model": {"detach_shortcut": True}}, {"model": {"name": "resnet8"}}),
    "train.factor": ({"train": {"factor": 0.5}}, {"train": {"schedule": "exponential"}}),
    "train.milestones": ({"train": {"milestones": [0.3]}}, {"train": {"schedule": "step"}}),
    "train.activation_layers": ({"train": {"activation_layers": "conv"}}, {"train": {"activation_keep": 0.5}}),
    "train.activation_cache": ({"train": {"activation_cache": "int32"}}, {"train": {"activation_keep": 0.5}}),
    "train.fedprox_mu": ({"train": {"fedprox_mu": 0.5}}, {"train": {"aggregate": "fedprox"}}),
    "train.fednova_weights": ({"train": {"fednova_weights": "batches"}}, {"train": {"aggregate": "fednova"}}),
    "evaluate.batch": ({"evaluate": {"every": 0, "batch": 8}}, {"evaluate": {"every": 1}}),
    "evaluate.clients": ({"evaluate": {"clients": 3}, "partition": {"test": "global"}}, {"partition": {"test": "proportional"}}),
    "method.sharing": ({"method": {"name": "gradual", "scope": "global", "sharing": "er"}}, {"method": {"scope": "layer"}}),
    "method.prune_size": ({"method": {"name": "structured", "prune_size": 3}}, {"method": {"choice": "fl1"}}),
    "method.pool": ({"method": {"name": "fedtiny", "selection": "none", "pool": 3}}, {"method": {"selection": "vanilla"}}),
    "method.pool_cap": ({"method": {"name": "fedtiny", "pool": 3, "pool_cap": 9}}, {"method": {"pool": None}}),
    "method.bn_passes": ({"method": {"name": "fedtiny", "selection": "vanilla", "bn_passes": 3}}, {"method": {"selection": "bn"}}),
    "method.ramp": ({"method": {"name": "fedmef", "penalty": 0.0, "ramp": True}}, {"method": {"penalty": 0.1}}),
    "method.slope": ({"method": {"name": "dwfnp", "regulariser": "one_sided", "slope": 2.0}}, {"method": {"regulariser": "two_sided"}}),
    "method.finetune": ({"method": {"name": "dwfnp", "personal": False, "finetune": "static"}}, {"method": {"personal": True}}),
    "method.regrow": ({"method": {"name": "prunefl", "regrow": False}}, {"method": {"form": "library"}}),
    "method.half_life": ({"method": {"name": "prunefl", "form": "library", "half_life": 9}}, {"method": {"form": "paper"}}),
    "method.settled": ({"method": {"name": "prunefl", "initial_iterations": 0, "settled": 2}}, {"method": {"initial_iterations": 9}}),
    "method.bytes_per_second": (
        {"method": {"name": "prunefl", "seconds_per_weight": [1.0], "bytes_per_second": 2.0}},
        {"method": {"seconds_per_weight": None}},
    ),
    "method.first_threshold": ({"method": {"name": "flpqsu", "select": False, "first_threshold": 2.0}}, {"method": {"select": True}}),
    "method.statistics_every": (
        {"method": {"name": "heterofl", "static_norm": False, "scaler": False, "statistics_every": 2}},
        {"method": {"static_norm": True}},
    ),
}


@pytest.mark.parametrize("key", CASES)
def test_a_field_without_a_use_is_refused_and_one_with_a_use_is_taken(key: str) -> None:
    given, use = CASES[key]
    section, _, field = key.partition(".")
    line = fault(joined(FEDAVG, given))
    assert line.startswith(f"x.toml: [{section}] {field} = ")
    assert " is not used: " in line
    assert "; leave it out" in line
    used = joined(FEDAVG, given, use)
    job = check(used)
    del used[section][field]
    assert identity(job) != identity(check(used)), "the field is there, and has another value than its default"


@pytest.mark.parametrize("name", NAMES)
def test_each_scheme_takes_its_own_fields_and_refuses_the_others(name: str) -> None:
    values = {"alpha": 0.3, "balance": False, "prior": "ones", "shards_per_client": 3, "drop_rest": True, "noise_std": 0.3, "angle": 9.0}
    values |= {"classes_per_client": 3, "images_per_class": 11}
    for field, value in values.items():
        table = joined(FEDAVG, {"partition": {"name": name, field: value}})
        if field in FIELDS[name]:
            assert getattr(check(table).partition, field) == value
        else:
            owners = [each for each, own in FIELDS.items() if field in own]
            assert all(owner in fault(table).partition(" is not used: ")[2].partition(", and partition.name")[0] for owner in owners)


def test_what_is_refused_changes_nothing_but_the_identity() -> None:
    """The truth that the rule follows: the partition, and the rate of every round, are the same whatever the field says."""
    plain = check(joined(FEDAVG, {"partition": {"name": "iid"}}))
    other = recorded(joined(FEDAVG, {"partition": {"name": "iid", "alpha": 0.1, "max_tries": 2}, "train": {"factor": 0.9}}))
    assert identity(plain) != identity(other)
    one, two = (populate(job.data, job.partition, 0) for job in (plain, other))
    assert all((one.shards["train"].of(client) == two.shards["train"].of(client)).all() for client in range(10))
    rates = [[job.train.training(9, False).at(r).lr for r in range(1, 10)] for job in (plain, other)]
    assert rates[0] == rates[1] == [LocalTraining.lr] * 9


def test_the_default_is_taken_wherever_it_stands() -> None:
    written = joined(FEDAVG, {"partition": {"name": "iid", "alpha": 0.5}, "train": {"fedprox_mu": 0.01}})
    assert identity(check(written)) == identity(check(joined(FEDAVG, {"partition": {"name": "iid"}})))


def test_in_a_sweep_a_field_is_left_out_of_the_runs_that_do_not_use_it() -> None:
    table = joined(FEDAVG, {"train": {"fedprox_mu": 0.5}, "sweep": {"train.aggregate": ["fedavg", "fedprox", "scaffold"]}})
    made = runs(check(table))
    assert [(run.train.aggregate, run.train.fedprox_mu) for run in made] == [("fedavg", 0.01), ("fedprox", 0.5), ("scaffold", 0.01)]
    assert identity(made[0]) == identity(check(FEDAVG | {"name": made[0].name}))
    assert table["train"] == {"fedprox_mu": 0.5}, "the caller's table is left alone"


def test_in_a_sweep_a_field_that_no_run_uses_is_refused_once() -> None:
    line = fault(joined(FEDAVG, {"train": {"factor": 0.5}, "sweep": {"seed": [0, 1, 2]}}))
    assert line.startswith("x.toml: [train] factor = 0.5 is not used")
    assert "\n" not in line


def test_a_swept_field_must_be_used_by_every_run() -> None:
    line = fault(joined(FEDAVG, {"sweep": {"partition.name": ["dirichlet_class", "iid"], "partition.alpha": [0.5, 0.1]}}))
    assert line == (
        "x.toml, run job-nameiid-alpha0.1 of [sweep]: [partition] alpha = 0.1 is not used: it is of dirichlet_class and"
        ' dirichlet_client, and partition.name is "iid"; leave it out, on a command line by --set partition.alpha='
    )
    assert check(joined(FEDAVG, {"sweep": {"partition.alpha": [0.5, 0.1]}}))


def test_a_run_file_of_before_is_still_read() -> None:
    table = joined(FEDAVG, {"partition": {"name": "iid", "alpha": 0.1}})
    assert recorded(table).partition.alpha == 0.1


def test_fields_of_another_method_are_named_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text('[method]\nname = "fedtiny"\ndensity = 0.1\ngrowth = "batch"\nbn_passes = 3\n')
    with pytest.raises(BadInput) as caught:
        load(path, ["method.name=fedavg"])
    *each, last = str(caught.value).splitlines()
    assert len(each) == 3
    assert all("fedavg has no fields of its own" in line for line in each)
    assert (
        last
        == f"{path}: [method] density, growth and bn_passes are fields of fedtiny; to leave them out: --set 'method={{name = \"fedavg\"}}'"
    )
    way = last.partition("--set '")[2].rstrip("'")
    assert load(path, [way]).method.name == "fedavg"


def test_what_the_other_method_has_too_stays(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text('[method]\nname = "fedtiny"\ndensity = 0.1\nbn_passes = 3\n')
    with pytest.raises(BadInput) as caught:
        load(path, ["method.name=rigl"])
    way = str(caught.value).partition("--set '")[2].rstrip("'")
    assert load(path, [way]).method.use.density == 0.1


def test_a_field_is_left_out_by_an_empty_value(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text(
        '[partition]\nname = "iid"\nalpha = 0.1\n[method]\nname = "fedtiny"\nselection = "none"\npool = 3\n[sweep]\nseed = [0, 1]\n'
    )
    with pytest.raises(BadInput) as caught:
        load(path)
    ways = [line.rpartition(" by --set ")[2] for line in str(caught.value).splitlines()]
    assert ways == ["partition.alpha=", "method.pool="]
    job = load(path, [*ways, "seed=", "cohort=", "train.lr="])
    assert (job.partition.alpha, job.method.use.pool, job.sweep, job.seed) == (0.5, None, {}, 0)
    assert "alpha" not in job.given["partition"]
    with pytest.raises(BadInput, match=r"--set seed\.a=: seed is a value, not a section"):
        load(path, ["seed=1", "seed.a="])


def test_a_table_that_lost_its_quotes_in_the_shell_is_said_to(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text('[method]\nname = "fedtiny"\n')
    with pytest.raises(BadInput, match=r"--set method={name=fedavg}: not a table or a list of TOML; a shell takes the quotes"):
        load(path, ["method={name=fedavg}"])
