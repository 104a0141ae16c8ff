"""What the site takes from the code and from README files: it is all there, as the program itself shows it."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

import h5py
import pytest
import typer.testing
from from_code import commands, fields, filling, markdown, methods, readmes, run_file

import fedsim
from fedsim.cli.commands import app
from fedsim.config import method_registry

ROOT = Path(__file__).parents[2]
PAGES = {str(path.relative_to(ROOT / "docs").with_suffix("")): path.read_text("utf-8") for path in (ROOT / "docs").rglob("*.md")}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[h5py.File]:
    """A real run file, of a method with columns and masks of its own and of clients with devices."""
    data = {"name": "fake", "image_size": 8, "channels": 1, "classes": 4, "train_images": 120, "test_images": 40}
    job: dict[str, Any] = {"rounds": 1, "data": data, "partition": {"clients": 4, "public": 2}, "model": {"width": 4}}
    job |= {"method": {"name": "fedtiny", "density": 0.5}, "devices": {"name": "four_kinds"}, "execution": {"plan": "reference"}}
    path = tmp_path_factory.mktemp("run") / "run.h5"
    fedsim.run(job, out=path, progress=False)
    with h5py.File(path, "r") as opened:
        yield opened


def rows(text: str) -> dict[str, list[str]]:
    """The cells of each row of the tables, by the code in the first cell."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells and (name := re.match(r"\[?`(.+?)`", cells[0])):
            found[name[1]] = cells[1:]
    return found


def under(text: str, title: str) -> str:
    """What stands in a page under a heading of level 2 or 3."""
    return re.split(r"^##", text.partition(f"# {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def as_text(cell: str) -> str:
    return re.sub(r"\\(.)", r"\1", cell)


def test_every_column_of_a_run_file_is_listed_with_its_unit_and_meaning(file: h5py.File) -> None:
    text = run_file.columns()
    for group, scales in run_file.DIMENSIONS.items():
        listed = rows(under(text, f"`/{group}`: one number for each {' and '.join(scales)}"))
        for name, column in file[group].items():
            if name not in scales:
                assert [as_text(cell) for cell in listed[name]] == [column.attrs["units"], column.attrs["long_name"]]


def test_every_attribute_of_a_run_file_is_listed(file: h5py.File) -> None:
    assert set(rows(run_file.attributes())) == {*file.attrs, "mended"}


def test_every_other_array_of_a_run_file_is_listed(file: h5py.File) -> None:
    listed = "|".join(re.escape(name).replace("ROUND", "[0-9a-z]+").replace("KEY", ".+") for name in rows(run_file.arrays()))
    arrays: list[str] = []
    file.visititems(lambda name, what: arrays.append(f"/{name}") if isinstance(what, h5py.Dataset) else None)
    others = [name for name in arrays if name.split("/")[1] not in run_file.DIMENSIONS]
    assert len(others) > 10
    assert [name for name in others if not re.fullmatch(listed, name)] == []


def test_every_field_of_a_job_is_listed(file: h5py.File) -> None:
    """Those of the job that a run resolved, defaults included."""
    text = fields.fields()
    for section, values in tomllib.loads(file.attrs["job"]).items():
        if section != "method":
            listed = rows(under(text, f"`[{section}]`" if isinstance(values, dict) else "Above the first section"))
            assert set(values if isinstance(values, dict) else [section]) <= set(listed), section
    assert rows(under(text, "`[train]`"))["lr"][:2] == [
        "number, at least 0",
        f"`{fedsim.load_job({'method': {'name': 'fedavg'}}).train.lr}`",
    ]


@pytest.mark.parametrize("name", method_registry.own_names())
def test_every_parameter_of_a_method_is_listed_with_its_default(name: str) -> None:
    listed, alias = rows(methods.method(name)), method_registry.ALIASES.get(name)
    fixed = {field.removeprefix("method.") for field in alias.fixed} if alias else set()
    expected = {each.name: each.default for each in fields_of(method_registry.find(name)) if each.init and each.name not in fixed}
    assert set(listed) == set(expected)
    for field, default in expected.items():
        if isinstance(default, int | float) and not isinstance(default, bool):
            assert float(listed[field][1].strip("`")) == default
        assert listed[field][2], f"{name}.{field} has no meaning"


def test_every_option_of_a_command_is_listed() -> None:
    text = commands.commands()
    names = [each.name or each.callback.__name__ for each in app.registered_commands if each.callback]
    assert len(names) > 15
    for name in names:
        shown = typer.testing.CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "300"}).stdout
        options = set(re.findall(r"^\W*(--[a-z-]+)", shown, re.MULTILINE)) - {"--help"}
        listed = {option for row in rows(under(text, f"`fedsim {name}`")) for option in re.findall(r"--[a-z-]+", row)}
        assert options <= listed, name


def test_the_paper_s_symbols_become_a_table() -> None:
    assert rows(methods.method("fedtiny").replace("| C |", "| `C` |"))["C"] == ["pool"]


def test_plain_text_stays_as_it_is_written() -> None:
    assert markdown.plain("w_k * <x> `a_b` [c]") == r"w\_k \* \<x\> `a_b` \[c\]"
    assert markdown.plain("arXiv:1602.05629.") == "[arXiv:1602.05629](https://arxiv.org/abs/1602.05629)."
    assert markdown.table(("a",), [("x | y",)]) == "| a |\n| --- |\n| x \\| y |"


def test_every_readme_and_each_section_of_the_first_is_on_the_site() -> None:
    written = [*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/README.md"), *ROOT.glob("jobs/**/README.md")]
    assert {str(path.relative_to(ROOT)) for path in written} - {*readmes.PAGES} == set()
    for file, page in readmes.PAGES.items():
        assert f"{{from}} {file}" in PAGES[page]
    text = (ROOT / "README.md").read_text("utf-8")
    sections = {title for _, _, level, title in readmes.headings(text) if level <= 2}
    sections -= {"Leaderboard"}  # a part of the page that is there whole
    assert {found[2] for page in PAGES.values() for found in filling.PLACE.finditer(page) if found[1] == "README.md"} >= sections


def test_every_page_is_filled() -> None:
    for page, text in PAGES.items():
        assert not re.search(r"^```\{from\}", filling.filled(text, page)[0], re.MULTILINE), page


SAMPLE = "# Title\n\nfirst\n\n## One\n\na\n\n```sh\n## no heading\n```\n\n### Inner\n\nb\n\n## Two\n\nc\n"


def test_a_section_ends_before_the_next_of_its_level() -> None:
    assert readmes.under(SAMPLE, "One", "x.md") == ("\n\na\n\n```sh\n## no heading\n```\n\n### Inner\n\nb\n\n", 2)
    assert readmes.under(SAMPLE, "Two", "x.md") == ("\n\nc\n", 2)
    assert readmes.under(SAMPLE, "Title", "x.md") == ("\n\nfirst\n\n", 1)
    with pytest.raises(readmes.NoSuchText, match=r"x\.md has no section 'Three'\. It has: Title, One, Inner, Two"):
        readmes.under(SAMPLE, "Three", "x.md")


def test_links_and_pictures_of_a_readme_lead_somewhere_from_its_page() -> None:
    text = "[a](../../CONTRIBUTING.md#add-a-method) ![b](devices.svg) `README.md` `figure.py`\n```\n`slurm/README.md`\n```"
    linked = readmes.linked(text, "jobs/devices", "results/devices")
    first, second, *code = linked.splitlines()
    assert first.startswith("[a](/project/contributing.md#add-a-method) ![b](../../jobs/devices/devices.svg) ")
    assert (second, code[0]) == ("```", "`slurm/README.md`")
    assert readmes.linked("`slurm/README.md`", ".", "index") == "[`slurm/README.md`](/guide/slurm.md)"
    with pytest.raises(readmes.NoSuchText, match=r"a link to nowhere\.md in a file of jobs/ leads nowhere"):
        readmes.linked("[a](nowhere.md)", "jobs", "index")


def test_headings_of_a_section_go_below_those_of_the_page() -> None:
    assert "\n### Around\n" not in readmes.text_of("slurm/README.md", "How MPI is found", "guide/slurm", 1)
    text, _ = filling.filled("# Page\n\n## Part\n\n```{from} jobs/bench/README.md\n```\n", "results/speed")
    assert "\n### The engine\n" in text
    assert "# What was measured" not in text


def test_a_page_that_asks_for_what_is_not_there_is_an_error() -> None:
    with pytest.raises(readmes.NoSuchText, match=r"there is no file jobs/nothing\.md"):
        filling.filled("```{from} jobs/nothing.md\n```", "index")
    with pytest.raises(readmes.NoSuchText, match=r"the code says nothing of 'weather'\. There are: arrays, "):
        filling.filled("```{from} code: weather\n```", "index")
