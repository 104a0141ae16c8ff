"""What no field of a job can hold, whatever it means: dates, objects of Python, and numbers that no array or file can hold."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from datetime import date, datetime, time
from typing import Any

from fedsim.config.toml_values import written

LARGEST_WHOLE = 2**31 - 1
LARGEST = 1e38  # weights are float32
DEEPEST = 20  # tables and lists in each other
PLACE = 40  # signs of the place of a value that is nested too deeply


def foreign(table: Any, place: str = "", depth: int = 0) -> Iterator[str]:
    """A line for each value that no field of a job takes."""
    if depth > DEEPEST:
        yield f"{place[:PLACE]} …: lists or tables are nested too deeply; a job has sections with fields, and lists of values"
    elif isinstance(table, dict):
        for key, value in table.items():
            yield from foreign(value, f"{place}.{key}" if place else str(key), depth + 1)
    elif isinstance(table, list | tuple):
        for value in table:
            yield from foreign(value, place, depth + 1)
    elif isinstance(table, datetime | date | time):
        yield f"{place} = {table} is a date or a time; no field takes one. A text stands in quotes: {written(str(table))}"
    elif isinstance(table, str):
        if "\0" in table or any("\ud800" <= sign <= "\udfff" for sign in table):
            yield f"{place} = {table!r} has a sign that no text of a job can have: NUL, or half of a UTF-16 pair"
    elif not isinstance(table, int | float | os.PathLike | None):
        kind = type(table).__name__
        yield f"{place} is of type {kind}; a job has texts, numbers, true and false, lists and tables"


def too_large(settings: Any, place: str) -> Iterator[str]:
    """A line for each number of a section, other than its default, that is larger than arrays and files can hold."""
    if not is_dataclass(settings):
        known = {name: info.default for name, info in type(settings).model_fields.items()}
    else:
        known = {field.name: field.default for field in fields(settings) if field.init}
    for name, default in known.items():
        value = getattr(settings, name)
        for number in value if isinstance(value, tuple) else (value,):
            limit = LARGEST_WHOLE if isinstance(number, int) else LARGEST
            if isinstance(number, int | float) and limit < abs(number) < float("inf") and value != default and "seed" not in name:
                yield f"{place}{name} = {number} is too large: should be at most {f'{limit:,}' if limit == LARGEST_WHOLE else limit}"
