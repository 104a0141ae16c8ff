"""Plain arrays come out of pickles as they went in, and whatever else a pickle names is refused by name and not called."""

from __future__ import annotations

import pickle
import pickletools
from collections import OrderedDict
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim.data import plain_pickle
from fedsim.data.plain_pickle import NotPlain

TRACE = Path("trace")


class Leaving:
    """Makes a file where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (TRACE,)


class OldArray:
    """An array as Python 2 wrote it, whose bytes are a text."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __reduce__(self) -> tuple[Any, ...]:
        made, about, (version, shape, dtype, in_columns, raw) = self.array.__reduce__()
        return made, about, (version, shape, dtype, in_columns, raw.decode("latin1"))


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("dtype", ["u1", "<i4", ">i4", "f8", "?"])
def test_arrays_come_back(protocol: int, dtype: str) -> None:
    values = np.arange(12).reshape(3, 4).astype(dtype)
    wrote = {"data": values, "turned": values.T, "labels": [1, 2, 300], "names": ["a", "é"], "none": None, "part": (1.5, True)}
    found = plain_pickle.load(pickle.dumps(wrote, protocol=protocol))
    np.testing.assert_array_equal(plain_pickle.array(found.pop("data")), values)
    np.testing.assert_array_equal(plain_pickle.array(found.pop("turned")), values.T)
    assert found == {name: value for name, value in wrote.items() if name in found}


def test_an_array_of_python_2_comes_back() -> None:
    values = np.arange(200, 206, dtype=np.uint8).reshape(2, 3)
    found = plain_pickle.load(pickle.dumps({"data": OldArray(values)}, protocol=2))
    np.testing.assert_array_equal(plain_pickle.array(found["data"]), values)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (OrderedDict(a=1), "collections.OrderedDict"),
        (Decimal(1), "decimal.Decimal"),
        (Fraction(1, 2), "fractions.Fraction"),
        (np.float64, "numpy.float64"),
        (len, "builtins.len"),
        ({1}, "builtins.set"),
        ([3, {"deep": [Path("a")]}], "pathlib.PosixPath"),
        (Leaving(), "pathlib.Path.touch|builtins.getattr"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2])
def test_another_name_is_refused_by_name_and_not_called(
    value: Any, named: str, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotPlain, match=f"it names (__builtin__|{named.replace('builtins', '(builtins|__builtin__)')})"):
        plain_pickle.load(pickle.dumps({"data": value}, protocol=protocol))
    assert not TRACE.exists()


def test_arrays_of_objects_or_of_another_size_are_refused() -> None:
    with pytest.raises(NotPlain, match="array"):
        plain_pickle.load(pickle.dumps(np.array([None, 3], object), protocol=2))
    content = pickle.dumps(np.arange(5, dtype=np.uint8), protocol=2)
    with pytest.raises(ValueError, match="holds 5 values of an array of the shape"):
        plain_pickle.load(content.replace(b"K\x05\x85", b"K\x09\x85"))


def test_a_broken_pickle_is_one_error() -> None:
    content = pickle.dumps({"data": np.arange(5), "labels": [1, 2]}, protocol=2)
    for end in range(len(content) - 1):
        with pytest.raises(ValueError, match=r".+"):
            plain_pickle.load(content[:end])
    for opcode in pickletools.opcodes:
        with suppress(ValueError):
            plain_pickle.load(opcode.code.encode("latin1") + b"\x7f" * 9 + b".")


def test_what_is_no_array_is_said() -> None:
    with pytest.raises(ValueError, match="holds list in the place of an array"):
        plain_pickle.array([1])
