"""Dataclasses of trees, tensors and plain numbers, as JSON and named tensors: what ranks exchange and checkpoints hold; never pickle.

A class is written as "module:Qualname", so it must be importable where the value is read. What comes from another rank may name any class,
what comes from a disk only those that `storage/known_classes.py` knows. Every JSON object here is one of

    {"tensor": name}   {"float": "nan" | "inf" | "-inf"}   {"tuple": […]}   {"dict": {key: value}}   {"items": [[key, value], …]}
    {"of": class, "fields": {…}}   a dataclass      {"of": class, "value": …}   a class with `__dump__` and `__load__`

and None, bool, int, finite float, str and list stand for themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache, partial
from importlib import import_module
from math import isfinite
from typing import Any

from torch import Tensor

Tree = dict[str, Tensor]
Json = Any
Names = dict[int, tuple[str, Tensor]]  # by id; the tensor stays alive so that no other takes its id

_ITSELF = (int, str, bool, type(None))
_HOLDS = "None, bool, int, float, str, Tensor, list, tuple, dict and dataclasses of them"


def dump(value: Any) -> tuple[Json, Tree]:
    """`value` as strict JSON and the tensors it names, by their path ("shared/w/conv1.weight").

    Tensors are detached, neither copied nor moved; one that stands at two places is named once. Raises TypeError at a
    value of any other kind, with its path.

    >>> import torch
    >>> plain, tensors = dump({"round": 3, "shared": {"w/a": torch.ones(2)}})
    >>> plain
    {'dict': {'round': 3, 'shared': {'dict': {'w/a': {'tensor': 'shared/w/a'}}}}}
    >>> load(plain, tensors)
    {'round': 3, 'shared': {'w/a': tensor([1., 1.])}}
    """
    tensors: Tree = {}
    return _dump(value, "", tensors, {}), tensors


def load(plain: Json, tensors: Tree, find: Callable[[str], type] | None = None) -> Any:
    """The value that `dump` was given; dataclasses are built by their constructor.

    find: gives the class of an address, or refuses it; without it the module is imported, which is for what this program's own ranks send.
    Raises ValueError for JSON that `dump` did not make, and for a tensor or a field that does not exist; TypeError for a class that is
    no dataclass and has no `__load__`.
    """
    kind = type(plain)
    if kind in _ITSELF or kind is float:
        return plain
    again = partial(load, tensors=tensors, find=find)
    if kind is list:
        return [again(entry) for entry in plain]
    if kind is dict and "of" in plain:
        return _load_object(plain, again, find or _class)
    if kind is dict and "tensor" in plain:
        return _load_tensor(plain, tensors)
    for tag, read in _READ.items():
        if kind is dict and tag in plain:
            return read(plain[tag], again)
    tags = ("tensor", "of", *_READ)
    raise ValueError(f"{str(plain)[:60]!r} was not written by dump: a JSON object has one of the keys {', '.join(tags)}")


def classes(plain: Json) -> set[str]:
    """The addresses of all classes in what `dump` gave."""
    if isinstance(plain, list):
        return set().union(*map(classes, plain))
    if not isinstance(plain, dict):
        return set()
    return ({plain["of"]} if "of" in plain else set()).union(*map(classes, plain.values()))


def _dump(value: Any, path: str, tensors: Tree, names: Names) -> Json:
    kind: Any = type(value)
    if kind in _ITSELF:
        return value
    if kind is float:
        return value if isfinite(value) else {"float": repr(value)}
    if isinstance(value, Tensor):
        return {"tensor": _name(value, path, tensors, names)}
    if kind is list or kind is tuple:
        entries = [_dump(entry, _join(path, i), tensors, names) for i, entry in enumerate(value)]
        return entries if kind is list else {"tuple": entries}
    if kind is dict:
        return _dump_dict(value, path, tensors, names)
    if hasattr(kind, "__dump__"):
        return {"of": _address(kind), "value": _dump(value.__dump__(), path, tensors, names)}
    if hasattr(kind, "__dataclass_fields__"):
        parts = {name: _dump(getattr(value, name), _join(path, name), tensors, names) for name in _fields(kind)}
        return {"of": _address(kind), "fields": parts}
    raise TypeError(f"{path or 'the value'} is a {kind.__module__}.{kind.__qualname__}; what is stored or sent is made of {_HOLDS}")


def _dump_dict(value: dict[Any, Any], path: str, tensors: Tree, names: Names) -> Json:
    entries = [(key, _dump(entry, _join(path, key), tensors, names)) for key, entry in value.items()]
    if all(type(key) is str for key in value):
        return {"dict": dict(entries)}
    return {"items": [[_dump(key, _join(path, "key"), tensors, names), entry] for key, entry in entries]}


def _join(path: str, part: object) -> str:
    return f"{path}/{part}" if path else str(part)


def _name(value: Tensor, path: str, tensors: Tree, names: Names) -> str:
    """The tensor's name: its path, with a number behind it where two paths read the same."""
    if id(value) not in names:
        name, count = path or "value", 1
        while name in tensors:
            count += 1
            name = f"{path}#{count}"
        names[id(value)] = name, value
        tensors[name] = value.detach()
    return names[id(value)][0]


@cache
def _fields(kind: type) -> tuple[str, ...]:
    """The fields a constructor takes; the others follow from them."""
    return tuple(entry.name for entry in fields(kind) if entry.init)


@cache
def _address(kind: type) -> str:
    """ "module:Qualname" of a class; TypeError if it cannot be imported by that name."""
    address = f"{kind.__module__}:{kind.__qualname__}"
    if "<locals>" in address or _class(address) is not kind:
        raise TypeError(f"{address} cannot be imported by that name; define the class at the top of a module")
    return address


@cache
def _class(address: str) -> type:
    """The class at "module:Qualname"; TypeError unless it is a dataclass or has `__load__`."""
    module, _, qualname = address.partition(":")
    found: Any = import_module(module)
    for name in qualname.split("."):
        found = getattr(found, name)
    return buildable(address, found)


def buildable(address: str, found: Any) -> type:
    """The class itself; TypeError where it is none that `load` builds."""
    if not (isinstance(found, type) and (is_dataclass(found) or hasattr(found, "__load__"))):
        raise TypeError(f"{address} is neither a dataclass nor a class with __dump__ and __load__")
    return found


def _load_object(plain: Json, again: Callable[[Json], Any], find: Callable[[str], type]) -> Any:
    kind: Any = find(plain["of"])
    if "value" in plain:
        return kind.__load__(again(plain["value"]))
    unknown = plain["fields"].keys() - _fields(kind)
    if unknown:
        raise ValueError(f"{plain['of']} has no field {sorted(unknown)[0]!r}; it has {', '.join(_fields(kind)) or 'none'}")
    return kind(**{name: again(entry) for name, entry in plain["fields"].items()})


def _load_tensor(plain: Json, tensors: Tree) -> Tensor:
    if plain["tensor"] not in tensors:
        raise ValueError(f"tensor {plain['tensor']!r} is missing; there are {', '.join(sorted(tensors)[:20]) or 'none'}")
    return tensors[plain["tensor"]]


_READ: dict[str, Callable[[Json, Callable[[Json], Any]], Any]] = {
    "tuple": lambda held, again: tuple(again(entry) for entry in held),
    "dict": lambda held, again: {key: again(entry) for key, entry in held.items()},
    "items": lambda held, again: {again(key): again(entry) for key, entry in held},
    "float": lambda held, again: float(held),
}
