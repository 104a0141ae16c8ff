"""`fedsim methods`: the list of methods; or one method with its paper, its hyperparameters and their defaults."""

from __future__ import annotations

import re
from dataclasses import MISSING

from rich.console import Console
from rich.table import Table

from fedsim.config import method_registry
from fedsim.config.method_source import Parameter
from fedsim.config.toml_values import written


def show(name: str | None, console: Console) -> None:
    """Prints all methods, or one; BadInput for an unknown name."""
    if name is None:
        console.print(_all(), markup=False)
        for line in method_registry.shadowed():
            console.print(f"\n{line}", markup=False, highlight=False)
        return
    about, parameters = method_registry.about(name), method_registry.free_parameters(name)
    console.print(_flowing(about), markup=False, highlight=False)
    console.print()
    console.print(_parameters(parameters) if parameters else "No hyperparameters of its own; see [train].", markup=False)


def _flowing(text: str) -> str:
    """A docstring without line ends inside its paragraphs, so that the terminal breaks the lines. Indented lines stay as they are."""
    return re.sub(r"(?<=\S)\n(?=\S)", " ", text)


def default(value: object) -> str:
    """A default as a job writes it; a dash for None, which TOML cannot write."""
    return "required" if value is MISSING else "-" if value is None else written(value)


def kind(written: str) -> str:
    """A type as a job's author reads it: Literal['a', 'b'] is "a" | "b"."""
    written = written.replace("dict[str, float]", "float by kind of device")
    return re.sub(r"Literal\[(.*?)\]", lambda match: match[1].replace("'", '"').replace(", ", " | "), written)


def _all() -> Table:
    table = Table("method", "what it is", box=None, header_style="bold", pad_edge=False)
    for name in method_registry.names():
        table.add_row(name, method_registry.headline(name))
    return table


def _parameters(parameters: list[Parameter]) -> Table:
    table = Table("field", "type", "default", "meaning", box=None, header_style="bold", pad_edge=False)
    for each in parameters:
        table.add_row(each.name, kind(each.kind), default(each.default), each.meaning)
    return table
