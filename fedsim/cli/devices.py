"""`fedsim devices`: the mixes of devices that come with fedsim, or one of them, or a user's file, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from fedsim.devices.kind import DeviceKind
    from fedsim.devices.mix import DeviceMix

NAME = "A mix that comes with fedsim, or a TOML or CSV file of yours, which is checked."


def add(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command()(devices)


def devices(name: Annotated[str | None, typer.Argument(metavar="NAME | FILE", help=NAME)] = None) -> None:
    """List the mixes of emulated devices; or show the kinds of one with their figures and where these are from."""
    from fedsim.devices.reading import built_in, read_mix

    console = Console(emoji=False)
    if name is None:
        console.print(_all([read_mix(each) for each in built_in()]), markup=False)
        console.print(
            "\n`fedsim devices NAME` shows the figures of a mix; a file like these can be your own.", markup=False, highlight=False
        )
        return
    mix = read_mix(name)
    console.print(f"{mix.name}: {mix.about}" if mix.about else mix.name, markup=False, highlight=False)
    console.print(_kinds(mix), markup=False)
    for kind in mix.kinds:
        if kind.about or kind.source:
            console.print(f"\n{kind.name}: {kind.about}".rstrip(), markup=False, highlight=False)
            console.print(f"figures: {kind.source or 'no source is given'}", markup=False, highlight=False)


def _all(mixes: list[DeviceMix]) -> Table:
    table = Table("mix", "kinds", "what it is", box=None, header_style="bold", pad_edge=False)
    for mix in mixes:
        table.add_row(mix.name, ", ".join(mix.names), mix.about)
    return table


def _kinds(mix: DeviceMix) -> Table:
    """A column for each kind, a line for each figure."""
    table = Table("", *mix.names, box=None, header_style="bold", pad_edge=False)
    for column in table.columns[1:]:
        column.justify, column.overflow = "right", "fold"
    for label, shown in LINES.items():
        table.add_row(label, *(shown(kind) for kind in mix.kinds))
    return table


def _number(value: float, unit: str) -> str:
    from fedsim.reporting.formatting import quantity

    return quantity(value, unit) if value else f"0 {unit}"


def _sparse(kind: DeviceKind) -> str:
    if isinstance(kind.sparse, str):
        return kind.sparse
    return ", ".join(f"{density}: {share:g}" for density, share in kind.sparse.items())


def _available(kind: DeviceKind) -> str:
    if isinstance(kind.available, Mapping):
        from fedsim.devices.availability import DAY

        return f"{kind.available['share']:.0%} of {kind.available.get('period', DAY):,g} s"
    return kind.available if isinstance(kind.available, str) else f"{kind.available:.0%} of rounds"


LINES = {
    "share of clients": lambda kind: f"{kind.share:.0%}",
    "speed": lambda kind: _number(kind.flops, "FLOP/s"),
    "overhead of a step": lambda kind: f"{1e3 * kind.overhead:g} ms",
    "memory": lambda kind: _number(kind.memory, "B"),
    "down": lambda kind: _number(kind.down, "bit/s"),
    "up": lambda kind: _number(kind.up, "bit/s"),
    "latency": lambda kind: f"{1e3 * kind.latency:g} ms",
    "power: computing": lambda kind: f"{kind.power:g} W",
    "power: sending": lambda kind: f"{kind.power_radio:g} W",
    "power: waiting": lambda kind: f"{kind.power_idle:g} W",
    "sparse time": _sparse,
    "available": _available,
    "fails in a round": lambda kind: f"{kind.fails:.0%}",
    "spread": lambda kind: f"{kind.spread:g}",
}
