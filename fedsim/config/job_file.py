"""The table in a job file, before anything is validated. It imports nothing heavy, so that a wrong path is answered at once."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from datetime import date, datetime, time
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fedsim.config.toml_values import written
from fedsim.errors import BadInput

HDF5 = b"\x89HDF\r\n\x1a\n"  # how its files begin


def table_of(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The table in a job file, with some `section.field=value` replaced, and with the name of the file unless the job gives one."""
    table = {"name": path.stem, **read_table(path)}
    for item in overrides:
        override(table, item)
    return table


def read_table(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")  # some editors begin a file with a mark of its byte order
        return tomllib.loads(text)
    except FileNotFoundError:
        near = get_close_matches(path.name, [other.name for other in path.parent.glob("*.toml")], 3) if path.parent.is_dir() else []
        raise BadInput(f"{path}: no such job file{'; did you mean ' + ' or '.join(near) + '?' if near else ''}") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        if data.startswith(HDF5):
            raise BadInput(f"{path}: an HDF5 file, and no job; a job is a TOML file. `fedsim show {path}` shows a run file") from None
        raise BadInput(f"{path}: not a text in UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise BadInput(f"{path}: lists or tables are nested too deeply; a job has sections with fields, and lists of values") from None
    except tomllib.TOMLDecodeError as error:
        found = re.search(r" \(at line (\d+), column (\d+)\)$", str(error))
        line, message = (found[1], str(error)[: found.start()]) if found else (str(text.count("\n") + 1), str(error))
        raise BadInput(f"{path}, line {line}: not valid TOML: {message}") from None


def override(table: dict[str, Any], item: str) -> None:
    """What `--set` does with "section.field=value", and with "section.field=", which leaves the field out of the job."""
    key, equals, text = item.partition("=")
    if not equals or not key.strip():
        raise _no_setting(item)
    if not text.strip():
        _unset(table, key.strip())
        return
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        value = text.strip()
        if value.startswith(("{", "[")):
            quoted = "a shell takes the quotes out of it, unless it stands in single quotes, as in --set 'method={name = \"fedavg\"}'"
            raise BadInput(f"--set {item}: not a table or a list of TOML; {quoted}") from None
    if isinstance(value, datetime | date | time):  # no field takes one; execution.time_limit=01:30:00 is meant as a text
        value = text.strip()
    set_field(table, key.strip(), value)


def set_field(table: dict[str, Any], key: str, value: Any) -> None:
    """What `--set key=value` does to a job's table: the field gets this value, and [sweep] does not vary it."""
    if not key:
        raise _no_setting(f"={value if isinstance(value, str) else written(value)}")
    put(table, key, value)
    _do_not_sweep(table, key)


def _unset(table: dict[str, Any], key: str) -> None:
    """The table without a field or a section, so that it has its default; [sweep] does not vary it either."""
    *sections, field = key.split(".")
    inner: Any = table
    for section in sections:
        inner = inner.get(section, {}) if isinstance(inner, dict) else None
    if not isinstance(inner, dict):
        raise BadInput(f"--set {key}=: {'.'.join(sections)} is a value, not a section")
    inner.pop(field, None)
    _do_not_sweep(table, key)


def _do_not_sweep(table: dict[str, Any], key: str) -> None:
    swept = flat(table.get("sweep", {}))
    if isinstance(swept, dict):
        table["sweep"] = {name: values for name, values in swept.items() if name != key}


def _no_setting(item: str) -> BadInput:
    return BadInput(f"--set {item}: write section.field=value, for example --set train.lr=0.1")


def put(table: dict[str, Any], key: str, value: Any) -> None:
    """Writes the value at "section.field" of a table. BadInput where the section is no table."""
    *sections, field = key.split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise BadInput(f"{key} = {value!r}: {section} is a value, not a section")
    table[field] = value


def flat(table: Any, prefix: str = "") -> Any:
    """A table with keys "section.field", however it is nested."""
    if not isinstance(table, dict):
        return table
    entries: dict[str, Any] = {}
    for key, value in table.items():
        entries |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return entries
