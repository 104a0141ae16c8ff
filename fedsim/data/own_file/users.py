"""The natural users of a user's own file: whole numbers as they stand, or text, whose sorted names are numbered from 0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fedsim.data.own_file import columns
from fedsim.data.own_file.arrays import Source
from fedsim.data.own_file.columns import Column
from fedsim.errors import BadInput


@dataclass(frozen=True)
class Users:
    ids: dict[str, Tensor] = field(default_factory=dict)  # (n,) int64, by part
    names: tuple[str, ...] | None = None  # of users that the file names by text


def read(source: Source, images: Mapping[str, int]) -> Users:
    """The users of each part, which has so many images; BadInput says what is wrong."""
    found: dict[str, Column] = {}
    for part, n in images.items():
        if source.has(f"client{part}"):
            found[part] = columns.read(source.where, f"client{part}", source.array(f"client{part}"), n)
    if source.has("client_test") and "_test" not in found:
        raise BadInput(f"{source.where} has client_test, but no x_test and y_test that it could belong to")
    if found and "" not in found:
        raise BadInput(f"{source.where} has client_test, but no client; the training images need a user too")
    texts = {part: column for part, column in found.items() if isinstance(column, list)}
    if not texts:
        return Users({part: torch.from_numpy(np.asarray(column)) for part, column in found.items()})
    if len(texts) < len(found):
        raise BadInput(f"{source.where}: of client and client_test one has numbers and one has text; both must name users alike")
    names = sorted(set().union(*texts.values()))
    number = {name: i for i, name in enumerate(names)}
    return Users({part: torch.tensor([number[name] for name in column]) for part, column in texts.items()}, tuple(names))
