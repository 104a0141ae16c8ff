"""Every model with every norm trains alike one client after the other and stacked, with clients of unequal size."""

from __future__ import annotations

import pytest
import torch
from two_clients import SIZES, population

from fedsim import models
from fedsim.core.types import Feed
from fedsim.federated.client_work import Train
from fedsim.fleet import packed, serial
from fedsim.fleet.messages import Pack, WorkerContext, WorkOrder
from fedsim.models.settings import ModelSettings
from fedsim.nn.net import Net

CASES = [(name, norm) for name in models.FAMILIES for norm in ("batch", "group", "none") if name not in ("resnet32", "resnet56", "vgg16")]


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_stacked_clients_are_clients(name, norm) -> None:
    size = max(8, models.FAMILIES[name].least)
    width = {"vgg11": 8, "resnet18": 8}.get(name)
    module = models.build(ModelSettings(name=name, width=width, norm=norm), (3, size, size), 4, 0)
    net = Net(module).to("cpu", torch.float64)
    site = WorkerContext(net, population(size), 0, dtype=torch.float64)
    order = WorkOrder(Train((Feed("train", epochs=1, batch=4, augment=False),), 0.01, 0.9), net, net.initial, 1, sum(SIZES))
    pack = Pack(list(range(len(SIZES))), {}, [None] * len(SIZES), [[0] * len(SIZES)] * 2)
    with torch.no_grad():
        mine, theirs = (engine.carry_out(order, pack, site).total.value() for engine in (serial, packed))
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        assert torch.allclose(value, theirs[key], rtol=1e-6, atol=1e-6), key
