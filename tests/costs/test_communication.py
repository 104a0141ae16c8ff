"""What travels is what is charged: len(encode(x)) == length(x), and decode gives x back to the bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.core import keys, masks
from fedsim.costs import communication

SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=3)


@st.composite
def trees(draw_from) -> tuple[dict, dict]:
    """A tree of every prefix, and the masks that the receiver holds."""
    generator = torch.Generator().manual_seed(draw_from(st.integers(0, 10_000)))
    shape, share = draw_from(SHAPES), draw_from(st.sampled_from([0.0, 0.02, 0.5, 1.0]))
    mask = torch.rand(shape, generator=generator) < share
    last = {"mask/a.weight": torch.rand(shape, generator=generator) < share} if draw_from(st.booleans()) else {}
    value = torch.randn(shape, generator=generator)
    tree = {
        "w/a.weight": value * mask,
        "opt/momentum/a.weight": -value * mask,
        "mask/a.weight": mask,
        "w/a.bias": torch.randn(3, generator=generator),
        "buf/n.running_mean": torch.randn(4, generator=generator),
        "grad/a.weight": value,
        "loss/one": torch.randn((), generator=generator),
        "top/index/a": torch.randint(0, 1000, (5,), generator=generator),
        "top/value/a": torch.randn(5, generator=generator),
        "index/a": torch.randint(0, 1000, (2,), generator=generator),
        "gate/hard": torch.rand(3, 11, generator=generator) < 0.5,
        "gate/soft": torch.rand(11, generator=generator),
    }
    return tree, last


@given(trees())
@settings(deadline=None, max_examples=150)
def test_length_is_the_encoded_length_and_decode_gives_it_back(case) -> None:
    tree, last = case
    payload, header = communication.encode(tree, last=last)
    assert len(payload) == communication.length(tree, last=last)
    back = communication.decode(payload, header, last=last)
    assert back.keys() == tree.keys()
    assert all(torch.equal(back[key], value) and back[key].dtype == value.dtype for key, value in tree.items())


def test_prices_of_the_table() -> None:
    mask = torch.zeros(100, dtype=torch.bool)
    mask[:10] = True
    held = {"mask/a.weight": mask}
    assert communication.length({"w/a.weight": torch.zeros(100)}, held) == 40
    assert communication.length({"w/a.weight": torch.zeros(100)}) == 400
    assert communication.length({"opt/momentum/a.weight": torch.zeros(100)}, held) == 40
    assert communication.length({"grad/a.weight": torch.zeros(100)}, held) == 400
    assert communication.length({"buf/a": torch.zeros(7)}) == 28
    assert communication.length(held) == 13  # ceil(100 / 8), below 4 · 10
    assert communication.length({"mask/a.weight": torch.ones(100, dtype=torch.bool)}) == 0
    assert communication.length({"gate/a": torch.ones(5, 1008, dtype=torch.bool)}) == 630
    assert communication.length({"gate/a": torch.ones(1008)}) == 4032
    assert communication.length({"top/index/a": torch.zeros(6, dtype=torch.int64), "top/value/a": torch.zeros(6)}) == 48
    assert communication.length({"n/images": torch.zeros(()), "vote/a": torch.zeros(9), "seed/x": torch.zeros(())}) == 0


def test_a_mask_is_charged_by_what_changed() -> None:
    old = torch.arange(1000) < 100
    new = old.clone()
    new[[3, 500]] = ~new[[3, 500]]
    assert communication.length({"mask/a": new}, last={"mask/a": old}) == 8
    assert communication.length({"mask/a": old}, last={"mask/a": old}) == 0
    few = torch.arange(1000) < 3
    assert communication.length({"mask/a": few}) == 12


def test_a_key_without_a_price_is_refused() -> None:
    with pytest.raises(ValueError, match="no price for 'weights'"):
        communication.length({"weights": torch.zeros(1)})


def test_masks_are_found_by_name_and_applied() -> None:
    mask = torch.tensor([True, False])
    held = {"mask/a.weight": mask}
    assert keys.mask_of("opt/control/a.weight") == keys.mask_of("grad/a.weight") == "mask/a.weight"
    assert masks.apply({"w/a.weight": torch.tensor([3.0, 4.0]), "w/b": torch.ones(1)}, held)["w/a.weight"].tolist() == [3.0, 0.0]
    assert masks.ones(held) == {"a.weight": 1}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"mask/a": torch.ones(2)}, "mask 'a' is torch.float32"),
        ({"mask/a": torch.ones(2, dtype=torch.bool), "w/a": torch.ones(3)}, r"mask 'a' is \(2,\), its weight is \(3,\)"),
    ],
)
def test_wrong_masks_are_named(tree, message) -> None:
    with pytest.raises(ValueError, match=message):
        masks.check(tree)


@pytest.mark.parametrize(
    ("value", "price"),
    [
        (torch.zeros(16), 0),
        (torch.zeros(17), 68),
        (torch.zeros(5, 4, dtype=torch.int64), 80),
        (torch.zeros(100, dtype=torch.bool), 13),
    ],
)
def test_a_few_counts_are_free_and_what_hides_among_them_is_not(value: torch.Tensor, price: int) -> None:
    """Else a method could send masks or weights under n/ for nothing."""
    tree = {"n/mine": value, "n/images": torch.tensor(3.0)}
    payload, header = communication.encode(tree)
    assert communication.length(tree) == len(payload) == price
    assert [head.key for head in header] == (["n/mine"] if price else [])
    assert all(torch.equal(communication.decode(payload, header)[head.key], value) for head in header)


def test_what_follows_from_masks_and_rates_is_free() -> None:
    assert communication.length({f"{keys.SCAFFOLD_SINCE}w": torch.zeros(99), f"{keys.COVER}w": torch.zeros(99)}) == 0
