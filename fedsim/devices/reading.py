"""Reads a mix of devices: one of fedsim's own by its name, or a file of the user's. What is wrong is a BadInput with the file's name."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from fedsim.devices.availability import Trace
from fedsim.devices.client_rows import of_capacity, of_clients_alone, with_clients
from fedsim.devices.kind import FIELDS, DeviceKind
from fedsim.devices.mix import DeviceMix
from fedsim.devices.settings import DeviceSettings
from fedsim.devices.trace import read_trace
from fedsim.errors import BadInput

BUILT_IN = Path(__file__).parent / "mixes"
EXAMPLE = "share = 1.0, flops = 1e9, memory = 1e6, down = 1e6, up = 1e6"
STRICT = ConfigDict(strict=True)
NEEDED = ("share", "flops", "memory", "down", "up")
MEANT = {
    "sparse": '"none", "ideal", "measured" or a table such as {"0.1" = 0.4}',
    "available": '"always", a probability per round, {share = 0.4, period = 86400} or the name of a trace file',
    "about": "a text",
    "source": "a text",
}
TYPES: dict[str, Any] = dict.fromkeys(FIELDS, float) | {
    "sparse": str | dict[str, float],
    "available": str | float | dict[str, float],
    "about": str,
    "source": str,
}


def built_in() -> list[str]:
    """Names of the mixes that come with fedsim."""
    return sorted(path.stem for path in BUILT_IN.glob("*.toml"))


def read(settings: DeviceSettings) -> DeviceMix:
    """The mix that [devices] names, with what its files say of each client. BadInput for a name or a file that cannot be."""
    mix = read_mix(settings.name)
    if settings.sparse:
        mix = replace(mix, kinds=tuple(replace(kind, sparse=settings.sparse) for kind in mix.kinds))
    if settings.capacity:
        mix = of_capacity(mix, Path(settings.capacity), settings.reference_flops)
    return with_clients(mix, Path(settings.clients)) if settings.clients else mix


def read_mix(name: str) -> DeviceMix:
    """The mix of this name, or of this file: TOML with a section for each kind, or CSV with all figures of each client.

    >>> read_mix("four_kinds").names
    ['board', 'single_board_computer', 'mid_phone', 'fast_phone']
    """
    path = BUILT_IN / f"{name}.toml" if name in built_in() else Path(name)
    if path.is_dir():
        raise BadInput(f"devices {name!r}: this is a folder; give a TOML or CSV file, or one of {', '.join(built_in())}")
    if path.suffix == ".csv":
        return of_clients_alone(path)
    if path.suffix != ".toml":
        raise BadInput(f"devices {name!r} are not known. There are: {', '.join(built_in())}, or a TOML or CSV file")
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; [devices] name is one of {', '.join(built_in())}, or a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is no TOML file: {error}") from None
    try:
        return _mix(table, path)
    except BadInput as error:
        raise BadInput(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None


def _mix(table: dict[str, Any], path: Path) -> DeviceMix:
    if unknown := sorted(table.keys() - {"about", "kinds"}):
        raise BadInput(f"there is no {unknown[0]!r} in a mix; it has: about, and a section [kinds.NAME] for each kind")
    kinds, about = table.get("kinds"), table.get("about", "")
    if not isinstance(kinds, dict) or not kinds:
        raise BadInput(f"it has no kind; write a section [kinds.phone] with {EXAMPLE}")
    if not isinstance(about, str):
        raise BadInput(f"about = {about!r} must be a text")
    made = tuple(_kind(name, row) for name, row in kinds.items())
    traces: dict[str, Trace] = {}
    for kind in made:
        if isinstance(kind.available, str) and kind.available != "always":
            traces[kind.available] = read_trace(path.parent / kind.available, kind.name)
    digests = {name: trace.digest for name, trace in traces.items()}
    return DeviceMix(path.stem if path.parent == BUILT_IN else str(path), made, about, traces=traces, digests=digests)


def _kind(name: str, row: Any) -> DeviceKind:
    if not isinstance(row, dict):
        raise BadInput(f"kind {name!r} must be a section [kinds.{name}] with {EXAMPLE}")
    if unknown := sorted(row.keys() - set(FIELDS)):
        raise BadInput(f"kind {name!r} has no field {unknown[0]!r}. A kind has: {', '.join(FIELDS)}")
    if missing := [field for field in NEEDED if field not in row]:
        raise BadInput(f"kind {name!r} needs {', '.join(missing)}; for example {EXAMPLE}")
    for field, value in row.items():
        try:
            TypeAdapter(TYPES[field], config=STRICT).validate_python(value)
        except ValidationError:
            raise BadInput(f"kind {name!r}: {field} = {value!r} must be {MEANT.get(field, 'a number')}") from None
    return DeviceKind(name, **row)
