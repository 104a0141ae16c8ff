"""Images that a function of the user's own gives: `data.factory`. It returns the arrays that a file would hold, by the same names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from fedsim.core import entry_points
from fedsim.core.shared_generators import seeded
from fedsim.data.image_sets import Stored
from fedsim.data.own_file.arrays import KNOWN, OTHER_NAMES, Source
from fedsim.data.own_file.opening import read
from fedsim.data.settings import DataSettings
from fedsim.errors import BadInput

RIGHT = 'it should return a dict of arrays, such as {"x": images, "y": labels}'


def open_made(settings: DataSettings, seed: int) -> tuple[Stored, Stored]:
    """Training and test set of the function. The generators of torch, NumPy and Python begin from `seed`. BadInput says what is wrong."""
    place = str(settings.factory)
    where = f'data.factory = "{place}"'
    function = entry_points.own(place, "[data] factory")
    try:
        with seeded(seed):
            found = function()
    except (Exception, SystemExit) as error:  # whatever the function raises, the message names it
        raise BadInput(f"{where} failed: {type(error).__name__}: {error}; it is called without arguments, and {RIGHT}") from error
    if not isinstance(found, Mapping):
        raise BadInput(f"{where} gave a {type(found).__name__}; {RIGHT}")
    known = {*KNOWN, *OTHER_NAMES.values()}
    if other := [name for name in found if name not in known]:
        raise BadInput(f"{where} gave an array {other[0]!r}, which is not known. Known are: {', '.join(KNOWN)}")
    arrays = {str(name): _array(value) for name, value in found.items() if value is not None}
    return read(Source(where, arrays), settings, place)


def _array(value: Any) -> Any:
    """An array of NumPy; of a tensor it shares the memory."""
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
