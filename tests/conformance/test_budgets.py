"""What a method promises of density and zeros, and what the ledger charges for what is sent."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from cases import FLEETS, TABLE, table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedsim.config import job
from fedsim.core.tree import under
from fedsim.core.types import Batch
from fedsim.simulation.experiment import build_experiment
from fedsim.storage.reader import RunReader, read_model

NAMES = list(TABLE)


@pytest.mark.parametrize("fleet", FLEETS)
@pytest.mark.parametrize("name", NAMES)
def test_density_never_exceeds_the_budget(name, fleet, alone) -> None:
    if TABLE[name].budget is not None:
        assert RunReader(alone[name, fleet]).column("density").max() <= TABLE[name].budget


@pytest.mark.parametrize("fleet", FLEETS)
@pytest.mark.parametrize("name", NAMES)
def test_pruned_weights_are_exactly_zero(name, fleet, alone) -> None:
    model = read_model(alone[name, fleet])
    masks = [key for key in model if key.startswith("mask/")]
    assert bool(masks) == TABLE[name].masked
    for key in masks:
        assert (model["w/" + key[5:]][~model[key]] == 0).all()
        assert (model["w/" + key[5:]][model[key]] != 0).any()


PLACES = {"aten::convolution": 1, "aten::addmm": 2, "aten::mm": 1}  # of the weight among the arguments


class WeightsInUse(TorchDispatchMode):
    """Collects the weights of all convolutions and matrix products, by the layer that is at work."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.found: dict[str, Tensor] = {}
        self.layer = ""
        for name, layer in module.named_modules():
            layer.register_forward_pre_hook(partial(self._enter, name))

    def _enter(self, name: str, *_: Any) -> None:
        self.layer = name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        place = PLACES.get(func._schema.name)
        if place is not None:
            weight = args[place]
            self.found.setdefault(self.layer, weight.clone() if weight.dim() > 2 else weight.t().clone())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", [name for name in NAMES if TABLE[name].masked])
def test_weights_in_use_are_zero_where_the_mask_is(name, train, alone, folder) -> None:
    """Also where a layer makes its weight of the stored one: what convolutions and matrix products are given."""
    parts, tree = build_experiment(job.check(table(name, "serial", folder))), read_model(alone[name, "serial"])
    net, data = parts.setting.net, parts.population.train
    x = data.images(torch.arange(4)).float() / 255
    with torch.no_grad(), WeightsInUse(net.module) as used:
        net(under(tree, "w/", "buf/", "mask/"), x, train, draws=Batch(x, x, None, torch.tensor(0), torch.tensor(1), key=torch.tensor(0)))
    masked = [key for key in tree if key.startswith("mask/")]
    assert {key[5:].removesuffix(".weight") for key in masked} <= used.found.keys()
    for key in masked:
        weight = used.found[key[5:].removesuffix(".weight")]
        assert not weight[~tree[key]].any(), key
        assert weight[tree[key]].any()


@pytest.mark.parametrize("name", NAMES)
def test_the_ledger_charges_what_would_be_encoded(name, alone) -> None:
    """Every size that the ledger charges is that of the real encoding, which decodes to what was sent."""
    encoded = alone.encoded(name)
    assert not encoded.errors
    assert encoded.size > 0


def test_a_static_masks_bytes_by_hand(alone) -> None:
    """Dense first layer and free values 4 bytes each, kept weights 4, positions once to each client and again when they changed."""
    reader = RunReader(alone["static-mask", "serial"])
    model = read_model(alone["static-mask", "serial"])
    kept = sum(int(model[key].sum()) for key in model if key.startswith("mask/"))
    sizes = [model[key].numel() for key in model if key.startswith("mask/")]
    ones = [int(model[key].sum()) for key in model if key.startswith("mask/")]
    others = sum(value.numel() for key, value in model.items() if key[:2] in ("w/", "bu") and "mask/" + key[2:] not in model)
    positions = sum(min(4 * one, -(-size // 8)) for one, size in zip(ones, sizes, strict=True))
    up = reader.clients("bytes_up", 1)
    down = reader.clients("bytes_down", 1)
    took = reader.clients("in_cohort", 1) == 1
    assert took.sum() == 4
    assert (up[took] == 4 * (kept + others)).all()
    assert (down[took] == 4 * (kept + others) + positions).all()
    later = np.nansum(reader.clients("in_cohort"), axis=0)
    third = reader.clients("bytes_down", 3)
    assert (third[reader.clients("in_cohort", 3) == 1] > 4 * (kept + others)).all()
    assert later.max() == 3
