"""The tables that `fedsim data` prints: of images, of clients, and of the file that was written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from fedsim.config.toml_values import written
from fedsim.reporting.formatting import quantity

if TYPE_CHECKING:
    from fedsim.data.conversion.source import Source
    from fedsim.data.population import Population
    from fedsim.data.showing.description import Description, Part

Ints = NDArray[np.int64]
ROWS = 40  # classes or clients at most of which a table has a row each
BINS, BAR = 10, 40  # of a histogram; signs of its longest bar
NAME = 30  # letters of a name at most
NEAR = 0.005  # by which the published mean of a data set may differ from the one of its images
WORDS = {"train": "training", "test": "test"}


def of_images(source: str, found: Source, shown: Description) -> list[RenderableType]:
    """What the images are, and how many each class has."""
    counts = ", ".join(f"{part.images:,} {WORDS[name]} images" for name, part in shown.parts.items())
    classes = len(next(iter(shown.parts.values())).classes)
    lines: list[RenderableType] = [Text.assemble((source, "bold"), f"  {counts}, {classes} classes"), "", _facts(found, shown), ""]
    lines.append(_classes(shown, classes))
    return [*lines, *(Text(f"\n{note}", "yellow") for note in shown.notes)]


def of_clients(population: Population, width: int) -> list[RenderableType]:
    """How the job deals the images to its clients."""
    record, counts = population.record, population.counts()
    parts = {name: int(population.shards[name].sizes().sum()) for name in ("train", "held", "test", "public")}
    named = ", ".join(f"{key} = {value}" for key, value in record["parameters"].items())
    lines: list[RenderableType] = [
        Text.assemble((f"{record['scheme']}", "bold"), f"  {population.clients:,} clients, seed {record['seed']}"),
        Text(named, "dim"),
        f"{parts['train']:,} images to train, {parts['held']:,} held out, {parts['test']:,} to test, {parts['public']:,} of the server",
        *(Text(str(warning), "yellow") for warning in record["warnings"]),
        "",
    ]
    names = population.names.get("client")
    called = [_short(name) for name in names] if names else [str(k) for k in range(min(population.clients, ROWS))]
    if counts is not None and population.clients <= ROWS:
        table = _each_class(counts, called, population.names.get("class"))
        return [*lines, table if _width(table, counts) <= width else _each_client(counts, called)]
    sizes = population.shards["train"].sizes()
    lines.append(_histogram("images", sizes))
    return lines if counts is None else [*lines, "", _histogram("classes", (counts > 0).sum(1))]


def of_file(out: Path, shown: Description) -> list[str]:
    """What was written, and the lines of a job that read it."""
    lines = [f"{out}: {quantity(out.stat().st_size, 'B')}. In a job:", "", "[data]", 'name = "file"', f"path = {written(str(out))}"]
    channels, height, width = shown.shape
    if channels > 1 and (width <= 4 or height != width):
        lines.append('layout = "nchw"')
    if shown.parts["train"].users:
        lines += ["", "[partition]", 'name = "natural"  # a client for each user']
    return lines


def _facts(found: Source, shown: Description) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    first = next(iter(shown.parts.values()))
    channels, height, width = shown.shape
    table.add_row("images", f"({channels}, {height}, {width}) (C, H, W), uint8")
    mean, std = first.moments()
    table.add_row("mean", _numbers(mean))
    table.add_row("deviation", f"{_numbers(std)}, of the training pixels / 255")
    data = getattr(found, "train", None)
    used = getattr(data, "mean", None)
    if used is not None and max(abs(a - b) for a, b in zip(used, mean, strict=True)) > NEAR:
        table.add_row("normalised by", f"{_numbers(used)} and {_numbers(data.std)}")  # type: ignore[union-attr]
    for name, part in shown.parts.items():
        if part.users:
            table.add_row(f"{WORDS[name]} users", _users(part, shown))
    return table


def _users(part: Part, shown: Description) -> str:
    sizes = list(part.users.values())
    text = f"{len(sizes):,} with {min(sizes):,} to {max(sizes):,} images"
    known = shown.parts["train"].users if "train" in shown.parts else part.users
    new = len(part.users.keys() - known.keys())
    return text + (f"; {new:,} of them have no training images" if new else "")


def _classes(shown: Description, classes: int) -> Table:
    table = Table("class", box=None, header_style="bold", pad_edge=False)
    if shown.class_names:
        table.add_column("name")
    for name in shown.parts:
        table.add_column(name, justify="right")
    for label in range(classes if classes <= ROWS else ROWS // 2):
        names = [Text(_short(shown.class_names[label]))] if shown.class_names else []
        table.add_row(str(label), *names, *(f"{part.classes[label]:,}" for part in shown.parts.values()))
    if classes > ROWS:
        rest = [part.classes[ROWS // 2 :] for part in shown.parts.values()]
        others = f"{classes - ROWS // 2} more"
        table.add_row(others, *([""] if shown.class_names else []), *(_span(count) for count in rest), style="dim")
    return table


def _each_class(counts: Ints, clients: Sequence[str], classes: Sequence[str] | None) -> Table:
    """A column for each class."""
    table = Table("client", box=None, header_style="bold", pad_edge=False)
    for label in range(counts.shape[1]):
        table.add_column(Text(_short(classes[label], 6) if classes else str(label)), justify="right", no_wrap=True)
    table.add_column("all", justify="right", no_wrap=True)
    for name, row in zip(clients, counts, strict=True):
        table.add_row(Text(name), *(Text(f"{count}", "" if count else "dim") for count in row), f"{row.sum():,}")
    return table


def _width(table: Table, counts: Ints) -> int:
    """Letters of a line of `_each_class` at most."""
    most = len(f"{counts.sum(1).max():,}")
    return sum(max(len(str(column.header)), most) + 2 for column in table.columns[1:]) + max(
        len(str(cell)) for cell in table.columns[0].cells
    )


def _each_client(counts: Ints, clients: Sequence[str]) -> Table:
    """How many classes each client has, and which of them is its largest."""
    table = Table("client", "images", "classes", "largest class", box=None, header_style="bold", pad_edge=False)
    for name, row in zip(clients, counts, strict=True):
        total = int(row.sum())
        largest = f"{row.argmax()} ({row.max() / total:.0%})" if total else "-"
        table.add_row(Text(name), f"{total:,}", str((row > 0).sum()), largest)
    return table


def _histogram(what: str, values: Ints) -> Table:
    """How many clients have how many images, or classes."""
    low, high = int(values.min()), int(values.max())
    edges = np.unique(np.linspace(low, high + 1, min(BINS, high - low + 1) + 1).round().astype(np.int64))
    count = np.histogram(values, edges)[0]
    table = Table(what, "clients", "", box=None, header_style="bold", pad_edge=False)
    for begin, end, clients in zip(edges[:-1].tolist(), (edges[1:] - 1).tolist(), count.tolist(), strict=True):
        bar = "#" * -(-clients * BAR // int(count.max()))
        table.add_row(f"{begin:,}" if begin == end else f"{begin:,} to {end:,}", f"{clients:,}", bar)
    return table


def _span(counts: Ints) -> str:
    return f"{counts.min():,}" if counts.min() == counts.max() else f"{counts.min():,} to {counts.max():,}"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def _short(name: str, letters: int = NAME) -> str:
    return name if len(name) <= letters else f"{name[: letters - 1]}…"
