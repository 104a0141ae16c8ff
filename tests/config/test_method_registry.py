"""The registry of methods: ours and a user's own, and what a job may say of them."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedsim.cli import method_help
from fedsim.config import method_registry, method_source
from fedsim.config.job import check, resolved
from fedsim.errors import BadInput

MINE = '''
"""A method of one's own."""
from dataclasses import dataclass
from fedsim import Method

@dataclass(frozen=True)
class Mine(Method):
    """Counts."""
    hyper_lr: float = 0.001  # eta_h, step of the hypernetwork
    keep: float = 0.8
    density: float = 0.5     # d, kept share
    layers: tuple[str, ...] = ()
    def init(self, setting, public): return None
    def round(self, setting, state, fleet, r): return state, {}
    def deploy(self, setting, state, fleet, cohort): return {}, {}, None

@dataclass(frozen=True)
class Needy(Mine):
    limit: int = 1
    def __post_init__(self):
        if self.limit > self.keep * 10: raise ValueError(f"limit = {self.limit} is more than ten times keep = {self.keep}")

class Loose: pass
'''


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "my_method.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_method:Mine"
    sys.modules.pop("my_method", None)


def fault(table: dict[str, Any]) -> str:
    with pytest.raises(BadInput) as caught:
        check(table, "x.toml")
    return str(caught.value)


def test_a_misspelt_field_of_a_method_is_named_beside_the_methods_own(mine: str) -> None:
    line = fault({"method": {"name": mine, "hyperlr": 0.1}})
    assert line.startswith(
        "x.toml: [method] has no field 'hyperlr' (did you mean 'hyper_lr'?). my_method:Mine has: hyper_lr = 0.001, keep = 0.8"
    )


@pytest.mark.parametrize(("density", "fine"), [(0.0, False), (-0.5, False), (1.5, False), (float("nan"), False), (1, True), (1e-3, True)])
def test_a_density_is_a_share_of_the_weights_in_every_method(mine: str, density: float, fine: bool) -> None:
    table = {"method": {"name": mine, "density": density}}
    if fine:
        assert check(table).method.use.density == density
    else:
        assert "density" in fault(table)
        assert "above 0 and at most 1" in fault(table)


def test_a_method_of_ones_own_is_read_with_its_types(mine: str) -> None:
    job = check({"method": {"name": mine, "layers": ["a", "b"], "keep": 1}})
    assert asdict(job.method.use) == {"hyper_lr": 0.001, "keep": 1.0, "density": 0.5, "layers": ("a", "b")}
    assert tomllib.loads(resolved(job))["method"] == {"name": mine, "hyper_lr": 0.001, "keep": 1.0, "density": 0.5, "layers": ["a", "b"]}


def test_a_methods_own_checks_are_heard(mine: str) -> None:
    assert fault({"method": {"name": "my_method:Needy", "limit": 9}}) == "x.toml: [method] limit = 9 is more than ten times keep = 0.8"


def test_a_class_that_is_no_method_is_refused(mine: str) -> None:
    assert "it lacks @dataclass(frozen=True), the base class fedsim.Method, init, round, deploy" in fault(
        {"method": {"name": "my_method:Loose"}}
    )
    assert "my_method has no class 'Mien'; it has Mine, Needy, Loose" in fault({"method": {"name": "my_method:Mien"}})


VERBS = {
    "init": "    def init(self, setting, public): ...\n",
    "round": "    def round(self, setting, state, fleet, r): ...\n",
    "deploy": "    def deploy(self, setting, state, fleet, cohort): ...\n",
}
HEAD = "from dataclasses import dataclass\nfrom fedsim import Method\n\n\n@dataclass(frozen=True)\nclass Mine(Method):\n"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"deploy": ""}, "is not a method: it lacks deploy"),
        ({"round": "    round = None\n"}, "is not a method: it lacks round"),
        ({"round": "    def round(self, setting, state, fleet): ...\n"}, "cannot call its round: too many positional arguments; write def"),
        ({"round": "    def round(setting, state, fleet, r): ...\n"}, "write def round(self, setting, state, fleet, r)"),
        (
            {"init": "    def init(self, setting, public, more): ...\n"},
            "cannot call its init: missing a required argument: 'more'; write def",
        ),
        ({"deploy": "    async def deploy(self, setting, state, fleet, cohort): ...\n"}, "its deploy: it is a coroutine or a generator"),
        ({"round": "    def round(self, setting, state, fleet, r):\n        yield state\n"}, "its round: it is a coroutine or a gen"),
        (
            {"more": "    def model_of(self, net): ...\n"},
            "its model_of: too many positional arguments; write def model_of(self, net, sent)",
        ),
        ({"more": "    def variants(self, r): ...\n"}, "cannot call its variants: missing a required argument: 'r'"),
    ],
)
def test_the_verbs_of_a_method_are_checked_when_the_job_is_read(tmp_path: Path, monkeypatch, change: dict[str, str], said: str) -> None:
    name = f"contract_{abs(hash(said + str(change)))}"
    (tmp_path / f"{name}.py").write_text(HEAD + "".join((VERBS | change).values()))
    monkeypatch.syspath_prepend(str(tmp_path))
    line = fault({"method": {"name": f"{name}:Mine"}})
    assert line.startswith(f"x.toml: [method] name = '{name}:Mine'")
    assert said in line


@pytest.mark.parametrize("round_", ["def round(self, *everything): ...", "def round(self, setting, state, fleet, r, more=1): ..."])
def test_verbs_that_can_be_called_are_taken_however_they_are_written(tmp_path: Path, monkeypatch, round_: str) -> None:
    name = f"contract_{abs(hash(round_))}"
    (tmp_path / f"{name}.py").write_text(HEAD + "".join((VERBS | {"round": f"    {round_}\n"}).values()))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert check({"method": {"name": f"{name}:Mine"}}).method.name == f"{name}:Mine"


def test_hyperparameters_carry_the_comment_on_their_line(mine: str) -> None:
    first, second, *_ = method_registry.parameters(mine)
    assert (first.name, first.kind, first.default, first.meaning) == ("hyper_lr", "float", 0.001, "eta_h, step of the hypernetwork")
    assert second.meaning == ""


@pytest.mark.parametrize("name", method_registry.names())
def test_every_method_is_found_and_says_its_paper(name: str) -> None:
    assert callable(method_registry.find(name)().round)
    assert len(method_registry.about(name).splitlines()[0]) > 20


def test_the_catalogue_reads_like_prose(capsys) -> None:
    """Paragraphs flow, choices are listed as a job writes them."""
    method_help.show("fedtiny", Console(width=200))
    told = capsys.readouterr().out
    assert "in C ways; clients re-estimate the running statistics" in " ".join(told.split("\n")[2:4])
    assert 'int | "stages" | "layer" | "all"' in told
    assert "Literal" not in told
    method_help.show("heterofl", Console(width=200))
    assert "tuple[float, ...] | float by kind of device" in " ".join(capsys.readouterr().out.split())
    assert "\nPaper -> code:" in told


@pytest.mark.parametrize("name", method_registry.names())
def test_types_are_written_out(name: str) -> None:
    """A name for a type, such as Sharing, tells a reader nothing."""
    kinds = [re.sub(r"Literal\[.*?\]", "", each.kind) for each in method_registry.parameters(name)]
    words = {word for kind in kinds for word in re.findall(r"[A-Za-z_]+", kind)}
    assert words <= {"int", "float", "bool", "str", "tuple", "dict", "None"}


def test_an_alias_does_not_list_what_it_fixes() -> None:
    """The default of `score` is that of another alias, and `snip` refuses every other value."""
    assert "score" not in [each.name for each in method_registry.free_parameters("snip")]
    assert "growth" not in [each.name for each in method_registry.free_parameters("set")]
    assert "score" in [each.name for each in method_registry.free_parameters("at_init")]


@pytest.mark.parametrize("name", method_registry.names())
def test_every_hyperparameter_says_what_it_means(name) -> None:
    """A comment that the formatter put on a line of its own is lost to `fedsim methods`."""
    assert [each.name for each in method_registry.parameters(name) if not each.meaning] == []


@pytest.mark.parametrize("name", method_registry.names())
def test_the_file_of_a_method_says_what_the_imported_class_says(name: str) -> None:
    read = method_source.parameters(method_registry.file_of(name))
    assert read == method_registry.parameters_of(method_registry.find(name))


def test_a_default_that_is_computed_is_not_read_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(MINE.split("@dataclass(frozen=True)\nclass Needy")[0].replace("0.001", "1 / 1000"))
    assert method_source.parameters(tmp_path / "one.py") is None


def test_a_module_that_ends_python_is_named_by_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ending_method.py").write_text("import sys\nsys.exit('no licence')\n")
    monkeypatch.syspath_prepend(tmp_path)
    said = "[method] name = 'ending_method:Mine': module 'ending_method' cannot be imported: SystemExit: no licence"
    assert said in fault({"method": {"name": "ending_method:Mine"}})
