"""The examples in the docstrings of the lower packages run, and give what they show."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest

MODULES = [
    "core.exact_sum",
    "core.keys",
    "core.masks",
    "core.rng",
    "core.serialization",
    "core.trace",
    "core.tree",
    "core.types",
    "core.validation",
    "federated.aggregation",
    "federated.averaged_round",
    "federated.client_work",
    "federated.protocol",
    "nn.channels",
    "nn.net",
    "nn.profiler",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    found = doctest.testmod(import_module(f"fedsim.{name}"))
    assert found.attempted > 0
    assert found.failed == 0
