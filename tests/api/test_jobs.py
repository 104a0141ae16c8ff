"""Jobs as a script gives them: whatever is wrong with one, Python says what the command line says, and nothing of the caller's changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

import fedsim

UsageError = Callable[[str, str, Mapping[str, str]], str]

WRONG: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {  # what is wrong -> the file, `--set` and `set`
    "unknown field": ("small.toml", {"train.epoch": "1"}, {"train.epoch": 1}),
    "unknown section": ("small.toml", {"trian.lr": "1"}, {"trian.lr": 1}),
    "field of another section": ("small.toml", {"train.alpha": "1"}, {"train.alpha": 1}),
    "wrong type": ("small.toml", {"train.lr": "fast"}, {"train.lr": "fast"}),
    "wrong type, not a text": ("small.toml", {"train.lr": "[true]"}, {"train.lr": [True]}),
    "two faults": ("small.toml", {"train.lr": "fast", "rounds": "-1"}, {"train.lr": "fast", "rounds": -1}),
    "more than there are": ("small.toml", {"cohort.size": "5"}, {"cohort.size": 5}),
    "missing file": ("smal.toml", {}, {}),
    "unknown method": ("small.toml", {"method.name": "fedagv"}, {"method.name": "fedagv"}),
    "unknown module": ("small.toml", {"method.name": "nowhere:Mine"}, {"method.name": "nowhere:Mine"}),
    "not TOML": ("cut.toml", {}, {}),
    "a value for a section": ("small.toml", {"train": "3"}, {"train": 3}),
    "a value of a value": ("small.toml", {"rounds.more": "3"}, {"rounds.more": 3}),
    "set without a field": ("small.toml", {"": "true"}, {"": True}),
    "set without a field, a text": ("small.toml", {"": "fast"}, {"": "fast"}),
    "a sweep that is no table": ("small.toml", {"sweep": "3"}, {"sweep": 3}),
    "a run of a sweep": ("small.toml", {"sweep.train.lr": '[0.1, "fast"]'}, {"sweep.train.lr": [0.1, "fast"]}),
}
REFUSED: dict[str, dict[str, Any]] = {  # only data and model can tell
    "unknown model": {"model.name": "resnet19"},
    "no such factory": {"model.factory": "nowhere:make"},
    "clients": {"partition.clients": 1000},
    "too small an image": {"model.name": "vgg11"},
    "no room for the images": {"data.train_images": 2_000_000_000, "data.image_size": 100_000},
    "no room for the model": {"model.width": 1_000_000},
    "a model larger than a number of bytes": {"model.width": 2_000_000_000},
    "no room for the clients": {"data.classes": 2_000_000_000},
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_wrong_with_a_job_is_said_as_the_command_line_says_it(fault: str, usage_error: UsageError, folder: Any) -> None:
    file, words, settings = WRONG[fault]
    (folder.path / "cut.toml").write_text('name = "a"\nrounds = = 3\n')
    expected = usage_error("run", file, words)
    for call in (fedsim.load_job, fedsim.run, fedsim.estimate, fedsim.sweep):
        with pytest.raises(fedsim.BadInput) as error:
            call(file, set=settings)
        assert str(error.value) == expected
    assert expected
    assert sorted(path.name for path in folder.path.glob("*")) == ["cut.toml", "small.toml"]


@pytest.mark.parametrize("fault", REFUSED)
def test_what_data_and_model_refuse_is_said_as_the_command_line_says_it(fault: str, usage_error: UsageError, folder: Any) -> None:
    words = {field: str(value) for field, value in REFUSED[fault].items()}
    for call, command in ((fedsim.run, "run"), (fedsim.estimate, "estimate")):
        with pytest.raises(fedsim.BadInput) as error:
            call("small.toml", set=REFUSED[fault])
        assert str(error.value) == usage_error(command, "small.toml", words)
        assert str(error.value).startswith("small.toml: ")
    assert [path.name for path in folder.path.glob("*")] == ["small.toml"]


def test_a_run_file_that_is_refused_is_said_as_the_command_line_says_it(usage_error: UsageError, folder: Any) -> None:
    fedsim.run("small.toml", set={"rounds": 1}, progress=False)
    with pytest.raises(fedsim.BadInput) as error:
        fedsim.run("small.toml", progress=False)
    assert str(error.value) == usage_error("run", "small.toml", {})
    assert str(error.value).startswith(f"small.toml: {Path('runs/small.h5')} already holds another job")


def test_a_table_and_a_job_name_themselves(folder: Any) -> None:
    with pytest.raises(fedsim.BadInput, match=r"^job: \[train\] lr = \"fast\""):
        fedsim.load_job(folder.table, set={"train.lr": "fast"})
    with pytest.raises(fedsim.BadInput, match=r"^small: \[train\] lr = \"fast\""):
        fedsim.load_job(fedsim.load_job("small.toml"), set={"train.lr": "fast"})
    with pytest.raises(fedsim.BadInput, match=r"^job: .*resnet19"):
        fedsim.run(folder.table, set={"model.name": "resnet19"})


def test_nothing_of_the_caller_changes(folder: Any) -> None:
    table, settings = folder.table, {"train.lr": 0.3, "model.norm": "group", "sweep": {"seed": [0, 1]}}
    before = deepcopy((table, settings))
    job = fedsim.load_job(table, set=settings)
    again = fedsim.load_job(job, set={"train.lr": 0.4, "sweep.seed": [5]})
    assert (table, settings) == before
    assert (job.train.lr, again.train.lr, again.model.norm) == (0.3, 0.4, "group")
    assert (job.sweep, again.sweep) == ({"seed": [0, 1]}, {"seed": [5]})
    table["train"]["lr"] = settings["sweep"]["seed"][0] = 7  # type: ignore[index]
    assert fedsim.load_job(job).train.lr == 0.3
    assert job.given["sweep"] == {"seed": [0, 1]}


def test_a_field_that_is_set_is_not_swept_as_on_the_command_line(folder: Any) -> None:
    table = folder.table | {"sweep": {"train": {"lr": [0.1, 0.2]}, "seed": [0, 1]}}
    assert fedsim.load_job(table, set={"train.lr": 0.3}).sweep == {"seed": [0, 1]}
    assert fedsim.load_job(table, set={"train.lr": 0.3, "seed": 4}).sweep == {}


def test_numbers_of_numpy_and_torch_and_any_mapping_will_do(folder: Any) -> None:
    table = MappingProxyType({name: MappingProxyType(part) if isinstance(part, dict) else part for name, part in folder.table.items()})
    settings = {"rounds": np.int64(5), "train.lr": torch.tensor(0.5), "seed": np.uint8(3), "sweep.train.batch": np.arange(4, 6)}
    job = fedsim.load_job(table, set=MappingProxyType(settings))
    assert (job.rounds, job.train.lr, job.seed, job.sweep) == (5, 0.5, 3, {"train.batch": [4, 5]})


@pytest.mark.parametrize("job", [None, 3, ["small.toml"]])
def test_what_is_no_job_is_said(job: Any) -> None:
    with pytest.raises(fedsim.BadInput, match=r"a job is the path of a TOML file, a dict or a fedsim\.Job, not "):
        fedsim.load_job(job)


def test_what_is_no_setting_or_no_choice_is_said(folder: Any) -> None:
    with pytest.raises(fedsim.BadInput, match=r"set = 'train.lr=0.1': should be a dict, for example"):
        fedsim.load_job("small.toml", set="train.lr=0.1")  # type: ignore[arg-type]
    with pytest.raises(fedsim.BadInput, match=r"resume = 'always' is not known\. There are: auto, never, must"):
        fedsim.run("small.toml", resume="always")
    with pytest.raises(fedsim.BadInput, match=r"small.toml: \[sweep\] makes 2 runs and fedsim.run does one: fedsim.sweep does all, or fix"):
        fedsim.run("small.toml", set={"sweep.seed": [0, 1]})
    with pytest.raises(fedsim.BadInput, match="processes = 0: should be a whole number, at least 1"):
        fedsim.sweep("small.toml", processes=0)
    with pytest.raises(fedsim.BadInput, match="at least one job"):
        fedsim.sweep([])
