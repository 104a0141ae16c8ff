"""Arrays, lists, dictionaries, texts and numbers out of a pickle, and nothing else: nothing that it names is imported or called.

CIFAR is published as pickles. Their arrays are rebuilt here from their shape, their type and their bytes; numpy's own way would call what
the pickle says, with any shape. The unpickler in Python is used, since the one in C makes room for as many entries as a pickle claims.
"""

from __future__ import annotations

import io
import pickle
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

KINDS = "biuf"  # of an array's numbers
RECONSTRUCT = {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")}
TYPE, ARRAY, ENCODE = ("numpy", "dtype"), ("numpy", "ndarray"), ("_codecs", "encode")


class NotPlain(ValueError):
    """A pickle that holds more than plain values; the message says what it names."""


def load(content: bytes) -> Any:
    """What the pickle holds; old texts of Python 2 are read as Latin 1. NotPlain, or another ValueError where it is damaged."""
    try:
        return _Unpickler(io.BytesIO(content), encoding="latin1").load()
    except ValueError:
        raise
    except Exception as error:  # whatever a broken pickle makes the machine of its reader raise
        raise ValueError(f"it is no whole pickle ({type(error).__name__}: {error})") from error


def array(found: Any) -> NDArray[Any]:
    """An array that `load` gave; ValueError for anything else."""
    if not isinstance(found, _Array) or found.values is None:
        raise ValueError(f"it holds {type(found).__name__.strip('_').lower()} in the place of an array")
    return found.values


class _Type:
    """A type of numbers, as a pickle describes it: its code, and the order of its bytes."""

    __slots__ = ("code",)

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = str(code)

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        if order in ("<", ">"):
            self.code = f"{order}{self.code}"

    def dtype(self) -> np.dtype[Any]:
        found = np.dtype(self.code)
        if found.kind not in KINDS or found.fields or found.subdtype:
            raise NotPlain(f"it holds an array of {self.code!r:.40}, not of numbers")
        return found


class _Array:
    """An array, which gets its shape and its values after it was made."""

    __slots__ = ("values",)

    def __init__(self, *_: Any) -> None:
        self.values: NDArray[Any] | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, in_columns, raw = state
        if isinstance(raw, str):
            raw = raw.encode("latin1")
        if not isinstance(kind, _Type) or not isinstance(raw, bytes) or not all(type(size) is int and size >= 0 for size in shape):
            raise NotPlain("it holds an array of other things than numbers")
        values = np.frombuffer(raw, kind.dtype())
        if len(values) != prod(shape):
            raise ValueError(f"it holds {len(values):,} values of an array of the shape {shape}")
        self.values = values.reshape(shape, order="F" if in_columns else "C")


class _Class:
    """Stands for numpy's class of arrays, which a pickle gives to `_reconstruct`."""

    __slots__ = ()


def _encode(text: Any, encoding: Any) -> bytes:
    """How Python 3 writes bytes into a pickle of protocol 2."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise NotPlain(f"it encodes a text as {encoding!r:.40}")
    return text.encode("latin1")


class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Our own in the place of the few names that an array needs."""
        place = (module, name)
        if place in RECONSTRUCT:
            return _Array
        if place in (TYPE, ARRAY, ENCODE):
            return {TYPE: _Type, ARRAY: _Class, ENCODE: _encode}[place]
        raise NotPlain(f"it names {module}.{name}, and a file of plain arrays, lists and texts does not; it is not loaded")

    def persistent_load(self, pid: Any) -> Any:
        raise NotPlain(f"it refers to something outside of it ({pid!r:.40})")

    def get_extension(self, code: int) -> None:
        raise NotPlain(f"it uses the extension {code}")
