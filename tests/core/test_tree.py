"""tree: keys, shapes, dtypes and order survive, arguments stay as they were, and the hash sees every bit and no more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedsim.core import tree
from fedsim.core.tree import Tree

PREFIXES = ("w/", "buf/", "mask/", "opt/momentum/", "n/")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)
FLOAT = (torch.float32,)
NUMPY = {torch.float32: "<f4", torch.float64: "<f8", torch.int64: "<i8", torch.int32: "<i4", torch.uint8: "u1", torch.bool: "?"}

names = st.builds(lambda prefix, name: prefix + name, st.sampled_from(PREFIXES), st.text("abc.0", min_size=1, max_size=4))
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...] | None = None, dtypes: Sequence[torch.dtype] = DTYPES) -> Tensor:
    shape = draw(shapes) if shape is None else shape
    values = draw(st.lists(st.integers(-3, 120), min_size=prod(shape), max_size=prod(shape)))
    return torch.tensor(values).reshape(shape).to(draw(st.sampled_from(dtypes)))


trees = st.dictionaries(names, tensors(), max_size=5)
numbers = st.dictionaries(names, tensors(dtypes=FLOAT), max_size=5)


def same(some: Tree, others: Tree) -> bool:
    """Equal keys in an equal order, and equal dtypes, shapes and values."""
    return list(some) == list(others) and all(
        value.dtype == other.dtype and torch.equal(value, other) for value, other in zip(some.values(), others.values(), strict=True)
    )


# ---- parts of a tree


@given(trees)
def test_parts_under_disjoint_prefixes_make_the_whole(whole: Tree) -> None:
    parts = [tree.under(whole, prefix) for prefix in PREFIXES]
    assert sum(map(len, parts)) == len(whole)
    together = {key: value for part in parts for key, value in part.items()}
    assert together.keys() == whole.keys()
    assert all(together[key] is whole[key] for key in whole)
    assert same(tree.under(whole, *PREFIXES), whole)
    assert all(key.startswith(("w/", "n/")) for key in tree.under(whole, "w/", "n/"))


def test_no_prefix_is_nothing() -> None:
    assert tree.under({"w/a": torch.ones(1)}) == {}


@given(trees)
def test_a_renamed_part_has_its_values_and_comes_back(whole: Tree) -> None:
    moved = tree.renamed(whole, "w/", "opt/control/")
    assert list(moved) == ["opt/control/" + key[2:] for key in whole if key.startswith("w/")]
    assert same(tree.renamed(moved, "opt/control/", "w/"), tree.under(whole, "w/"))


def test_only_the_beginning_of_a_key_is_renamed() -> None:
    found = tree.renamed({"w/a.w/b": torch.ones(1), "opt/w/c": torch.ones(1)}, "w/", "grad/")
    assert list(found) == ["grad/a.w/b"]


# ---- arithmetic


@given(numbers, st.data())
def test_each_goes_by_the_keys_of_the_first(first: Tree, data: st.DataObject) -> None:
    other = {key: data.draw(tensors(tuple(value.shape), FLOAT)) for key, value in first.items()}
    more = dict(reversed(other.items())) | {"n/zzzzz": torch.ones(1)}
    found = tree.each(torch.sub, first, more)
    assert same(found, {key: value - other[key] for key, value in first.items()})


def test_a_missing_key_is_named_with_those_that_are_there() -> None:
    first = {f"w/{name}": torch.ones(1) for name in "hgfedcba"}  # so many that their order in a set is another
    with pytest.raises(KeyError, match="no 'w/a' in the other tree, which has buf/m, w/b"):
        tree.each(torch.add, first, {"w/b": torch.ones(1), "buf/m": torch.ones(1)})
    with pytest.raises(KeyError, match="no 'w/a' in the other tree, which has nothing"):
        tree.each(torch.add, first, first, {})


@pytest.mark.parametrize(
    "function",
    [
        tree.clone,
        tree.zeros,
        lambda given: tree.weigh(2.0, given),
        lambda given: tree.mean(given, torch.tensor(2.0), given),
        tree.sha256_of,
    ],
)
def test_arguments_stay_as_they_were(function: Callable[[Tree], Any]) -> None:
    given_tree = {"w/a": torch.tensor([1.0, -2.0]), "buf/b": torch.tensor(3.0)}
    before = {key: value.clone() for key, value in given_tree.items()}
    found = function(given_tree)
    if isinstance(found, dict):
        for value in found.values():
            value.fill_(7)
    assert same(given_tree, before)


@given(trees)
def test_zeros_and_clones_are_alike_in_all_but_value_and_place(whole: Tree) -> None:
    empty, copy = tree.zeros(whole), tree.clone(whole)
    assert same(copy, whole)
    assert list(empty) == list(whole)
    for key, value in whole.items():
        assert (empty[key].shape, empty[key].dtype, int(empty[key].count_nonzero())) == (value.shape, value.dtype, 0)
        assert value.numel() == 0 or copy[key].data_ptr() != value.data_ptr()


@given(numbers, st.lists(st.integers(1, 50), min_size=1, max_size=5))
def test_the_mean_of_equal_trees_is_that_tree(whole: Tree, counts: list[int]) -> None:
    total = tree.zeros(tree.weigh(1, whole))
    for n in counts:
        total = tree.each(torch.add, total, tree.weigh(n, whole))
    assert all(value.dtype == torch.float64 for value in total.values())
    assert same(tree.mean(total, torch.tensor(float(sum(counts)), dtype=torch.float64), whole), whole)


def test_a_mean_has_the_keys_and_dtypes_of_what_it_is_like() -> None:
    total = {"w/a": torch.tensor([4.0, 6.0], dtype=torch.float64), "n/images": torch.tensor(2.0, dtype=torch.float64)}
    found = tree.mean(total, total["n/images"], {"w/a": torch.zeros(2, dtype=torch.bfloat16)})
    assert same(found, {"w/a": torch.tensor([2.0, 3.0], dtype=torch.bfloat16)})


def test_weights_above_the_precision_of_float32_are_exact() -> None:
    assert tree.weigh(torch.tensor(2**25 + 1), {"w/a": torch.tensor([1.0])})["w/a"].item() == 2**25 + 1


@given(trees)
def test_the_size_is_the_number_of_values(whole: Tree) -> None:
    assert tree.size(whole) == sum(len(value.flatten().tolist()) for value in whole.values())


# ---- rows


@given(numbers, st.integers(1, 4), st.data())
def test_rows_of_a_stack_are_what_was_stacked(first: Tree, count: int, data: st.DataObject) -> None:
    rows = [{key: data.draw(tensors(tuple(value.shape), FLOAT)) for key, value in first.items()} for _ in range(count)]
    stacked = tree.stack(iter(rows))
    assert all(stacked[key].shape == (count, *value.shape) for key, value in first.items())
    assert all(same(tree.row(stacked, k), rows[k]) for k in range(count))


def test_a_row_is_a_view_and_no_rows_are_nothing() -> None:
    stacked = {"w/a": torch.zeros(2, 3)}
    tree.row(stacked, 1)["w/a"].fill_(5)
    assert stacked["w/a"].tolist() == [[0, 0, 0], [5, 5, 5]]
    assert tree.stack([]) == {}


def test_rows_of_different_keys_do_not_stack() -> None:
    with pytest.raises(KeyError, match="w/b"):
        tree.stack([{"w/a": torch.ones(1), "w/b": torch.ones(1)}, {"w/a": torch.ones(1)}])


# ---- the hash


def test_the_hash_is_that_of_names_dtypes_shapes_and_bytes() -> None:
    whole = {
        "w/b": torch.tensor([[1, -2], [3, 4]]),
        "w/a": torch.tensor([True, False]),
        "buf/c": torch.tensor(0.5),
        "n/d": torch.ones(0, 2),
    }
    text = b""
    for key in ("buf/c", "n/d", "w/a", "w/b"):
        value = whole[key]
        text += f"{key} {value.dtype} {tuple(value.shape)}\n".encode() + np.array(value.tolist(), NUMPY[value.dtype]).tobytes()
    assert tree.sha256_of(whole) == sha256(text).hexdigest()


@given(trees)
def test_the_hash_does_not_see_order_memory_or_gradients(whole: Tree) -> None:
    other = {key: value.flip(0).contiguous().flip(0) if value.dim() else value.clone() for key, value in reversed(whole.items())}
    turned = {key: value.transpose(0, 1).contiguous().transpose(0, 1) if value.dim() > 1 else value for key, value in other.items()}
    wanted = {key: value.clone().requires_grad_() if value.is_floating_point() else value for key, value in turned.items()}
    assert tree.sha256_of(whole) == tree.sha256_of(other) == tree.sha256_of(turned) == tree.sha256_of(wanted)


@given(trees.filter(bool), st.data())
def test_the_hash_sees_every_change(whole: Tree, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(whole)))
    value, rest = whole[key], {name: other for name, other in whole.items() if name != key}
    changed = [rest, rest | {key + "x": value}, rest | {key: value.unsqueeze(0)}]
    changed.append(rest | {key: value.to(torch.float16)})
    if value.numel():
        place, flipped = data.draw(st.integers(0, value.numel() - 1)), value.clone().flatten()
        flipped[place] = ~flipped[place] if value.dtype == torch.bool else flipped[place] + 1
        changed.append(rest | {key: flipped.reshape(value.shape)})
    hashes = {tree.sha256_of(each) for each in changed}
    assert len(hashes) == len(changed)
    assert tree.sha256_of(whole) not in hashes


def test_the_hash_tells_the_two_zeros_apart_and_a_nan_is_itself() -> None:
    zero, minus, nan = ({"w/a": torch.tensor([value])} for value in (0.0, -0.0, float("nan")))
    assert tree.sha256_of(zero) != tree.sha256_of(minus)
    assert tree.sha256_of(nan) == tree.sha256_of(tree.clone(nan))


def test_the_mean_of_whole_numbers_is_rounded() -> None:
    clients = {1: torch.tensor([7, 2]), 2: torch.tensor([8, 0])}  # images -> a counter
    total = {"buf/seen": sum((n * seen.double() for n, seen in clients.items()), torch.zeros(2, dtype=torch.float64))}
    found = tree.mean(total, torch.tensor(3.0), {"buf/seen": clients[1]})["buf/seen"]
    assert (found.tolist(), found.dtype) == ([8, 1], torch.int64)  # of 7 2/3 and 2/3
