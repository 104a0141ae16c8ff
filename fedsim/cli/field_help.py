"""`fedsim fields`: the sections of a job, or the fields of one with their types, defaults and meanings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedsim.errors import BadInput

if TYPE_CHECKING:
    from fedsim.config.field_list import JobField

METHOD = "the method and its fields: `fedsim methods` lists the methods, `fedsim methods NAME` the fields of one"
SWEEP = 'a list of values for each field that varies, for example "train.lr" = [0.1, 0.05]'


def add(app: typer.Typer) -> None:
    """Adds the command."""

    @app.command("fields")
    def list_fields(
        section: Annotated[str | None, typer.Argument(help="A section of a job, such as train; or a field, such as train.lr.")] = None,
    ) -> None:
        """List the fields of a job, with type, default and meaning."""
        show(section, Console(emoji=False))


def show(wanted: str | None, console: Console) -> None:
    """Prints the fields above the first section and the list of sections; or one section, or one field. BadInput for an unknown name."""
    from fedsim.config import field_list

    known = field_list.sections()
    if wanted is None:
        console.print(_table(known[""]), markup=False)
        console.print()
        console.print(_sections({name: field_list.about(name) for name in known if name}), markup=False)
        return
    section, _, field = wanted.strip("[]").partition(".")
    if section in ("method", "sweep"):
        console.print(METHOD if section == "method" else SWEEP, markup=False, highlight=False)
        return
    if not field and section in {each.name for each in known[""]}:
        section, field = "", section
    if section not in known:
        raise BadInput(
            f"fedsim fields {wanted}: a job has no such section. There are: {', '.join([*filter(None, known), 'method', 'sweep'])}"
        )
    found = [each for each in known[section] if field in ("", each.name)]
    if not found:
        names = ", ".join(each.name for each in known[section])
        raise BadInput(f"fedsim fields {wanted}: [{section}] has no field {field!r}. There are: {names}")
    console.print(_table(found), markup=False)


def _sections(abouts: dict[str, str]) -> Table:
    table = Table("section", "what it is", box=None, header_style="bold", pad_edge=False)
    for name, text in abouts.items():
        table.add_row(f"[{name}]", text)
        if name == "train":
            table.add_row("[method]", METHOD)
    table.add_row("[sweep]", SWEEP)
    return table


def _table(fields: Iterable[JobField]) -> Table:
    from fedsim.cli.method_help import default

    table = Table("field", "type", "default", "meaning", box=None, header_style="bold", pad_edge=False)
    for each in fields:
        table.add_row(each.name, each.kind, default(each.default), each.meaning)
    return table
