"""What a method promises of density and zeros, and what the ledger charges for what is sent."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from cases import FLEETS, ROUNDS, TABLE, table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedsim.config import job
from fedsim.core.tree import under
from fedsim.core.types import Batch
from fedsim.costs.flops import forward_flops
from fedsim.costs.memory import TERMS
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


@pytest.mark.parametrize("name", NAMES)
def test_every_total_is_the_sum_of_its_terms_and_every_row_has_them(name, alone) -> None:
    reader = RunReader(alone[name, "serial"])
    held = np.stack([reader.column(f"memory_{term}") for term in TERMS])
    np.testing.assert_array_equal(held.sum(0), reader.column("max_client_memory"))
    assert (held[0, 1:] > 0).all()
    assert (held >= 0).all()
    spent = [reader.column(column) for column in reader.names() if column.startswith("server_flops_")]
    np.testing.assert_array_equal(np.nansum(spent, axis=0) if spent else np.zeros(ROUNDS + 1), reader.column("server_flops"))
    assert (reader.column("extra_flops") <= reader.column("train_flops")).all()
    assert (reader.column("max_client_flops_at_mean")[1:] <= reader.column("train_flops")[1:]).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_share_of_weights_that_are_not_0_is_that_of_the_final_model(name, alone, folder) -> None:
    reader, model = RunReader(alone[name, "serial"]), read_model(alone[name, "serial"])
    profile = build_experiment(job.check(table(name, "serial", folder))).model_profile
    found = sum(int((model[f"w/{layer.name}.weight"] != 0).sum()) for layer in profile.layers)
    assert reader.column("nonzero_share")[-1] == found / profile.weights
    if TABLE[name].method != "dwfnp" and name != "adp-global":  # their servers close gates, which leaves the weights behind them
        assert (reader.column("nonzero_share") <= reader.column("density")).all()


def test_an_adjusting_round_holds_more_by_the_dense_gradient_and_the_buffer_and_computes_more_by_a_batch(alone, folder) -> None:
    """fedmef exchanges weights of all layers in round 2, of three; a client in several rounds has as many images in all of them."""
    reader = RunReader(alone["fedmef", "serial"])
    held = {term: reader.column(f"memory_{term}")[1:] for term in TERMS}
    assert {term for term, column in held.items() if len(set(column.tolist())) > 1} == {"dense_gradient", "top"}
    parts = build_experiment(job.check(table("fedmef", "serial", folder)))
    sizes = {layer.name: layer.weights for layer in parts.model_profile.layers}
    most, moved = max(sizes[layer] for layer in parts.setting.net.maskable), reader.column("weights_swapped")[2]
    assert held["dense_gradient"].tolist() == [0, 4 * most, 0]
    assert held["top"].tolist() == [0, 8 * moved, 0]
    spent, took = reader.clients("train_flops"), reader.clients("in_cohort") == 1
    dense, sparse = forward_flops(parts.model_profile), reader.column("inference_flops")[1]
    shards = parts.population.shards["train"]
    for client in np.flatnonzero(took[1] & took[2]):
        assert spent[2, client] - spent[1, client] == min(10, shards.size(client)) * (2 * sparse + dense)
