"""plain: what is dumped comes back the same, through real JSON, and nothing else is accepted."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from math import isnan
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedsim.core.serialization import dump, load
from fedsim.core.types import Feed


@dataclass(frozen=True)
class Inner:
    mask: dict[str, Tensor]
    rate: float = 0.1


@dataclass(frozen=True)
class Outer:
    inner: Inner | None
    pair: tuple[Any, ...] = ()
    rows: list[Any] = field(default_factory=list)
    double: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "double", 2 * self.inner.rate if self.inner else 0.0)

    @dataclass(frozen=True)
    class Nested:
        x: int


class Interval:
    """No dataclass: dumped as the pair it stands for."""

    def __init__(self, low: Tensor, high: Tensor) -> None:
        self.low, self.high = low, high

    def __dump__(self) -> tuple[Tensor, Tensor]:
        return self.low, self.high

    @classmethod
    def __load__(cls, value: tuple[Tensor, Tensor]) -> Interval:
        return cls(*value)


def through_json(value: Any) -> Any:
    plain, tensors = dump(value)
    return load(json.loads(json.dumps(plain, allow_nan=False)), tensors)


numbers = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(
    numbers,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text(), inner)
        | st.dictionaries(st.integers() | st.tuples(st.text(), st.booleans()), inner)
        | st.builds(Outer, inner=st.none(), pair=st.lists(inner).map(tuple), rows=st.lists(inner))
    ),
    max_leaves=12,
)


@given(values)
def test_any_plain_value_comes_back_with_its_types(value: Any) -> None:
    back = through_json(value)
    assert back == value
    assert repr(back) == repr(value)  # tells True from 1, 1 from 1.0, and tuple from list at every depth


def test_nan_and_infinities_come_back() -> None:
    nan, high, low = through_json((float("nan"), float("inf"), float("-inf")))
    assert isnan(nan)
    assert (high, low) == (float("inf"), float("-inf"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
def test_tensors_of_every_dtype_and_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    value = torch.ones(shape, dtype=dtype)
    back = through_json([value])[0]
    assert back.dtype == dtype
    assert back.shape == shape
    assert torch.equal(back, value)


def test_nested_dataclasses_and_trees() -> None:
    inner = Inner({"mask/a": torch.tensor([True, False]), "mask/b": torch.tensor(True)}, rate=0.25)
    back = through_json(Outer(inner, pair=(1, (2.0, "x")), rows=[Outer.Nested(3), Feed(epochs=2)]))
    assert isinstance(back, Outer)
    assert back.double == 0.5
    assert back.pair == (1, (2.0, "x"))
    assert back.rows == [Outer.Nested(3), Feed(epochs=2)]
    assert back.inner is not None
    assert back.inner.rate == 0.25
    assert all(torch.equal(back.inner.mask[key], inner.mask[key]) for key in inner.mask)


def test_names_are_paths_and_never_collide() -> None:
    a, b = torch.tensor(1), torch.tensor(2)
    assert set(dump({"w": {"conv.weight": a}, "b": b})[1]) == {"w/conv.weight", "b"}
    back = through_json({"x/y": a, "x": {"y": b}})
    assert back["x/y"] == 1
    assert back["x"]["y"] == 2


def test_one_tensor_at_two_places_is_kept_once() -> None:
    a = torch.arange(3)
    plain, tensors = dump([a, {"again": a}])
    assert len(tensors) == 1
    first, second = load(plain, tensors)
    assert first is second["again"]


def test_a_parameter_is_dumped_without_its_graph() -> None:
    assert not through_json([torch.nn.Parameter(torch.ones(2))])[0].requires_grad


def test_a_class_may_choose_what_it_is_dumped_as() -> None:
    back = through_json({"interval": Interval(torch.tensor(1), torch.tensor(2))})["interval"]
    assert isinstance(back, Interval)
    assert (back.low, back.high) == (1, 2)


class Fresh:
    """Dumped as a tensor that nobody else holds."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __dump__(self) -> Tensor:
        return torch.tensor(self.number)

    @classmethod
    def __load__(cls, value: Tensor) -> Fresh:
        return cls(int(value))


def test_passing_tensors_are_not_mistaken_for_one_another() -> None:
    assert [back.number for back in through_json([Fresh(i) for i in range(50)])] == list(range(50))


def test_fields_added_since_take_their_default() -> None:
    plain, tensors = dump(Inner({}, rate=3.0))
    del plain["fields"]["rate"]
    assert load(plain, tensors) == Inner({}, rate=0.1)


@pytest.mark.parametrize("value", [{1, 2}, b"x", np.float64(1.0), np.arange(2), object(), 1j, lambda: 0])
def test_other_kinds_are_refused_with_their_path(value: Any) -> None:
    with pytest.raises(TypeError, match=r"state/1 is a .*dataclasses"):
        dump({"state": [0, value]})


def test_a_class_that_cannot_be_imported_is_refused() -> None:
    @dataclass
    class Local:
        x: int

    with pytest.raises(TypeError, match="top of a module"):
        dump(Local(1))


@pytest.mark.parametrize("address", ["subprocess:run", "subprocess:Popen", "builtins:dict"])
def test_nothing_but_dataclasses_is_built(address: str) -> None:
    with pytest.raises(TypeError, match="neither a dataclass"):
        load({"of": address, "fields": {}}, {})


def test_damaged_values_name_the_offender() -> None:
    with pytest.raises(ValueError, match="no field 'pace'; it has mask, rate"):
        load({"of": f"{__name__}:Inner", "fields": {"pace": 1}}, {})
    with pytest.raises(ValueError, match="'w/a' is missing"):
        load({"tensor": "w/a"}, {})
    with pytest.raises(ValueError, match="not written by dump"):
        load({"what": 1}, {})
