"""The layers of the code: no import goes upwards, no circle, small files and folders, and libraries that only one place may touch."""

from __future__ import annotations

import ast
import subprocess
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "fedsim"
LAYERS = (  # from the bottom; a package imports from its own layer and from those before it
    ("core", "errors"),
    ("kernels", "costs", "data", "storage", "devices"),
    ("nn", "reporting"),
    ("models", "federated"),
    ("config", "fleet", "pruning"),
    ("simulation", "methods"),
    ("slurm", "bench"),
    ("cli", "api"),
)
LONGEST, MOST = 350, 15  # lines of a file; files of a folder
ALONE = {"mpi4py": ("fleet/mpi/",), "h5py": ("storage/", "data/own_file/")}
TOP = {"fedsim", "jobs", "slurm", "tests", "analysis", "pyproject.toml", "Makefile", ".ci", ".gitignore", "findings"}
TOP |= {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE"}
TOP |= {"docs"}  # pages of the site: they belong to no package, and are made of the files of all of these
ENTRANCES = ("__init__.py", "__main__.py")  # of the package itself: they stand above all layers
FILES = sorted(path for path in ROOT.rglob("*.py") if str(path.relative_to(ROOT)) not in ENTRANCES)
PURE = {"core", "errors", "kernels", "costs", "data", "storage", "devices", "nn", "models", "federated", "fleet", "pruning", "methods"}
DRAWS = ("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "bernoulli", "normal")
FORBIDDEN = {"os.environ", "os.getenv", "torch.manual_seed", "torch.seed", "torch.random.manual_seed"}
FORBIDDEN |= {"torch.default_generator.manual_seed", *(f"torch.{name}" for name in DRAWS)}
FORBIDDEN |= {f"np.random.{name}" for name in ("seed", "rand", "randn", "randint", "permutation", "shuffle", "choice", "random")}
ALLOWED = {
    "core/shared_generators.py": {"torch.default_generator.manual_seed", "np.random.seed"},  # in which code of users may draw
    "core/user_cache.py": {"os.environ"},  # where files are kept that change no result
}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def package(module: str) -> str:
    return module.split(".")[1]


def layer(module: str) -> int:
    return next(number for number, packages in enumerate(LAYERS) if package(module) in packages)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imports(path: Path) -> frozenset[str]:
    """Every module that a file imports anywhere, those for type checkers included."""
    found: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {one if (one := f"{node.module}.{alias.name}") in MODULES else str(node.module) for alias in node.names}
    return frozenset(found)


def own_imports(module: str) -> set[str]:
    return {name for name in imports(MODULES[module]) if name in MODULES} - {module}


def circle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_every_package_has_a_layer() -> None:
    named = [name for packages in LAYERS for name in packages]
    assert sorted(named) == sorted({package(module) for module in MODULES})


def test_no_import_goes_upwards() -> None:
    upwards = [f"{module} -> {other}" for module in MODULES for other in own_imports(module) if layer(other) > layer(module)]
    assert not upwards


def test_there_is_no_circle_of_files_or_packages() -> None:
    assert not circle({module: own_imports(module) for module in MODULES})
    names = {package(module) for module in MODULES}
    graph = {name: {package(other) for module in MODULES if package(module) == name for other in own_imports(module)} for name in names}
    assert not circle({name: others - {name} for name, others in graph.items()})


def test_files_and_folders_are_small() -> None:
    assert not [f"{path}: {lines}" for path in FILES if (lines := len(path.read_text().splitlines())) > LONGEST]
    folders = {path.parent for path in FILES}
    assert not [f"{folder}: {count}" for folder in folders if (count := len(list(folder.glob("*.py")))) > MOST]


def test_the_top_level_holds_what_it_should() -> None:
    if not (ROOT.parent / ".git").exists():
        pytest.skip("this is no checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT.parent, capture_output=True, text=True, check=True).stdout
    assert {line.partition("/")[0] for line in listed.splitlines()} == TOP


def test_every_file_says_what_it_is() -> None:
    assert not [path for path in FILES if not ast.get_docstring(parsed(path))]


@pytest.mark.parametrize(("library", "places"), ALONE.items())
def test_libraries_with_one_place(library, places) -> None:
    users = {str(path.relative_to(ROOT)) for path in FILES if any(name.split(".")[0] == library for name in imports(path))}
    assert users
    assert all(user.startswith(places) for user in users), users


def test_results_depend_on_no_print_environment_clock_or_global_draw() -> None:
    """Below the assembly of a run nothing is printed, and randomness and time come as arguments."""
    for path in (path for module, path in MODULES.items() if package(module) in PURE):
        names = {node.id for node in ast.walk(parsed(path)) if isinstance(node, ast.Name)}
        dotted = {ast.unparse(node) for node in ast.walk(parsed(path)) if isinstance(node, ast.Attribute)}
        assert not names & {"print", "environ", "getenv", "manual_seed"}, path
        draws = {"random"} if path.match("core/shared_generators.py") else set()  # for code of users
        assert not (imports(path) - draws) & {"time", "datetime", "random", "os.environ"}, path
        assert not (dotted & FORBIDDEN) - ALLOWED.get(str(path.relative_to(ROOT)), set()), path


def test_core_imports_no_other_package() -> None:
    assert {package(name) for path in FILES if package(name_of(path)) == "core" for name in imports(path) if name in MODULES} <= {
        "core",
        "errors",
    }


def test_analysis_knows_neither_torch_nor_fedsim() -> None:
    for path in (ROOT.parent / "analysis" / "fedsim_analysis").rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & {"torch", "fedsim"}, path


def test_methods_are_short() -> None:
    for path in (ROOT / "methods").rglob("*.py"):
        assert len(path.read_text().splitlines()) < 200, path
