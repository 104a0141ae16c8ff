"""A column of a user's own file, one value for each image: whole numbers, or text."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import BadInput

Ints = NDArray[np.int64]
Column = Ints | list[str]
LARGEST = 2**63 - 1


def read(where: str, name: str, array: Any, n: int) -> Column:
    """(n,) whole numbers, or n texts. (n, 1) counts as (n,), and floats without fractions as whole numbers. BadInput otherwise."""
    right = f"it must be ({n},), one value for each image"
    if array.shape not in ((n,), (n, 1)):
        raise BadInput(f"{where}: {name} is {array.shape} {array.dtype}; {right}")
    values = np.asarray(array[()]).reshape(n)
    if values.dtype.kind in "SUO":
        return [_text(where, name, i, value) for i, value in enumerate(values.tolist())]
    if values.dtype.kind == "b":
        return values.astype(np.int64)
    if values.dtype.kind == "f":
        return _whole(where, name, values)
    if values.dtype.kind not in "iu":
        raise BadInput(f"{where}: {name} is an array of {values.dtype}; it must be of whole numbers or text")
    if int(values.max()) > LARGEST:
        raise BadInput(f"{where}: {name} has the value {int(values.max())}; whole numbers are at most {LARGEST}")
    return values.astype(np.int64)


def _whole(where: str, name: str, values: NDArray[np.floating]) -> Ints:
    odd = np.flatnonzero(~(np.isfinite(values) & (values == np.rint(values)) & (np.abs(values) < 2.0**53)))
    if len(odd):
        raise BadInput(f"{where}: {name} has the value {values[odd[0]]} (image {int(odd[0])}); it must be of whole numbers or text")
    return values.astype(np.int64)


def _text(where: str, name: str, i: int, value: Any) -> str:
    text = value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value
    if not isinstance(text, str):
        raise BadInput(f"{where}: {name} has a {type(value).__name__} (image {i}); it must be of whole numbers or text")
    if not text.strip():
        raise BadInput(f"{where}: {name} has an empty text (image {i}); each image needs a value")
    return text
