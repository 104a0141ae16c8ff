"""A checkpoint names classes of fedsim and of the job's own code, and nothing else is imported or built."""

from __future__ import annotations

import sys
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from fedsim.core.serialization import classes, dump, load
from fedsim.core.types import Feed
from fedsim.storage.known_classes import KnownClasses, UnknownClass, reached


@dataclass(frozen=True)
class Mine:
    x: int = 0


ALIAS = OrderedDict  # a class of another module under a name of this one
OTHER = Feed  # the same, of one that may be built


@pytest.fixture
def author(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> KnownClasses:
    """The classes of a module that imports this one; beside it lies a module that leaves a trace where it is imported."""
    module = ModuleType("the_authors_module")
    module.Mine = Mine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "leaves_a_trace.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'trace')!r}).touch()")
    return KnownClasses([module.__name__])


def test_own_states_and_those_of_fedsim_come_back(author: KnownClasses) -> None:
    value = {"mine": Mine(3), "feed": Feed(epochs=2)}
    plain, tensors = dump(value)
    assert load(plain, tensors, author) == value
    assert classes(plain) == {f"{__name__}:Mine", "fedsim.core.types:Feed"}


def test_a_module_of_fedsim_is_imported_where_it_defines_states(author: KnownClasses) -> None:
    assert author("fedsim.fleet.received_masks:ReceivedMasks").__name__ == "ReceivedMasks"


@pytest.mark.parametrize(
    "address",
    [
        "leaves_a_trace:Mine",
        "fedsim.__main__:State",
        "fedsim.cli.entry:State",
        "fedsim.core.nowhere:State",
        "fedsim.core.types:Feed.__init__",
        "fedsim.core.types:dataclass",
        "fedsim.core.serialization:import_module",
        "fedsim.core.types:sys.modules",
        "subprocess:Popen",
        "argparse:Namespace",
        "builtins:dict",
        "pathlib:Path",
        "torch:Tensor",
        f"{__name__}:ALIAS",
        f"{__name__}:Mine.x",
        f"{__name__}:absent",
        "",
        ":",
        "fedsim.core..types:Feed",
        3,
        None,
        ["fedsim.core.types:Feed"],
    ],
)
def test_nothing_else_is_imported_or_built(address: object, author: KnownClasses, tmp_path: Path) -> None:
    before = set(sys.modules)
    with pytest.raises((ValueError, TypeError, AttributeError, ImportError)):
        load({"of": address, "fields": {}}, {}, author)
    assert not (tmp_path / "trace").exists()
    assert not {name for name in set(sys.modules) - before if not name.startswith("fedsim.core")}


def test_a_class_that_the_author_does_not_import_is_refused_by_name() -> None:
    with pytest.raises(UnknownClass, match=r"'.*:Mine' is no class that the job can mean; it uses fedsim and nothing of its own"):
        KnownClasses()(f"{__name__}:Mine")


def test_what_an_author_reaches_is_neither_python_nor_a_library(author: KnownClasses) -> None:
    found = reached(["the_authors_module"])
    assert {"the_authors_module", __name__} <= found
    assert not {name for name in found if name.partition(".")[0] in ("sys", "pathlib", "torch", "numpy", "fedsim", "dataclasses")}


TABLES = [{"of": "a name"}, {"of": {1: 2}}, {"fields": {"of": 3}}, {"tensor": 1}, {"dict": {"of": []}}, {"items": 2}]


@pytest.mark.parametrize("keys", TABLES)
def test_the_keys_of_a_table_name_no_class(keys: dict[str, object]) -> None:
    """A state may be a table with any keys."""
    value = {"mine": Mine(), "table": keys, "numbers": {1: keys, 2: Mine()}}
    plain, tensors = dump(value)
    assert classes(plain) == {f"{__name__}:Mine"}
    assert load(plain, tensors) == value


def test_a_class_counts_under_its_own_name_alone(author: KnownClasses) -> None:
    with pytest.raises(UnknownClass, match="is another class under that name"):
        author(f"{__name__}:OTHER")
