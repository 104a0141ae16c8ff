"""Buffers that a forward changes: as torch changes them within a client, averaged like running statistics between clients."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import model_kinds
import pytest
import torch
from model_kinds import Changing
from torch import Tensor, nn
from torch.nn import functional as F
from two_clients import SIZES, population

from fedsim.core import keys
from fedsim.core.tree import mean
from fedsim.core.types import Feed
from fedsim.federated.aggregation import FedAvg, FedNova, Scaffold
from fedsim.federated.client_work import Evaluate, Train
from fedsim.fleet import packed, serial
from fedsim.fleet.cuda_graph import fleet as cuda_graph
from fedsim.fleet.messages import Pack, WorkerContext, WorkOrder
from fedsim.nn import slots
from fedsim.nn.net import Net
from fedsim.nn.profiler import profile

FLEETS: dict[str, Any] = {"serial": serial, "packed": packed, "cuda_graph": cuda_graph}
RATE, EPOCHS = 0.05, 2


@pytest.fixture(autouse=True)
def _no_warning_of_vmap() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        yield


def made(how: str) -> nn.Module:
    torch.manual_seed(0)
    return model_kinds.changing(how) if how != "container" else model_kinds.always_counting()


def carried_out(net: Net, fleet: Any, work: Any, shared: dict[str, Tensor]) -> Any:
    order = WorkOrder(work, net, shared, 1, sum(SIZES))
    with torch.no_grad():
        return fleet.carry_out(order, Pack([0, 1], {}, [None] * 2, [[0, 0]] * 2), WorkerContext(net, population(8), 0))


def trained(net: Net, fleet: Any, aggregate: FedAvg | None = None, batch: int = 1) -> dict[str, Tensor]:
    """The broadcast after a round of two clients."""
    aggregate = aggregate or FedAvg()
    work = Train((Feed("train", epochs=EPOCHS, batch=batch, augment=False),), lr=RATE, aggregate=aggregate)
    memory = aggregate.init_memory(net.initial)
    shared = aggregate.shared(memory, net.initial)
    setting: Any = type("Setting", (), {"clients": 2})
    return aggregate.server(memory, shared, carried_out(net, fleet, work, shared).total.value(), setting)[0]


@pytest.mark.parametrize("fleet", FLEETS)
@pytest.mark.parametrize("how", ["in place", "assigned", "mean", "container"])
def test_buffers_change_as_in_torch_and_are_averaged(how, fleet, monkeypatch) -> None:
    module = made(how)
    net, seen = Net(module), []
    gradient = Net.gradient
    monkeypatch.setattr(
        Net, "gradient", lambda self, tree, batch, *a, **k: (seen.append((batch.x, batch.y)), gradient(self, tree, batch, *a, **k))[1]
    )
    trained(net, serial)
    monkeypatch.undo()
    after = trained(net, FLEETS[fleet])

    steps = [EPOCHS * n for n in SIZES]
    clients = []
    for batches in (seen[: steps[0]], seen[steps[0] :]):
        client = copy.deepcopy(module).train()
        optimiser = torch.optim.SGD(client.parameters(), RATE)
        for x, y in batches:
            optimiser.zero_grad()
            F.cross_entropy(client(x), y).backward()
            optimiser.step()
        clients.append(dict(client.named_buffers()))
    assert len(seen) == sum(steps)
    for key in net.initial:
        if key.startswith(keys.BUFFERS):
            one, other = (client[keys.name_of(key)].double() for client in clients)
            right = (SIZES[0] * one + SIZES[1] * other) / sum(SIZES)
            right = right if net.initial[key].is_floating_point() else right.round()
            assert torch.allclose(after[key].double(), right, atol=1e-5), key
            assert not torch.equal(after[key], net.initial[key]), key
            assert after[key].dtype == net.initial[key].dtype
    assert "buf/2.table" not in after


@pytest.mark.parametrize("aggregate", [FedNova(0.0), Scaffold(RATE)], ids=["fednova", "scaffold"])
def test_other_aggregations_average_them_alike(aggregate) -> None:
    net = Net(made("in place"))
    assert trained(net, packed, aggregate)["buf/2.count"] == round((3 * 6 + 5 * 10) / 8)


@pytest.mark.parametrize("fleet", FLEETS)
def test_evaluation_uses_them_and_changes_none(fleet) -> None:
    net = Net(made("container"))
    shared = net.initial | {"buf/count": torch.tensor(20), "buf/scale": torch.full((6, 1, 1), 2.0)}
    method: Any = type("Method", (), {"model_of": staticmethod(lambda net, sent: sent.tree({}))})
    found = carried_out(net, FLEETS[fleet], Evaluate.of(method, 2, "train"), shared).total.value()
    again = carried_out(net, FLEETS[fleet], Evaluate.of(method, 2, "train"), shared).total.value()
    assert all(torch.equal(value, again[key]) for key, value in found.items())
    plain = net.plain(shared)
    assert plain.get_buffer("count") == 20
    data = population(8).train
    x = data.images(torch.arange(sum(SIZES))).float().div(255).sub(0.5).div(0.25)
    with torch.no_grad():
        losses = [float(F.cross_entropy(copy.deepcopy(plain)(x[i : i + 1]), data.labels(torch.tensor([i])))) for i in range(len(x))]
    assert float(found[keys.LOSS_SUM]) == pytest.approx(sum(losses), rel=1e-5)


def test_a_module_keeps_nothing_of_a_call() -> None:
    net = Net(made("in place"))
    x = torch.randn(4, 3, 8, 8)
    first, one = net(net.initial, x, True)
    second, two = net(net.initial, x, True)
    assert torch.equal(first, second)
    assert int(one["buf/2.count"]) == int(two["buf/2.count"]) == 1
    assert int(net.initial["buf/2.count"]) == int(net.original[2].count) == 0


def test_the_training_mode_is_that_of_the_call_also_after_a_twin_was_called() -> None:
    """A twin has the same module."""
    net = Net(made("in place"))
    x = torch.randn(4, 3, 8, 8)
    net.under_vmap()(net.initial, x, False)
    assert int(net(net.initial, x, True)[1]["buf/2.count"]) == 1


class Asking(nn.Module):
    """Doubles its input in evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training else 2 * x


def test_a_module_that_asks_for_the_mode_is_in_that_of_each_call() -> None:
    net, x = Net(nn.Sequential(Asking(), nn.Flatten())), torch.ones(1, 1, 2, 2)
    given = [float(each(net.initial, x, train)[0].sum()) for each in (net, net.under_vmap(), net) for train in (True, False)]
    assert given == 3 * [4.0, 8.0]


def test_which_buffers_are_averaged() -> None:
    module = nn.Sequential(nn.BatchNorm2d(3), Changing())
    module.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
    assert list(slots.averaged(module)) == ["0.running_mean", "0.running_var", "1.count", "1.scale", "1.begun"]
    assert profile(made("in place"), (3, 8, 8)).buffers == 1 + 6 + 1


def test_counters_are_rounded_to_the_nearest() -> None:
    total = {"buf/count": torch.tensor(3 * 7.0 + 5 * 8, dtype=torch.float64), "buf/on": torch.tensor(5.0, dtype=torch.float64)}
    like = {"buf/count": torch.tensor(0), "buf/on": torch.tensor(False)}
    assert mean(total, torch.tensor(8.0), like) == {"buf/count": torch.tensor(8), "buf/on": torch.tensor(True)}


def test_a_net_in_another_dtype_goes_on_counting() -> None:
    net = Net(made("in place")).to("cpu", torch.float64)
    assert net.initial["buf/2.count"].dtype == torch.int64
    _, found = net(net.initial, torch.randn(2, 3, 8, 8).double(), True)
    assert found["buf/2.count"].dtype == torch.int64
    assert found["buf/2.scale"].dtype == torch.float64


def test_a_buffer_that_becomes_another_kind_of_tensor_is_refused_by_name() -> None:
    net = Net(model_kinds.other_dtype())
    with pytest.raises(ValueError, match=r"buffer count is \(\) int64 before a forward and \(\) float32 after"):
        net(net.initial, torch.zeros(2, 3, 8, 8), True)
