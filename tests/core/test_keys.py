"""keys: a key names one layer, the keys of one layer name each other, and every prefix has one meaning and one price."""

from __future__ import annotations

import doctest
import re
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim.core import keys
from fedsim.costs import communication

LAYER = re.compile(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+){0,3}")
layers = st.from_regex(LAYER, fullmatch=True).filter(lambda name: not name.endswith(".weight"))
kinds = st.sampled_from([keys.MOMENTUM, keys.FIRST_MOMENT, keys.SECOND_MOMENT, keys.FEDNOVA_MOVE, keys.SCAFFOLD_CONTROL, keys.GRADIENTS])
CONSTANTS = {name: value for name, value in vars(keys).items() if name.isupper() and isinstance(value, str)}
PREFIXES = keys.PRICED + keys.FREE


@given(layers)
def test_a_layer_comes_back_from_its_keys(layer: str) -> None:
    weight, mask = keys.weight(layer), keys.mask(layer)
    assert keys.layer_of(weight) == keys.layer_of(mask) == layer
    assert keys.name_of(weight) == keys.name_of(mask) == f"{layer}.weight"
    assert (keys.mask_of(weight), keys.weight_of(mask)) == (mask, weight)


@given(layers, kinds)
def test_gradients_and_the_state_of_optimisers_belong_to_a_weight(layer: str, kind: str) -> None:
    key = f"{kind}{layer}.weight"
    assert keys.name_of(key) == f"{layer}.weight"
    assert (keys.weight_of(key), keys.mask_of(key), keys.layer_of(key)) == (keys.weight(layer), keys.mask(layer), layer)


@given(layers)
def test_the_keys_of_a_layer_are_distinct_and_priced(layer: str) -> None:
    made = [keys.weight(layer), keys.mask(layer), keys.gain(layer), keys.removed(layer), keys.top_index(layer), keys.top_value(layer)]
    assert len(set(made)) == len(made)
    assert all(key.startswith(keys.PRICED) for key in made)
    assert all(layer in key for key in made)


@given(layers, layers)
def test_two_layers_share_no_key(one: str, other: str) -> None:
    made = (keys.weight, keys.mask, keys.gain, keys.removed, keys.top_index, keys.top_value)
    assert one == other or not {make(one) for make in made} & {make(other) for make in made}


def test_a_bias_is_named_whole() -> None:
    """A layer's bias has no mask, so that what stands before .bias is not taken for a layer."""
    assert keys.layer_of("w/fc1.bias") == keys.name_of("w/fc1.bias") == "fc1.bias"


def test_no_prefix_begins_another() -> None:
    assert not [pair for pair in combinations(PREFIXES, 2) if pair[0].startswith(pair[1]) or pair[1].startswith(pair[0])]
    assert all(prefix.endswith("/") and prefix.count("/") == 1 for prefix in PREFIXES)


@pytest.mark.parametrize("name", CONSTANTS)
def test_every_key_of_the_grammar_has_one_prefix(name: str) -> None:
    assert sum(CONSTANTS[name].startswith(prefix) for prefix in PREFIXES) == 1


def test_names_are_distinct() -> None:
    assert len(set(CONSTANTS.values())) == len(CONSTANTS)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_prefix_has_a_price_and_stands_in_the_tables(prefix: str) -> None:
    kind = "momentum/" if prefix == keys.OPTIMISER else ""
    value = torch.arange(8) % 2 == 0 if prefix == keys.MASKS else torch.zeros(8)
    bytes_sent = communication.length({f"{prefix}{kind}conv1.weight": value})
    assert (bytes_sent == 0) == (prefix in keys.FREE)
    map_of_the_code = (Path(keys.__file__).parents[1] / "README.md").read_text()
    assert f"`{prefix}`" in (keys.__doc__ or "")
    assert f"`{prefix}`" in map_of_the_code


def test_an_unknown_prefix_is_refused_with_all_there_are() -> None:
    with pytest.raises(ValueError, match="no price for 'weight/conv1'") as refused:
        communication.length({"weight/conv1": torch.zeros(1)})
    assert all(prefix in str(refused.value) for prefix in PREFIXES)


def test_the_examples_in_the_docstrings_hold() -> None:
    found = doctest.testmod(keys)
    assert found.attempted >= 6
    assert found.failed == 0
