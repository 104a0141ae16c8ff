"""What the file of a method says about it, read without running it: `fedsim methods` answers without waiting for torch to import."""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]


def look_here_too() -> None:
    """From now on modules of a user's own, "module:name" in a job, are found in the working folder too, after all other places."""
    here = str(Path.cwd())
    if not {"", here} & set(sys.path):
        sys.path.append(here)


@dataclass(frozen=True)
class Parameter:
    """One hyperparameter of a method."""

    name: str
    kind: str  # its type, as the source writes it
    default: Any  # MISSING when the job must give it
    meaning: str  # the comment on its line


def docstring(file: Path) -> str:
    """The docstring of a module; empty where it has none."""
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""


def file_of(module: str) -> Path | None:
    """The file of a module, which is not run; only the packages around it are imported. None: it is not a file of Python."""
    spec = find_spec(module)
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def parameters(file: Path) -> list[Parameter] | None:
    """The hyperparameters of the one method in a file of fedsim; None where only the imported class can tell them."""
    source = file.read_text(encoding="utf-8")
    methods = [node for node in _classes(source).values() if _is_method(node, source)]
    if len(methods) != 1:
        return None
    try:
        return list(_fields(methods[0], source).values())
    except ValueError:  # a default that is computed
        return None


def comments(source: str) -> dict[str, str]:
    """The comment on the line of each field of the classes in `source`, so that the meaning of a field is written once."""
    return {name: _comment(field, source) for node in _classes(source).values() for name, field in _annotated(node).items()}


def _classes(source: str) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}


def _is_method(node: ast.ClassDef, source: str) -> bool:
    """A dataclass whose parents lead to `Method`; the verbs may be inherited."""
    bases = {ast.unparse(base).partition("[")[0] for base in node.bases}
    return _is_dataclass(node) and ("Method" in bases or any(_is_method(*parent) for parent in _parents(node, source)))


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any(ast.unparse(decorator).startswith("dataclass") for decorator in node.decorator_list)


def _fields(node: ast.ClassDef, source: str) -> dict[str, Parameter]:
    """Its fields in the order of a dataclass: those of its parents first."""
    found: dict[str, Parameter] = {}
    for parent, text in _parents(node, source):
        found |= _fields(parent, text)
    own = _annotated(node) if _is_dataclass(node) else {}
    return found | {name: _parameter(name, field, source) for name, field in own.items()}


def _parents(node: ast.ClassDef, source: str) -> Iterator[tuple[ast.ClassDef, str]]:
    """The parents that fedsim defines, the last one first, each with the source that it stands in."""
    imported = _imported(source)
    for base in reversed(node.bases):
        name = ast.unparse(base).partition("[")[0]
        text = imported[name].read_text(encoding="utf-8") if name in imported else source
        if name in (classes := _classes(text)):
            yield classes[name], text


def _imported(source: str) -> Mapping[str, Path]:
    """The file of each name that `source` imports from a module of fedsim."""
    lines = [node for node in ast.parse(source).body if isinstance(node, ast.ImportFrom) and str(node.module).startswith("fedsim.")]
    files = {str(node.module): PACKAGE.joinpath(*str(node.module).split(".")[1:]).with_suffix(".py") for node in lines}
    return {alias.name: files[str(node.module)] for node in lines for alias in node.names if files[str(node.module)].is_file()}


def _annotated(node: ast.ClassDef) -> dict[str, ast.AnnAssign]:
    return {part.target.id: part for part in node.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)}


def _parameter(name: str, field: ast.AnnAssign, source: str) -> Parameter:
    default = MISSING if field.value is None else ast.literal_eval(field.value)
    return Parameter(name, ast.unparse(field.annotation), default, _comment(field, source))


def _comment(field: ast.AnnAssign, source: str) -> str:
    lines = source.splitlines(keepends=True)[field.lineno - 1 : field.end_lineno]
    tokens = tokenize.generate_tokens(io.StringIO("".join(lines).lstrip()).readline)
    said = " ".join(token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT)
    return re.sub(r"^type: ignore\[[a-z-]+\](  # )?", "", said)
