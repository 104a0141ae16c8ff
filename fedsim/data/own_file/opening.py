"""A user's own file becomes a training and a test set.

Arrays: x (n, C, H, W), (n, H, W, C) or (n, H, W), pixels; y (n,), whole numbers from 0; if it has natural users, client (n,), whole
numbers or text; if it has a test part, x_test, y_test and, with client, perhaps client_test; class_names (classes,), text, if the classes
have names. Without a test part a fixed stratified
fifth is the test set. `Stored.notes` says what was read otherwise than as it stands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fedsim.data.image_sets import Stored, moments, parted
from fedsim.data.own_file import images, labels, users
from fedsim.data.own_file.arrays import Source, opened
from fedsim.data.settings import DataSettings
from fedsim.errors import BadInput

TEST = "_test"  # the ending of the arrays of the test part


def open_file(settings: DataSettings) -> tuple[Stored, Stored]:
    """Training and test set of the file. BadInput says what is missing or wrong in it."""
    with opened(str(settings.path)) as source:
        return read(source, settings, "file")


def read(source: Source, settings: DataSettings, name: str) -> tuple[Stored, Stored]:
    """Training and test set of the arrays in a source; `name`: of the sets."""
    parts = ["", TEST] if any(source.has(name + TEST) for name in ("x", "y")) else [""]
    found = {part: {name: source.array(name + part) for name in ("x", "y")} for part in parts}
    _same_lengths(source, found)
    x, notes = images.read(source.where, {f"x{part}": arrays["x"] for part, arrays in found.items()}, settings.layout)
    y = labels.read(source.where, {f"y{part}": arrays["y"] for part, arrays in found.items()}, settings.relabel)
    if source.has("class_names"):
        y = labels.named(source.where, y, source.array("class_names"))
    who = users.read(source, {part: len(x[f"x{part}"]) for part in parts})
    more: dict[str, Any] = {"class_names": y.names, "user_names": who.names, "notes": (*notes, *y.notes)}
    sets = [(x[f"x{part}"], y.values[f"y{part}"], who.ids.get(part)) for part in parts]
    if len(parts) == 1:
        train, test = parted(name, sets[0][0], sets[0][1], y.classes, sets[0][2], **more)
        rare = labels.only_tested(train.y.numpy(), test.y.numpy(), y.names)
        return replace(train, notes=(*train.notes, *rare)), replace(test, notes=(*test.notes, *rare))
    mean, std = moments(sets[0][0])
    train, test = (Stored(name, pixels, classes, y.classes, mean, std, ids, **more) for pixels, classes, ids in sets)
    return train, test


def _same_lengths(source: Source, found: Mapping[str, Mapping[str, Any]]) -> None:
    """BadInput where a part does not have one label for each image."""
    for part, arrays in found.items():
        x, y = arrays["x"].shape, arrays["y"].shape
        if not x or not y or 0 in x or 0 in y:
            raise BadInput(f"{source.where}: x{part} is {x} and y{part} is {y}; both must be arrays, and not empty")
        if x[0] == y[0]:
            continue
        if x[-1] == y[0]:
            order = (len(x) - 1, *range(len(x) - 1))
            raise BadInput(
                f"{source.where}: x{part} is {x} and y{part} is {y}: the images stand along the last axis of x{part};"
                f" they must stand along the first: x{part}.transpose{order}"
            )
        raise BadInput(f"{source.where}: x{part} is {x} and y{part} is {y}: {x[0]} images and {y[0]} labels; each image needs one label")
