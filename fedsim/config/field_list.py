"""Every field of a job, by sections: its type, its default, and what it means, from where it is written."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from textwrap import dedent
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from fedsim.config import method_source
from fedsim.config.job import Job
from fedsim.config.toml_values import written

PLAIN = {int: "whole number", float: "number", bool: "true | false", str: "text"}
LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


@dataclass(frozen=True)
class JobField:
    """A field of a job."""

    name: str
    kind: str
    default: Any  # MISSING where the job must give it
    meaning: str


@cache
def sections() -> dict[str, tuple[JobField, ...]]:
    """The fields of each section in the order in which a job has them; under "" those above the first section."""
    hints = get_type_hints(Job, include_extras=True)
    parts = {name: _plain(hints[name]) for name in Job.model_fields}
    own = {name for name, kind in parts.items() if _is_section(kind)}
    first = tuple(each for each in _fields(Job) if each.name not in own | {"method", "sweep"})
    return {"": first} | {name: tuple(_fields(parts[name])) for name in parts if name in own}


def about(section: str) -> str:
    """The first line of a section's docstring."""
    return (inspect.getdoc(_plain(get_type_hints(Job)[section])) or "").partition("\n")[0]


def _is_section(kind: Any) -> bool:
    return inspect.isclass(kind) and (issubclass(kind, BaseModel) or (is_dataclass(kind) and kind.__name__ != "Chosen"))


def _plain(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _fields(section: Any) -> Iterator[JobField]:
    hints = get_type_hints(section, include_extras=True)
    meanings = method_source.comments(dedent(inspect.getsource(section)))
    described = section.model_fields if issubclass(section, BaseModel) else {}
    for name, default in _defaults(section).items():
        meaning = meanings.get(name, "") or (described[name].description or "" if name in described else "")
        yield JobField(name, kind_of(hints[name]), default, meaning)


def _defaults(section: Any) -> dict[str, Any]:
    if issubclass(section, BaseModel):
        known = {name: each.get_default(call_default_factory=True) for name, each in section.model_fields.items()}
        return {name: MISSING if value is PydanticUndefined else value for name, value in known.items()}
    return {each.name: each.default for each in fields(section)}


def kind_of(kind: Any) -> str:
    """A type as a job's author reads it.

    >>> kind_of(int | None), kind_of(Literal["a", "b"]), kind_of(tuple[str, ...])
    ('whole number', '"a" | "b"', 'list of text')
    """
    if get_origin(kind) is Annotated:
        plain, *limits = get_args(kind)
        said = [
            f"{word} {getattr(each, name):,}"
            for limit in limits
            for each in _each(limit)
            for name, word in LIMITS.items()
            if _has(each, name)
        ]
        return ", ".join([kind_of(plain), *said])
    if get_origin(kind) in (Union, UnionType):
        return " | ".join(kind_of(each) for each in get_args(kind) if each is not NoneType)
    if get_origin(kind) is Literal:
        return " | ".join(map(written, get_args(kind)))
    if get_origin(kind) in (tuple, list):
        return f"list of {kind_of(get_args(kind)[0])}"
    return PLAIN.get(kind, getattr(kind, "__name__", str(kind)))


def _each(limit: Any) -> list[Any]:
    """What a pydantic Field holds, or the limit itself."""
    return list(getattr(limit, "metadata", None) or [limit])


def _has(limit: Any, name: str) -> bool:
    return isinstance(getattr(limit, name, None), int | float)
