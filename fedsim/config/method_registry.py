"""The registry of methods: one module of `methods/` or `methods/baselines/` each, its name is the method's name in a job.

A module defines exactly one frozen dataclass with `init`, `round` and `deploy`; its fields are the hyperparameters. A user's own
method is named "package.module:Class" and needs no place here; an installed package may offer one by a plain name
(`fedsim.core.entry_points`).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path
from pkgutil import iter_modules
from textwrap import dedent
from types import MappingProxyType, ModuleType
from typing import Any

from fedsim.config import method_source
from fedsim.config.method_source import Parameter
from fedsim.core import entry_points
from fedsim.errors import BadInput

METHODS = Path(__file__).parents[1] / "methods"
FOLDERS = {"fedsim.methods": METHODS, "fedsim.methods.baselines": METHODS / "baselines"}  # one file a method
FIELD = "[method] name"
CALLED = {  # how the engine calls a method
    "init": ("setting", "public"),
    "round": ("setting", "state", "fleet", "r"),
    "deploy": ("setting", "state", "fleet", "cohort"),
    "model_of": ("net", "sent"),
    "variants": (),
    "unread": (),
}
VERBS = ("init", "round", "deploy")


@dataclass(frozen=True)
class Alias:
    """A published method that is another method with some job fields fixed. It has no code of its own."""

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
        "magnitude": Alias(
            "at_init",
            {"method.score": "magnitude"},
            'Magnitude pruning at initialisation: at_init with method.score = "magnitude": the largest weights stay.\n\n'
            "A baseline of SNIP (Lee et al., ICLR 2019, arXiv:1810.02340) and of SynFlow (Tanaka et al., NeurIPS 2020, arXiv:2006.05467)."
            " The layers have Erdős-Rényi-kernel densities. With method.pretrain_epochs the weights are those that the server pretrained.",
        ),
        "random": Alias(
            "at_init",
            {"method.score": "random"},
            'Random static masks: at_init with method.score = "random"; Evci et al., ICML 2020, arXiv:1911.11134, call them static.\n\n'
            "The layers have Erdős-Rényi-kernel densities; the kept positions follow from the seed.",
        ),
        "snip": Alias(
            "at_init",
            {"method.score": "snip"},
            'SNIP: Lee et al., ICLR 2019, arXiv:1810.02340. at_init with method.score = "snip": the largest |w g| are kept.\n\n'
            'method.data = "clients" is SSFL (Ohib et al., TMLR, arXiv:2405.09037), in which the clients score; method.iterations = 20'
            " prunes step by step.",
        ),
        "synflow": Alias(
            "at_init",
            {"method.score": "synflow"},
            'SynFlow: Tanaka et al., NeurIPS 2020, arXiv:2006.05467. at_init with method.score = "synflow": no data, 100 steps.',
        ),
        "grasp": Alias(
            "at_init",
            {"method.score": "grasp"},
            'GraSP: Wang et al., ICLR 2020, arXiv:2002.07376. at_init with method.score = "grasp": the gradient keeps its norm.\n\n'
            "The server scores by at most method.images_per_class public images of each class.",
        ),
        "set": Alias(
            "rigl",
            {"method.growth": "random"},
            'SET: Mocanu et al., Nature Communications 2018, arXiv:1707.04780. rigl with method.growth = "random"; no gradient is sent.',
        ),
    }
)


def own_names() -> list[str]:
    """The methods of fedsim and their aliases."""
    return sorted({*_packages(), *ALIASES})


def file_of(name: str) -> Path:
    """The file of a method of fedsim, also for an alias."""
    method = ALIASES[name].method if name in ALIASES else name
    return FOLDERS[_packages()[method]] / f"{method}.py"


def _packages() -> dict[str, str]:
    """The package of each method of fedsim."""
    found = {package: iter_modules([str(folder)]) for package, folder in FOLDERS.items()}
    return {module.name: package for package, modules in found.items() for module in modules if not module.ispkg}


def names() -> list[str]:
    """Every name that a job may use: those of fedsim, and those that installed packages offer."""
    return sorted({*own_names(), *entry_points.names(entry_points.METHODS)})


def find(name: str) -> type:
    """The dataclass of a method: by its name, an alias, or "package.module:Class"; BadInput says what there is."""
    if ":" in name:
        return _by_place(name)
    if name in own_names():
        file = file_of(name)
        return _only(import_module(f"{_packages()[file.stem]}.{file.stem}"))
    return _method(entry_points.load(offer(name), FIELD), f"{FIELD} = {name!r}")


def offer(name: str) -> EntryPoint:
    """The entry point of a method that an installed package offers; BadInput for a name that nothing has."""
    entry = entry_points.find(entry_points.METHODS, name, FIELD)
    if entry is None:
        raise entry_points.unknown(FIELD, name, names(), '; or "package.module:Class"')
    return entry


def shadowed() -> list[str]:
    """A line for each method of an installed package that has the name of one of fedsim's, and is therefore not used."""
    offers = {name: entry_points.find(entry_points.METHODS, name, FIELD) for name in own_names()}
    return [f"{name!r} is fedsim's own; {entry_points.source(entry)} is not used" for name, entry in offers.items() if entry]


def by_kind() -> dict[str, list[str]]:
    """Methods of fedsim with fields that may be given by kind of device, and these fields."""
    found = {name: [each.name for each in free_parameters(name) if "dict[str, float]" in each.kind] for name in own_names()}
    return {name: fields for name, fields in found.items() if fields}


def about(name: str) -> str:
    """The paper and the notes of a method: the docstring of its module. A method of fedsim is not imported for it."""
    if name in ALIASES:
        return ALIASES[name].about
    if name in own_names():
        return method_source.docstring(file_of(name))
    return inspect.cleandoc(inspect.getmodule(find(name)).__doc__ or name)


def headline(name: str) -> str:
    """The first line about a method, for a list of all. Nothing is imported but the packages around the module of an entry point."""
    if name in own_names():
        return about(name).splitlines()[0]
    try:
        entry = offer(name)
        file = method_source.file_of(entry.module)
    except Exception as error:  # a broken package must not hide the other methods
        return f"cannot be used: {error}"
    text = method_source.docstring(file) if file else ""
    return " ".join([*text.splitlines()[:1], f"[{entry_points.source(entry)}]"])


def parameters(name: str) -> list[Parameter]:
    """The hyperparameters of a method in the order they are written. A method of fedsim is imported only if its file does not tell."""
    read = method_source.parameters(file_of(name)) if name in own_names() else None
    return parameters_of(find(name)) if read is None else read


def free_parameters(name: str) -> list[Parameter]:
    """Those that a job may set: an alias has fixed some."""
    fixed = ALIASES[name].fixed if name in ALIASES else {}
    return [each for each in parameters(name) if f"method.{each.name}" not in fixed]


def parameters_of(method: type) -> list[Parameter]:
    """The hyperparameters of an imported class, in the order they are written."""
    sources = [inspect.getsource(each) for each in reversed(method.__mro__) if is_dataclass(each)]
    meanings = {name: meaning for source in sources for name, meaning in method_source.comments(dedent(source)).items()}
    return [Parameter(f.name, _written(f.type), _default(f), meanings.get(f.name, "")) for f in fields(method) if f.init]


def _default(field: Any) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _written(kind: Any) -> str:
    """A type as the source writes it, with and without postponed annotations."""
    return kind if isinstance(kind, str) else inspect.formatannotation(kind)


def _only(module: ModuleType) -> type:
    found = [method for method in _classes(module) if not _lacks(method)]
    if len(found) != 1:
        raise TypeError(f"{module.__name__} must define one frozen dataclass with {', '.join(VERBS)}; it defines {len(found)}")
    return found[0]


def _classes(module: ModuleType) -> list[type]:
    """The classes that the module itself defines."""
    return [value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == module.__name__]


def _lacks(method: type) -> list[str]:
    """What a class lacks to be a method."""
    from fedsim.federated.protocol import Method  # here, since `fedsim methods` lists them without torch

    frozen = is_dataclass(method) and method.__dataclass_params__.frozen  # type: ignore[attr-defined]
    needed = {"@dataclass(frozen=True)": frozen, "the base class fedsim.Method": issubclass(method, Method)}
    abstract = getattr(method, "__abstractmethods__", ())
    given = {verb: callable(getattr(method, verb, None)) and verb not in abstract for verb in VERBS}
    return [name for name, has in (needed | given).items() if not has]


def _by_place(name: str) -> type:
    place, _, title = name.partition(":")
    try:
        module = import_module(place)
    except (Exception, SystemExit) as error:  # whatever the user's module raises, the job names what cannot be had
        where = entry_points.where_looked(error, place)
        raise BadInput(f"{FIELD} = {name!r}: module {place!r} cannot be imported: {type(error).__name__}: {error}{where}") from error
    method = getattr(module, title, None)
    if not inspect.isclass(method):
        listed = ", ".join(each.__name__ for each in _classes(module)) or "none"
        raise BadInput(f"{FIELD} = {name!r}: {place} has no class {title!r}; it has {listed}")
    return _method(method, f"{FIELD} = {name!r}")


def _method(value: Any, title: str) -> type:
    """`value`, if it is a method."""
    if not inspect.isclass(value):
        raise BadInput(f"{title} is not a method: it is of type {type(value).__name__}, not a class")
    if lacking := _lacks(value):
        raise BadInput(f"{title} is not a method: it lacks {', '.join(lacking)}")
    for verb, arguments in CALLED.items():
        if wrong := _wrong_call(getattr(value, verb), arguments):
            right = f"def {verb}({', '.join(('self', *arguments))})"
            raise BadInput(f"{title}: the engine cannot call its {verb}: {wrong}; write {right}")
    return value


def _wrong_call(verb: Any, arguments: tuple[str, ...]) -> str:
    """Why a function of a class cannot be called with these arguments after `self`; empty where it can."""
    if inspect.iscoroutinefunction(verb) or inspect.isgeneratorfunction(verb):
        return "it is a coroutine or a generator"
    try:
        inspect.signature(verb).bind("self", *arguments)
    except (TypeError, ValueError) as error:
        return str(error)
    return ""
