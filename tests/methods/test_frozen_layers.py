"""Layers that are frozen: no mask of theirs moves, because what grew there would stay 0; the masks of the others do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_training import plain
from small_federation import FLEETS, World, drawn, stored, world
from torch import nn

from fedsim.core.types import LocalTraining
from fedsim.errors import BadInput
from fedsim.methods.baselines.at_init import AtInit
from fedsim.methods.baselines.feddst import FedDST
from fedsim.methods.baselines.fedrts import FedRTS
from fedsim.methods.baselines.prunefl import PruneFL
from fedsim.methods.baselines.rigl import RigL
from fedsim.methods.fedmef import FedMef
from fedsim.methods.fedtiny import FedTiny

OFTEN: dict[str, Any] = {"density": 0.45, "adjust_every": 2, "stop_round": 8, "adjust_fraction": 0.4}
METHODS = {
    "rigl": RigL(**OFTEN),
    "set": RigL(**OFTEN, growth="random"),
    "feddst": FedDST(**OFTEN),
    "fedrts": FedRTS(**OFTEN),
    "prunefl": PruneFL(form="library", **OFTEN),
    "fedtiny": FedTiny(**OFTEN, blocks="all", selection="none", pretrain_epochs=0, pool=1),
    "fedmef": FedMef(**OFTEN, blocks="all", extrusion_rounds=1),
}


def frozen(kind: type = FLEETS[0]) -> World:
    module: nn.Module = plain()
    module.get_parameter("fc1.weight").requires_grad_(False)
    return world(stored(*drawn([6, 9, 5])), module, kind, LocalTraining(batch=4, epochs=2, lr=0.1))


@pytest.mark.parametrize("kind", FLEETS)
@pytest.mark.parametrize("name", METHODS)
def test_masks_move_in_trained_layers_alone(name, kind) -> None:
    one = frozen(kind)
    first, _ = one.play(METHODS[name], 0)
    last, told = one.play(METHODS[name], 4, state=first)
    for key in ("w/fc1.weight", "mask/fc1.weight"):
        assert torch.equal(last.shared[key], first.shared[key])
    assert not all(torch.equal(last.shared[f"mask/{layer}.weight"], first.shared[f"mask/{layer}.weight"]) for layer in ("conv2", "fc2"))
    assert told[1]["weights_swapped"] > 0


def test_prunefl_reconfigures_trained_layers_alone() -> None:
    one = frozen()
    method = PruneFL(adjust_every=2, initial_iterations=4, initial_every=2, start_accuracy=0, constant_seconds=0.5)
    state, _ = one.play(method, 4)
    assert torch.equal(state.shared["w/fc1.weight"], one.setting.net.initial["w/fc1.weight"])
    assert {key for key in state.shared if key.startswith("mask/")} == {"mask/conv2.weight", "mask/fc2.weight"}
    assert not all(state.shared[f"mask/{layer}.weight"].all() for layer in ("conv2", "fc2"))


@pytest.mark.parametrize("data", ["server", "clients"])
def test_a_frozen_layer_cannot_be_scored_by_gradients_and_that_is_known_at_once(data) -> None:
    one = frozen()
    with pytest.raises(BadInput, match="layer 'fc1' is frozen"):
        AtInit(score="snip", data=data, density=0.45).init(one.setting, stored(*drawn([8])))
