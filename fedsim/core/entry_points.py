"""Names that installed packages add to those of fedsim: methods, models, data sets and partitions, by entry points.

A package offers a method in its pyproject.toml by

    [project.entry-points."fedsim.methods"]
    mine = "package.module:Class"

and a job then says name = "mine". A name of fedsim itself always means fedsim's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from fedsim.errors import BadInput

METHODS = "fedsim.methods"  # a class, as "package.module:Class" in [method] name
MODELS = "fedsim.models"  # function(shape=(C, H, W), classes=…) -> torch.nn.Module, as model.factory
DATASETS = "fedsim.datasets"  # function(settings: DataSettings, seed: int) -> (training set, test set), each a fedsim.core.types.Data
PARTITIONS = "fedsim.partitions"  # function(labels, clients, rng=…, users=…) -> (n,) clients, as partition.name = "package.module:function"


def names(group: str) -> list[str]:
    """The names that installed packages offer in one of the groups."""
    return sorted({entry.name for entry in entry_points(group=group)})


def find(group: str, name: str, field: str) -> EntryPoint | None:
    """What a package offers under `name`; None: nothing. BadInput if two packages offer different things. `field` is the job's."""
    offers = sorted(entry_points(group=group, name=name), key=source)
    if len({entry.value for entry in offers}) > 1:
        raise BadInput(
            f"{field} = {name!r} is offered by several installed packages: {', '.join(map(source, offers))}; uninstall all but one"
        )
    return offers[0] if offers else None


def load(entry: EntryPoint, field: str) -> Any:
    """The object that an entry point names; BadInput if its module cannot be imported or lacks it."""
    try:
        return entry.load()
    except (Exception, SystemExit) as error:  # whatever the module raises, the message names the package that it belongs to
        what = f"{field} = {entry.name!r}: {source(entry)} cannot be imported"
        raise BadInput(f"{what}: {type(error).__name__}: {error}") from error


def own(place: str, field: str) -> Any:
    """What "package.module:name" in a job's `field` names, of the user's own code; BadInput where it cannot be had."""
    module, _, name = place.partition(":")
    if not module or not name:
        raise BadInput(f'{field} = {place!r} should be "package.module:name"')
    try:
        found = import_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's module raises, the job names what cannot be had
        looked = where_looked(error, module)
        raise BadInput(f"{field} = {place!r}: module {module!r} cannot be imported: {type(error).__name__}: {error}{looked}") from error
    if not hasattr(found, name):
        there = (
            ", ".join(each for each, value in vars(found).items() if getattr(value, "__module__", None) == module) or "nothing of its own"
        )
        raise BadInput(f"{field} = {place!r}: {module} has no {name!r}; it has {there}")
    return getattr(found, name)


def where_looked(error: BaseException, module: str) -> str:
    """Where a user's own module, that cannot be found, is looked for; empty for any other error."""
    if not isinstance(error, ModuleNotFoundError) or error.name != module.partition(".")[0]:
        return ""
    return f"; it is looked for in the working folder {Path.cwd()}, beside a script, and in PYTHONPATH"


def source(entry: EntryPoint) -> str:
    """Where an entry point leads, and the package that offers it: "package.module:Class of package 1.0"."""
    package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an installed package"
    return f"{entry.value} of {package}"


def unknown(field: str, name: str, known: Iterable[str], more: str = "") -> BadInput:
    """The error for a name that nothing has: a near name, all names, and what `more` there is."""
    known = list(known)
    close = get_close_matches(name, known, 1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return BadInput(f"{field} = {name!r} is not known{hint}. There are: {', '.join(known)}{more}")
