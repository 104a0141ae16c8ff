"""The registry of methods: one module of this package each, its name is the method's name in a job.

A module defines exactly one frozen dataclass with `init`, `round` and `deploy`; its fields are the hyperparameters. A user's own
method is named "package.module:Class" and needs no place here.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import get_close_matches
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from textwrap import dedent
from types import MappingProxyType, ModuleType
from typing import Any

from fedsim.config import method_source
from fedsim.config.method_source import Parameter
from fedsim.errors import BadInput

METHODS = Path(__file__).parents[1] / "methods"  # one file a method
VERBS = ("init", "round", "deploy")


@dataclass(frozen=True)
class Alias:
    """A published method that is another one with a few job fields fixed: no code of its own."""

    method: str
    fixed: Mapping[str, Any]  # "section.field" -> value
    about: str


ALIASES = MappingProxyType(
    {
        "fedprox": Alias(
            "fedavg",
            {"train.aggregate": "fedprox"},
            'FedProx: Li et al., MLSys 2020, arXiv:1812.06127. fedavg with train.aggregate = "fedprox"; its parameter is train.fedprox_mu.',
        ),
        "fednova": Alias(
            "fedavg",
            {"train.aggregate": "fednova"},
            "FedNova: Wang et al., NeurIPS 2020, arXiv:2007.07481."
            ' fedavg with train.aggregate = "fednova"; its parameter is train.fednova_weights, what clients count by.',
        ),
        "scaffold": Alias(
            "fedavg",
            {"train.aggregate": "scaffold"},
            'SCAFFOLD: Karimireddy et al., ICML 2020, arXiv:1910.06378. fedavg with train.aggregate = "scaffold"; no parameter of its own.',
        ),
    }
)


def names() -> list[str]:
    """Every name that a job may use."""
    return sorted({*(module.name for module in iter_modules([str(METHODS)])), *ALIASES})


def find(name: str) -> type:
    """The dataclass of a method: by its name, an alias, or "package.module:Class"; BadInput says what there is."""
    if ":" in name:
        return _foreign(name)
    if name not in names():
        close = get_close_matches(name, names(), 1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise BadInput(f'[method] name = {name!r} is not known{hint}. There are: {", ".join(names())}; or "package.module:Class"')
    return _only(import_module(f"fedsim.methods.{ALIASES[name].method if name in ALIASES else name}"))


def source_sha256(*names: str | None) -> str:
    """SHA-256 of the files of a user's own "package.module:name"s; empty where every name is fedsim's."""
    own = [name for name in names if name and ":" in name]
    files = [Path(inspect.getfile(import_module(name.partition(":")[0]))) for name in own]
    return sha256(b"\n".join(file.read_bytes() for file in files)).hexdigest() if files else ""


def about(name: str) -> str:
    """The paper and the notes of a method: the docstring of its module. A method of fedsim is not imported for it."""
    if name in ALIASES:
        return ALIASES[name].about
    if ":" in name or name not in names():
        return inspect.cleandoc(inspect.getmodule(find(name)).__doc__ or name)
    return method_source.docstring(METHODS / f"{name}.py")


def parameters(name: str) -> list[Parameter]:
    """The hyperparameters of a method in the order they are written. A method of fedsim is imported only if its file does not tell."""
    method = ALIASES[name].method if name in ALIASES else name
    read = method_source.parameters(METHODS / f"{method}.py") if method in names() else None
    return parameters_of(find(name)) if read is None else read


def parameters_of(method: type) -> list[Parameter]:
    """The hyperparameters of an imported class, in the order they are written."""
    sources = [inspect.getsource(each) for each in reversed(method.__mro__) if is_dataclass(each)]
    meanings = {name: meaning for source in sources for name, meaning in method_source.comments(dedent(source)).items()}
    return [Parameter(f.name, _written(f.type), _default(f), meanings.get(f.name, "")) for f in fields(method) if f.init]


def _default(field: Any) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _written(kind: Any) -> str:
    """A type as its source says it, with and without postponed annotations."""
    return kind if isinstance(kind, str) else inspect.formatannotation(kind)


def _only(module: ModuleType) -> type:
    found = [method for method in _classes(module) if not _lacks(method)]
    if len(found) != 1:
        raise TypeError(f"{module.__name__} must define one frozen dataclass with {', '.join(VERBS)}; it defines {len(found)}")
    return found[0]


def _classes(module: ModuleType) -> list[type]:
    """Those written in the module itself."""
    return [value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == module.__name__]


def _lacks(method: type) -> list[str]:
    """What a class needs to be a method, and has not."""
    missing = [verb for verb in VERBS if not callable(getattr(method, verb, None))]
    frozen = is_dataclass(method) and method.__dataclass_params__.frozen  # type: ignore[attr-defined]
    return missing if frozen else ["@dataclass(frozen=True)", *missing]


def _foreign(name: str) -> type:
    place, _, title = name.partition(":")
    try:
        module = import_module(place)
    except Exception as error:  # whatever the user's module raises, the job names what cannot be had
        raise BadInput(f"[method] name = {name!r}: module {place!r} does not import: {type(error).__name__}: {error}") from error
    method = getattr(module, title, None)
    if not inspect.isclass(method):
        listed = ", ".join(each.__name__ for each in _classes(module)) or "none"
        raise BadInput(f"[method] name = {name!r}: {place} has no class {title!r}; it has {listed}")
    if lacking := _lacks(method):
        raise BadInput(f"[method] name = {name!r} is not a method, it lacks {', '.join(lacking)}")
    return method
