"""Messages about a wrong job: one line for each error, which names the field first and then what would be right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from fedsim.config import method_registry
from fedsim.config.toml_values import listed, written
from fedsim.storage import former_names

KINDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", dict: "a table", Any: "a value"}
LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "min_length": "with a length of at least"}
OTHERS = 4  # methods that a message names
SHOWN = 200  # signs of a wrong value
UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
MISSED = ("missing", "missing_argument")


@dataclass(frozen=True)
class FieldHelp:
    """What messages say about a field: the values that it takes, and its default."""

    name: str
    wanted: str  # "a whole number, at least 1"
    default: Any  # MISSING when the job must give it

    def __str__(self) -> str:
        return self.name if _has_no_default(self.default) else f"{self.name} = {written(self.default)}"


def _has_no_default(default: Any) -> bool:
    return default is None or default is MISSING or default == {}


def complain(error: ValidationError, job: type[BaseModel], table: dict[str, Any]) -> list[str]:
    """A line for each error in `table`. A field of several possible types has one error for each type in pydantic, and one line here."""
    errors = error.errors(include_url=False)
    lines = [line for each in errors for line in _line(each, job, table).splitlines()]
    return [*dict.fromkeys(lines), *_of_another_method(errors, job, table)]


def _of_another_method(errors: Sequence[Any], job: type[BaseModel], table: dict[str, Any]) -> list[str]:
    """A line where [method] has fields of another method than it names, as after --set method.name: whose they are, how to drop them."""
    fields = [str(each["loc"][-1]) for each in errors if each["loc"][:1] == ("method",) and each["type"] in UNKNOWN]
    if not fields:
        return []
    own = field_helps(method_registry.find(table["method"]["name"]))
    fields = [field for field in fields if not _hint(field, own, "[method]", job, table["method"]["name"])]
    known = {name: {each.name for each in method_registry.free_parameters(name)} for name in method_registry.own_names()}
    having = [name for name, parameters in known.items() if parameters.issuperset(fields)]
    if not having or not fields:
        return []
    given = {key: value for key, value in table["method"].items() if key not in fields}
    owners = having if len(having) <= OTHERS else [*having[:OTHERS], f"{len(having) - OTHERS} more"]
    is_, it = ("are fields", "them") if len(fields) > 1 else ("is a field", "it")
    return [f"[method] {listed(fields)} {is_} of {listed(owners)}; to leave {it} out: --set 'method={written(given)}'"]


def field_helps(kind: type) -> dict[str, FieldHelp]:
    """The fields of a settings dataclass, a pydantic section or a method, in the order they are written."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: FieldHelp(name, _wanted(hints[name]), default) for name, default in _defaults(kind)}


def _defaults(kind: Any) -> Iterable[tuple[str, Any]]:
    if issubclass(kind, BaseModel):
        for name, info in kind.model_fields.items():
            yield name, MISSING if info.is_required() else info.get_default(call_default_factory=True, validated_data={})
        return
    for field in fields(kind):
        if field.init:
            yield field.name, field.default if field.default_factory is MISSING else field.default_factory()


def _line(error: Any, job: type[BaseModel], table: dict[str, Any]) -> str:
    section, *rest = (str(part) for part in error["loc"]) if error["loc"] else ("",)
    if section == "method" and rest[:1] == ["use"]:
        rest = rest[1:]  # where the job's model holds the method itself
    if error["type"] == "value_error":
        return _placed(str(error["ctx"]["error"]), ".".join([section, *rest]))
    kind = _kind(section, job, table)
    if rest and kind is not None:
        return _message(error["type"], rest[0], field_helps(kind), f"[{section}]", _title(section, table), table[section], job)
    if kind is not None:
        return f"[{section}] is a section, not {_short(written(table.get(section)))}: write [{section}] and its fields below it"
    return _message(error["type"], section, field_helps(job), "", "A job", table, job)


def _placed(message: str, place: str) -> str:
    names_itself = message.startswith(("[", f"{place.partition('.')[0]}."))  # checks of settings classes name their field
    return message if names_itself or not place else f"[{place}] {message}"


def _kind(section: str, job: type[BaseModel], table: dict[str, Any]) -> type | None:
    """The class that owns a section; None for a plain field of the job."""
    if section == "method":
        return method_registry.find(table["method"]["name"])
    hint = get_type_hints(job).get(section)
    return hint if is_dataclass(hint) or _is_model(hint) else None


def _is_model(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, BaseModel)


def _title(section: str, table: dict[str, Any]) -> str:
    return str(table["method"]["name"]) if section == "method" else f"[{section}]"


def _message(type_: str, field: str, known: dict[str, FieldHelp], place: str, title: str, given: Any, job: type[BaseModel]) -> str:
    start = f"{place} " if place else ""
    if type_ in UNKNOWN:
        listed = ", ".join(_named(about, job) if not place else str(about) for about in known.values())
        has = f"{title} has: {listed}" if known else f"{title} has no fields of its own"
        return f"{place or 'a job'} has no field {field!r}{_hint(field, known, place, job, title)}. {has}"
    about = known[field]
    if type_ in MISSED:
        return f"{start}needs {field}: {about.wanted}"
    default = "" if _has_no_default(about.default) else f"; the default is {written(about.default)}"
    finite = ", and finite" if type_ == "finite_number" else ""
    value = f"{_short(written(given[field]))}{_value_hint(place, field, given[field])}"
    return f"{start}{field} = {value}: should be {about.wanted}{finite}{default}"


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} …"


def _value_hint(place: str, field: str, value: Any) -> str:
    """What a value is called now."""
    former = former_names.FLEETS if (place, field) == ("[execution]", "fleet") else {}
    return f" (it is called {written(former[value])} now)" if isinstance(value, str) and value in former else ""


def _named(about: FieldHelp, job: type[BaseModel]) -> str:
    """A field of the job itself; sections in brackets."""
    hint = get_type_hints(job)[about.name]
    return f"[{about.name}]" if is_dataclass(hint) or _is_model(hint) or about.name == "sweep" else str(about)


def _hint(field: str, known: dict[str, FieldHelp], place: str, job: type[BaseModel], method: str = "") -> str:
    """For an unknown field: its new name, a similar name in the same section, or the section that has it."""
    if now := former_names.fields_of(place.strip("[]"), method).get(field):
        return f" (it is called {now!r} now)"
    if close := get_close_matches(field, known, 1):
        return f" (did you mean {close[0]!r}?)"
    hints = {name: hint for name, hint in get_type_hints(job).items() if is_dataclass(hint) or _is_model(hint)}
    homes = [f"[{name}]" for name, hint in hints.items() if name != "method" and field in field_helps(hint)]
    return f" (it belongs to {' or '.join(homes)})" if homes else ""


def _wanted(hint: Any) -> str:
    """A type in words: Annotated[int, Field(ge=1)] -> "a whole number, at least 1"."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        info = next((extra for extra in inner[1:] if isinstance(extra, FieldInfo)), None)
        return (info.description if info and info.description else None) or ", ".join([_wanted(inner[0]), *_limits(info)])
    if origin in (Union, UnionType):
        return " or ".join(_wanted(part) for part in inner if part is not NoneType)
    if origin is Literal:
        return " or ".join(written(value) for value in inner)
    if origin in (tuple, list):
        return f"a list, each {_wanted(inner[0])}"
    return KINDS.get(origin or hint, getattr(hint, "__name__", str(hint)))


def _limits(info: FieldInfo | None) -> Iterable[str]:
    for limit in info.metadata if info else ():
        for name, words in LIMITS.items():
            if (value := getattr(limit, name, None)) is not None:
                yield f"{words} {value}"
