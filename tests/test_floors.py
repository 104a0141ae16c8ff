"""The rooms and floors: no import goes upwards, no room of floor 2 knows another, and what only one room may touch."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "fedsim"
FLOORS = (
    {"tree", "draw", "masks", "adjust", "descent", "gates", "net", "norms", "wire", "kernels", "exact", "ledger", "models", "fault"}
    | {
        "trace",
        "channels",
        "calls",
        "autodiff",
        "innermost",
        "narrow",
        "precision",
        "taps",
        "keep",
        "saving",
        "hypernet",
        "constraint",
        "cotrain",
        "dynamic",
        "skipping",
    },
    {"core", "works", "server", "aggregate", "plain", "gated", "choosing", "phases", "extrude", "frequency"},
    {"methods", "fleet", "data", "record", "checkpoint"},
)
TOP = 3
ALONE = {"mpi4py": {"fleet/mpi.py"}, "h5py": {"record/", "data/file.py"}}
MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def floor(name: str) -> int:
    return next((number for number, rooms in enumerate(FLOORS) if name in rooms), TOP)


def imports(path: Path) -> set[str]:
    """Every module a file imports, those for type checkers left out."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "fedsim" else {str(node.module)}
    return found


def rooms_of(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("fedsim.")} - {room(path)}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_goes_upwards(path) -> None:
    mine = room(path)
    for other in rooms_of(path):
        assert floor(other) <= floor(mine), f"{mine} (floor {floor(mine)}) imports {other} (floor {floor(other)})"
        assert not (floor(mine) == floor(other) == 2), f"{mine} and {other} are rooms of floor 2, which do not know each other"


@pytest.mark.parametrize(("library", "places"), ALONE.items())
def test_libraries_with_one_room(library, places) -> None:
    users = {str(path.relative_to(ROOT)) for path in MODULES if any(name.split(".")[0] == library for name in imports(path))}
    assert users
    assert all(any(user.startswith(place) for place in places) for user in users), users


@pytest.mark.parametrize("path", [path for path in MODULES if floor(room(path)) < TOP], ids=lambda path: str(path.relative_to(ROOT)))
def test_below_the_top_there_is_no_print_environment_clock_or_global_draw(path) -> None:
    tree = ast.parse(path.read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    dotted = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert "print" not in names
    assert not imports(path) & {"time", "datetime", "random", "os.environ"}
    forbidden = {
        "os.environ",
        "os.getenv",
        "torch.manual_seed",
        "torch.seed",
        "torch.random.manual_seed",
        "torch.default_generator.manual_seed",
    }
    forbidden |= {f"torch.{name}" for name in ("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "bernoulli", "normal")}
    forbidden |= {f"np.random.{name}" for name in ("seed", "rand", "randn", "randint", "permutation", "shuffle", "choice", "random")}
    forked = (
        {"torch.default_generator.manual_seed"} if path == ROOT / "models" / "__init__.py" else set()
    )  # in fork_rng: torch draws weights
    assert not (dotted & forbidden) - forked
    assert not names & {"environ", "getenv", "manual_seed"}


def test_core_is_words_alone() -> None:
    assert imports(ROOT / "core.py") <= {"__future__", "collections.abc", "dataclasses", "math", "typing", "torch"}


def test_analysis_knows_neither_torch_nor_fedsim() -> None:
    for path in (ROOT.parent / "analysis" / "fedsim_analysis").rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & {"torch", "fedsim"}, path


def test_methods_are_short() -> None:
    for path in (ROOT / "methods").glob("*.py"):
        assert len(path.read_text().splitlines()) < 200, path
