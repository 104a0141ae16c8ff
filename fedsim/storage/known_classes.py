"""Which classes a checkpoint may name: fedsim's own, and those that the code of a job's author has at hand.

Nobody vouches for a checkpoint, and a class is built by its constructor. So nothing that a checkpoint names is imported, but for the
modules of fedsim in which states are defined; and no class is built that the job's own modules neither define nor import.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from importlib import import_module
from importlib.util import find_spec
from types import FunctionType, ModuleType
from typing import Any

from fedsim.core.serialization import buildable

STATES = ("core", "costs", "federated", "fleet", "methods", "models", "nn", "pruning")  # packages of fedsim that define states
LIBRARIES = ("fedsim", "torch", "numpy")  # whose classes no author's module makes known


class UnknownClass(ValueError):
    """A class that no state of the job can be of."""


class KnownClasses:
    """Finds a class by its address "module:Qualname", or refuses it. own: the modules of the job's author, which are imported already."""

    def __init__(self, own: Collection[str] = ()) -> None:
        self._own = own
        self._reached: frozenset[str] | None = None

    def __call__(self, address: Any) -> type:
        """The class; UnknownClass for one that the job cannot mean, TypeError for one that is no state."""
        module, _, qualname = address.partition(":") if isinstance(address, str) else ("", "", "")
        found: Any = self._module(module, address)
        for name in qualname.split("."):
            found = vars(found).get(name) if isinstance(found, type | ModuleType) else None
        if found is None:
            raise AttributeError(f"{address!r:.80} is not there")
        if (getattr(found, "__module__", None), getattr(found, "__qualname__", None)) != (module, qualname):
            raise UnknownClass(f"{address!r:.80} is another class under that name")
        return buildable(address, found)

    def _module(self, name: str, address: Any) -> ModuleType:
        parts = name.split(".")
        if parts[0] == "fedsim" and len(parts) > 1 and parts[1] in STATES and all(part.isidentifier() for part in parts):
            if name not in sys.modules and find_spec(name) is None:
                raise ModuleNotFoundError(f"fedsim has no module {name!r}")
            return import_module(name)
        if self._reached is None:
            self._reached = reached(self._own)
        if name not in self._reached:
            own = ", ".join(sorted(self._own)) or "nothing of its own"
            raise UnknownClass(
                f"{address!r:.80} is no class that the job can mean; it uses fedsim and {own}, and what they import at their top"
            )
        return sys.modules[name]


def reached(own: Collection[str]) -> frozenset[str]:
    """The modules of an author, and those that they import at their top, and so on; but for those of Python and of LIBRARIES."""
    found, left = set[str](), list(own)
    while left:
        name = left.pop()
        module, top = sys.modules.get(name), name.partition(".")[0]
        if module is None or name in found or top in LIBRARIES or top in sys.stdlib_module_names:
            continue
        found.add(name)
        for value in list(vars(module).values()):
            if isinstance(value, ModuleType):
                left.append(value.__name__)
            elif isinstance(value, type | FunctionType) and isinstance(value.__module__, str):
                left.append(value.__module__)
    return frozenset(found)
