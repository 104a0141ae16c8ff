"""Budgets by kind of device become budgets of clients, or are refused."""

from __future__ import annotations

import numpy as np
import pytest

from fedsim.core.serialization import dump, load
from fedsim.errors import BadInput
from fedsim.federated.budgets import OfClients, given_by_kind, of_clients
from fedsim.federated.client_work import Evaluate
from fedsim.methods.baselines.heterofl import HeteroFL
from fedsim.methods.dwfnp import DWFNP
from fedsim.methods.fedavg import FedAvg

KINDS, OF_EACH = ["board", "phone"], np.array([1, 0, 0, 1])


def test_a_number_for_each_kind_becomes_one_for_each_client() -> None:
    method = HeteroFL(rates={"phone": 1, "board": 0.25})
    assert given_by_kind(method) == ["rates"]
    rates = of_clients(method, KINDS, OF_EACH).rates
    assert isinstance(rates, OfClients)
    assert [rates[client] for client in range(4)] == [1.0, 0.25, 0.25, 1.0]
    shares = of_clients(DWFNP(client_flops_share={"board": 0.2, "phone": 0.5}), KINDS, OF_EACH).client_flops_share
    assert [shares[client] for client in range(4)] == [0.5, 0.2, 0.2, 0.5]


def test_a_work_takes_the_numbers_to_other_ranks_and_not_the_clients() -> None:
    method = of_clients(HeteroFL(rates={"phone": 1, "board": 0.25}), KINDS, np.zeros(1_000_000, int))
    plain, tensors = dump(Evaluate.of(method, 16))
    assert not tensors
    assert len(str(plain)) < 2_000
    assert load(plain, {}).method.widths == [1.0, 0.25]


def test_a_method_without_such_numbers_is_left_as_it_is() -> None:
    method = FedAvg()
    assert of_clients(method, KINDS, OF_EACH) is method


def test_kinds_that_there_are_not_and_kinds_without_a_number_are_refused() -> None:
    with pytest.raises(BadInput, match=r"rates names the kind 'tablet'\. There are: board, phone"):
        of_clients(HeteroFL(rates={"board": 0.5, "tablet": 0.5}), KINDS, OF_EACH)
    with pytest.raises(BadInput, match="rates has no number for 'phone'"):
        of_clients(HeteroFL(rates={"board": 0.5}), KINDS, OF_EACH)
    with pytest.raises(BadInput, match=r"rates = \[2.0\]: each should be above 0 and at most 1"):
        HeteroFL(rates={"board": 2.0})
