"""Every model with every norm trains alike one client after the other and stacked, with clients of unequal size."""

from __future__ import annotations

import pytest
import torch

from fedsim import models
from fedsim.core.types import Feed
from fedsim.data.image_sets import Stored
from fedsim.data.partition import PartitionSettings
from fedsim.data.population import Population, divide
from fedsim.federated.client_work import Train
from fedsim.fleet import packed, serial
from fedsim.fleet.messages import Pack, WorkerContext, WorkOrder
from fedsim.models.settings import ModelSettings
from fedsim.nn.net import Net

SIZES = (3, 5)
CASES = [(name, norm) for name in models.FAMILIES for norm in ("batch", "group", "none") if name not in ("resnet32", "resnet56", "vgg16")]


def population(size: int) -> Population:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (sum(SIZES), 3, size, size), generator=generator, dtype=torch.uint8)
    users = torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(SIZES))
    data = Stored("own", x, torch.arange(sum(SIZES)) % 4, 4, (0.5,) * 3, (0.25,) * 3, users)
    return divide(data, data, PartitionSettings(name="natural", clients=0, min_images=1, test="global"), 0)


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
