"""Every method with its paper and its parameters, as `fedsim methods NAME` prints them."""

from __future__ import annotations

import re

from fedsim.cli.method_help import default, kind
from fedsim.config import method_registry
from from_code.markdown import code, paragraphs, plain, table

SYMBOLS = re.compile(r"^Paper -> code: *(.*?)(?=\n\n|\Z)", re.DOTALL | re.MULTILINE)


def methods() -> str:
    """A list of all, then a part for each."""
    names = method_registry.own_names()
    overview = table(("method", "what it is"), ((f"[`{name}`](#method-{name})", plain(method_registry.headline(name))) for name in names))
    return "\n\n".join([overview, *map(method, names)])


def method(name: str) -> str:
    return f"(method-{name})=\n## `{name}`\n\n{_about(method_registry.about(name))}\n\n{_parameters(name)}"


def _about(text: str) -> str:
    found = SYMBOLS.search(text)
    if not found:
        return paragraphs(text)
    before, after = text[: found.start()].strip(), text[found.end() :].strip("\n")
    return "\n\n".join(part for part in (paragraphs(before), _symbols(found[1]), paragraphs(after)) if part)


def _symbols(text: str) -> str:
    """The paper's symbols and their names in the code, a row each."""
    entries = re.split(r"[,;]\s\s+", re.sub(r",\n\s*", ",  ", text.strip()))
    pairs = [entry.partition(" -> ") for entry in entries]
    return table(("in the paper", "in the code"), ((plain(left), plain(right)) for left, _, right in pairs))


def _parameters(name: str) -> str:
    found = method_registry.free_parameters(name)
    if not found:
        return "No hyperparameters of its own; see [train] among the [fields of a job](/reference/fields.md)."
    rows = ((code(each.name), code(kind(each.kind)), code(default(each.default)), plain(each.meaning)) for each in found)
    return table(("field", "type", "default", "meaning"), rows)
