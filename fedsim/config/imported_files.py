"""The files that a module of the user's own imports, and which may change from one day to the next: not the standard library, no
installed package, not fedsim.
"""

from __future__ import annotations

import ast
import site
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from importlib import util
from pathlib import Path

FEDSIM = ("fedsim", "fedsim_analysis")


def of(module: str) -> list[Path]:
    """The files that the module and its own imports import, sorted by the names of their modules. The module itself is left out.

    Imports are read from the text, so those inside functions count too. What a module reads or imports by a name that it makes up is
    not seen.
    """
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        for other in _imports(name):
            if other != module and other not in found and (file := _own_file(other)) is not None:
                found[other] = file
                waiting.append(other)
    return [found[name] for name in sorted(found)]


def _imports(module: str) -> Iterator[str]:
    """The dotted names that a module's text imports, and the packages around them. A name may be of a module or of something in one."""
    file = _file(module)
    if file is None or file.suffix != ".py":
        return
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    try:
        text = ast.parse(file.read_bytes())
    except SyntaxError:  # what cannot be imported here imports nothing
        return
    for node in ast.walk(text):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            begin = _begin(package, node.level, node.module or "")
            names = [begin, *(f"{begin}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            yield from (".".join(parts[:count]) for count in range(1, len(parts) + 1) if all(parts[:count]))


def _begin(package: str, level: int, module: str) -> str:
    """The module that `from` names, where `level` dots stand before it."""
    if not level:
        return module
    around = package.split(".")[: len(package.split(".")) - level + 1]
    return ".".join([*around, *([module] if module else [])])


def _own_file(module: str) -> Path | None:
    """The file of a module that is the user's own; None for all others."""
    file = None if module.partition(".")[0] in FEDSIM else _file(module)
    if file is None or file.suffix != ".py" or any(file.is_relative_to(folder) for folder in _others()):
        return None
    return file


def _file(module: str) -> Path | None:
    """The file of a module, which is imported or can be; None where there is none. Nothing is imported to find it."""
    loaded, around = sys.modules.get(module), module.rpartition(".")[0]
    if loaded is not None:
        origin = getattr(loaded, "__file__", None)
    elif around and around not in sys.modules:
        return None  # to look for it would import the package around it
    else:
        try:
            spec = util.find_spec(module)
        except (ImportError, AttributeError, ValueError):  # a name in a module, or around it something that is no package
            return None
        origin = spec.origin if spec else None
    return Path(origin).resolve() if origin and Path(origin).is_file() else None


@cache
def _others() -> tuple[Path, ...]:
    """Folders of code that has versions: the standard library and installed packages."""
    paths = [*sysconfig.get_paths().values(), *site.getsitepackages(), site.getusersitepackages()]
    libraries = {Path(path).resolve() for path in paths if "python3" in path}
    return tuple(libraries)
