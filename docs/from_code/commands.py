"""Every command with its options, from the program itself."""

from __future__ import annotations

import re

import typer
from typer.core import TyperCommand, TyperGroup

from fedsim.cli.commands import app
from from_code.markdown import code, plain, table

TYPE = re.compile(r" <[\w\[\]]+>$")  # that typer shows behind the name of an argument: text or a path


def commands() -> str:
    """A part for each, in the order of `fedsim --help`."""
    program = typer.main.get_command(app)
    assert isinstance(program, TyperGroup)
    context = typer.Context(program, info_name="fedsim")
    found = {name: program.commands[name] for name in program.list_commands(context)}
    return "\n\n".join(_command(name, each, context) for name, each in found.items() if isinstance(each, TyperCommand))


def _command(name: str, command: TyperCommand, above: typer.Context) -> str:
    context = typer.Context(command, info_name=name, parent=above)
    usage = " ".join(["fedsim", name, *command.collect_usage_pieces(context)])
    records = [record for each in command.params if (record := each.get_help_record(context))]
    rows = [(code(TYPE.sub("", option.removeprefix("* "))), _help(text)) for option, text in records]
    about = _help(command.help or "")
    options = table(("argument or option", "what it does"), rows)
    return f"(command-{name})=\n## `fedsim {name}`\n\n{about}\n\n```text\n{usage}\n```\n\n{{.options}}\n{options}"


def _help(text: str) -> str:
    """A help text: rich's escaped brackets as plain ones, paragraphs kept apart."""
    return re.sub(r"\n\n+", "<br>", plain(text.replace("\\[", "[").strip()))
