"""ADP's check 14: clients whose classes differ get masks that differ, and each does better with its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from adp_federation import coloured, states, used
from small_federation import FLEETS, World, world
from torch import Tensor

from fedsim import models
from fedsim.core.keys import GATE
from fedsim.core.tree import under
from fedsim.core.types import LocalTraining
from fedsim.data.image_sets import Stored
from fedsim.methods.adp import ADP
from fedsim.models.settings import ModelSettings
from fedsim.nn import profiler
from fedsim.pruning import gates

SEEDS = range(5)


def two(seed: int, kind: type = FLEETS[0]) -> World:
    """Two clients, one with red images and one with blue ones."""
    x, y, owners = coloured(60, seed)
    data = Stored("colours", x, y, 4, (0.5,) * 3, (0.25,) * 3, owners)
    settings = ModelSettings("cnn", width=8, norm="group", gate_keep=0.5)
    module = models.build(settings, data.shape, 4, seed)
    made = world(data, module, kind, LocalTraining(epochs=0, steps=2, batch=20, lr=0.1, momentum=0.9))
    made.setting = replace(made.setting, rounds=25, seed=seed, model_profile=profiler.profile(module, data.shape))
    return made


def share(made: World, model: dict[str, Tensor], client: int, seed: int) -> float:
    """Accuracy on new images of a client."""
    x, y, owners = coloured(100, 1000 + seed)
    mine = owners == client
    logits = made.setting.net(model, (x[mine].double() / 255 - 0.5) / 0.25)[0]
    return float((logits.argmax(1) == y[mine]).double().mean())


@pytest.fixture(scope="module")
def found() -> list[dict[object, float]]:
    """Of every seed, (whose mask, whose images) -> accuracy, and the masks' overlap."""
    every = []
    for seed in SEEDS:
        made = two(seed)
        state = states(made, ADP())[0][-1]
        masks = [used(made, ADP(), state, k)[GATE] for k in (0, 1)]
        w = under(state.shared, "w/", "buf/")
        every.append({(a, b): share(made, w | {GATE: masks[a]}, b, seed) for a in (0, 1) for b in (0, 1)})
        every[-1]["overlap"] = float(gates.overlap(torch.stack(masks))[0, 1])
    return every


def test_masks_differ(found) -> None:
    assert all(row["overlap"] < 1 for row in found)


@pytest.mark.parametrize("client", [0, 1])
def test_a_client_s_own_mask_is_better_for_it_than_the_other_s(client, found) -> None:
    own, other = ([row[mask, client] for row in found] for mask in (client, 1 - client))
    assert sum(own) / len(SEEDS) > sum(other) / len(SEEDS) + 0.05
