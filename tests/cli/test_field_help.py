"""`fedsim fields`: every field of a job, with type, default and meaning, and the right names where one is wrong."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from fedsim.cli import field_help
from fedsim.config import field_list
from fedsim.config.job import Job
from fedsim.errors import BadInput

FIELDS = [(section, each) for section, found in field_list.sections().items() for each in found]


def shown(name: str | None = None) -> str:
    written = StringIO()
    field_help.show(name, Console(file=written, width=200))
    return written.getvalue()


def line(text: str, name: str) -> str:
    return " ".join(next(line for line in text.splitlines() if line.split()[:1] == [name]).split())


@pytest.mark.parametrize(("section", "field"), FIELDS, ids=[f"{section}.{field.name}" for section, field in FIELDS])
def test_every_field_has_a_type_and_a_meaning(section: str, field: field_list.JobField) -> None:
    assert field.kind
    assert field.meaning
    assert "type:" not in field.meaning


def test_all_sections_of_a_job_are_there() -> None:
    known = {*field_list.sections(), "method", "sweep"} - {""}
    assert known | {each.name for each in field_list.sections()[""]} == set(Job.model_fields)
    text = shown()
    assert all(f"[{name}]" in text for name in known)
    assert line(text, "rounds") == "rounds whole number, at least 1 100 all of them, warm-up and fine-tuning included"


def test_a_section_and_a_field() -> None:
    text = shown("train")
    assert line(text, "optimiser") == 'optimiser "sgd" | "adam" "sgd" of clients'
    assert line(text, "momentum") == "momentum number, at least 0, below 1 0.0 of SGD"
    assert line(text, "milestones").startswith("milestones list of number, above 0, below 1 [0.5, 0.75]")
    assert line(text, "batch").startswith("batch whole number, at least 1, at most 1,000,000 64")
    assert shown("[train]") == text
    assert line(shown("train.lr"), "lr") == "lr number, at least 0 0.05 learning rate of clients"
    assert len(shown("train.lr").splitlines()) == 2
    assert line(shown("seed"), "seed").startswith("seed whole number, at least 0")
    assert line(shown("evaluate"), "clients").startswith('clients "all" | "cohort" | whole number, at least 1 -')
    assert "fedsim methods NAME" in shown("method")
    assert '"train.lr" = [0.1, 0.05]' in shown("sweep")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("trian", "a job has no such section. There are: data, partition, cohort, devices, model, train"),
        ("train.rl", r"\[train\] has no field 'rl'. There are: epochs, steps, batch, lr"),
    ],
)
def test_a_wrong_name_is_answered_with_the_right_ones(name: str, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        field_help.show(name, Console(file=StringIO()))
