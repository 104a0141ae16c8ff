"""A run as one netCDF-4 file that follows the CF conventions where they have a rule; each group has the labels of its dimensions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import netCDF4
import numpy as np
from numpy.typing import NDArray

from fedsim_analysis import masks, run_file
from fedsim_analysis.dataset.sources import Source
from fedsim_analysis.export import place, tables

SOURCE = "run file of fedsim"  # how the attribute `source` begins
UNITS = {"B": "byte"}  # the rules of units that CF takes know B as the bel
ROWS = 65_536  # values of a column that are written at once
OTHER = -1  # in a mask: in this round the weight had another shape, or no mask
MASKS = "masks in force from a round until the next round here; -1 where a weight had another shape or no mask"


def write(source: Source, out: Path) -> list[str]:
    """Writes the file `out`; a line for each group. Raises place.Refused."""
    with place.aside(out, is_folder=False, is_ours=_is_ours) as path, netCDF4.Dataset(path, "w", format="NETCDF4") as made:
        _put_attributes(made, source)
        for group in run_file.DIMENSIONS:
            _put_columns(made, source, group)
        if source.counts:
            _put_counts(made, source)
        if source.kinds:
            _put_kinds(made.createGroup("devices"), source)
        if source.masks:
            _put_masks(made.createGroup("masks"), source)
        lines = [f"  {name:<10} {_sizes(group)}" for name, group in made.groups.items()]
    return [f"{out}", *lines]


def _is_ours(path: Path) -> bool:
    try:
        with netCDF4.Dataset(path) as made:
            return str(getattr(made, "source", "")).startswith(SOURCE)
    except (OSError, RuntimeError):
        return False


def _name(text: str) -> str:
    """A name that netCDF takes: without /, signs of control and spaces at its ends, and beginning with a letter, a digit or _."""
    found = "".join("_" if sign == "/" or ord(sign) < 32 or ord(sign) == 127 else sign for sign in text).strip()
    return found if found and (found[0].isalnum() or found[0] == "_" or ord(found[0]) > 127) else f"_{found}"


def _free(group: netCDF4.Group, text: str) -> str:
    """Such a name that no variable of the group has yet."""
    found = _name(text)
    while found in group.variables:
        found += "_"
    return found


def _sizes(group: netCDF4.Group) -> str:
    return ", ".join(f"{dimension.size:,} {name}" for name, dimension in group.dimensions.items() if "_axis_" not in name)


def _put_attributes(made: netCDF4.Dataset, source: Source) -> None:
    about = {"Conventions": "CF-1.11", "title": source.label, "source": f"{SOURCE} {source.attributes.get('fedsim_version', '')}"}
    for name, value in (dict(source.attributes) | about).items():
        made.setncattr(_name(name), value if isinstance(value, str | float) else np.asarray(int(value)))  # int64, or uint64


def _label(group: netCDF4.Group, name: str, values: Any, about: str) -> None:
    """A dimension and what its places are called."""
    group.createDimension(name, len(values))
    _put_label(group, name, name, values, about)


def _put_label(group: netCDF4.Group, name: str, dimension: str, values: Any, about: str) -> None:
    values = np.asarray(values)
    stored = group.createVariable(name, values.dtype if values.dtype.kind in "iu" else str, (dimension,))
    stored.long_name = about
    for i in range(len(values)) if values.dtype.kind not in "iu" else ():
        stored[i] = str(values[i])
    if values.dtype.kind in "iu":
        stored[:] = values


def _numbered(group: netCDF4.Group, source: Source, dimension: str, size: int) -> str:
    """The numbers of clients or classes, and their names where they have some; the name of that variable."""
    _label(group, dimension, np.arange(size), f"number of the {dimension}")
    if dimension not in source.names:
        return ""
    _put_label(group, f"{dimension}_name", dimension, list(source.names[dimension]), f"what the data set called the {dimension}")
    return f"{dimension}_name"


def _number(group: netCDF4.Group, name: str, dimensions: tuple[str, ...], kind: str, **options: Any) -> netCDF4.Variable:
    return group.createVariable(name, kind, dimensions, compression="zlib", complevel=1, shuffle=True, **options)


# --- groups


def _put_columns(made: netCDF4.Dataset, source: Source, name: str) -> None:
    if not source.columns[name]:
        return
    group, names = made.createGroup(name), ""
    _label(group, "round", np.arange(source.rows), "round; 0 is before training")
    if name == "clients":
        names = _numbered(group, source, "client", source.clients)
    if name == "layers":
        _label(group, "layer", list(source.layers), "name of the layer")
    stored: dict[str, netCDF4.Variable] = {}
    for column, (units, about) in sorted(source.columns[name].items()):
        stored[column] = _number(group, _free(group, column), run_file.DIMENSIONS[name], "f8", fill_value=np.nan)
        stored[column].setncatts({"units": UNITS.get(units, units), "long_name": about} | ({"coordinates": names} if names else {}))
    wide = {"clients": source.clients, "layers": len(source.layers)}.get(name, 1)
    for rounds in tables.blocks(source.rows, ROWS // max(wide, 1)):
        for column, values in tables.rows(source, name, rounds).items():
            stored[column][rounds[0] : rounds[-1] + 1] = values


def _put_counts(made: netCDF4.Dataset, source: Source) -> None:
    assert source.counts
    group, (clients, classes) = made.createGroup("partition"), source.counts
    names = [_numbered(group, source, "client", clients), _numbered(group, source, "class", classes)]
    stored = _number(group, "counts", ("client", "class"), "i4", fill_value=False)
    stored.setncatts({"units": "1", "long_name": "training images"})
    if any(names):
        stored.coordinates = " ".join(filter(None, names))
    stored[:] = source.read(tables.counts)


def _put_kinds(group: netCDF4.Group, source: Source) -> None:
    _numbered(group, source, "client", source.clients)
    _put_label(group, "kind", "client", source.kinds, "kind of the client's device")


def _put_masks(group: netCDF4.Group, source: Source) -> None:
    """Each weight's masks as bytes; one variable for each shape that it had."""
    group.setncattr("comment", MASKS)
    _label(group, "round", np.array(source.mask_rounds), "round after which other masks were in force")
    made: dict[tuple[str, tuple[int, ...]], netCDF4.Variable] = {}
    for place_, found in _masks(source):
        for name, mask in found.items():
            key = (name, mask.shape)
            if key not in made:
                made[key] = _mask(group, name, mask.shape, first=not any(weight == name for weight, _ in made))
            made[key][place_] = mask


def _masks(source: Source) -> Iterator[tuple[int, Mapping[str, NDArray[np.int8]]]]:
    """The masks of each round in which they changed, by weight."""

    def read(file: h5py.File, r: int) -> dict[str, NDArray[np.int8]]:
        layout, packed = masks.in_force(file, r, source.sums)
        unpacked = masks.unpacked(masks.shapes(layout), packed)
        return {key.removeprefix(masks.PREFIX): mask.astype(np.int8) for key, mask in unpacked}

    for i, r in enumerate(source.mask_rounds):
        yield i, source.read(lambda file, r=r: read(file, r))


def _mask(group: netCDF4.Group, name: str, shape: tuple[int, ...], first: bool) -> netCDF4.Variable:
    called = _free(group, name if first else f"{name}_{'x'.join(map(str, shape))}")
    dimensions = [f"{called}_axis_{i}" for i in range(len(shape))]
    for dimension, size in zip(dimensions, shape, strict=True):
        group.createDimension(dimension, size)
    stored = _number(group, called, ("round", *dimensions), "i1", fill_value=np.int8(OTHER))
    about = {"long_name": f"mask of {name}", "flag_values": np.array([0, 1], np.int8), "flag_meanings": "pruned kept"}
    stored.setncatts(about)
    return stored
