"""What methods share that train one sparse model under masks: which layers have masks, the first masks, and averaging under them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fedsim.core import keys, masks, rng
from fedsim.core.tree import Tree
from fedsim.core.types import Data
from fedsim.core.validation import TINY, within
from fedsim.errors import BadInput
from fedsim.federated.averaged_round import AveragedState, averaged_round
from fedsim.federated.protocol import Fleet, Method, Setting
from fedsim.nn.net import Net
from fedsim.pruning.sparsity import layer_densities


@dataclass(frozen=True)
class MaskedAveraging(Method[AveragedState]):
    """Averages the training of one sparse model. A subclass says which weights it keeps at first, and in `round` how its masks move."""

    density: float = 0.1  # d, kept share of all conv and linear weights, dense layers included
    sharing: Literal["erk", "er", "uniform"] = "erk"  # how layers share the density: by Erdős-Rényi-kernel, by Erdős-Rényi, or all alike
    mask_first: bool = False  # whether the first layer is pruned as well; false: it stays dense
    mask_classifier: bool = True  # whether the last layer is pruned

    def __post_init__(self) -> None:
        within(self, density=(TINY, 1))

    def init(self, setting: Setting, public: Data | None) -> AveragedState:
        try:
            return AveragedState.begin(setting, masked(setting.net.initial, self.first_masks(setting, public)))
        except BadInput:
            raise
        except ValueError as error:
            raise BadInput(f"[method] {error}") from error

    def round(self, setting: Setting, state: AveragedState, fleet: Fleet, r: int) -> tuple[AveragedState, dict[str, float]]:
        return averaged_round(setting, fleet, state, r)

    def deploy(self, setting: Setting, state: AveragedState, fleet: Fleet, cohort: Sequence[int]) -> tuple[Tree, Tree, Net | None]:
        return state.shared, {}, None

    def first_masks(self, setting: Setting, public: Data | None) -> Tree:
        """ "mask/NAME" of every masked layer before round 1: by default the largest initial weights. ValueError where there can be none."""
        return largest(setting.net.initial, self.counts(setting.net))

    def layers(self, net: Net) -> tuple[str, ...]:
        """The layers that have masks, in network order."""
        return masked_layers(net, self.mask_first, self.mask_classifier)

    def counts(self, net: Net) -> dict[str, int]:
        """Kept weights of every masked layer. ValueError for a density that leaves a layer without any."""
        return layer_densities.kept_counts(net, self.layers(net), self.density, self.sharing)


def masked_layers(net: Net, first: bool = False, classifier: bool = True) -> tuple[str, ...]:
    """The layers that have masks, in network order; whether the first and the last one are among them."""
    every = net.maskable if classifier else net.maskable[:-1]
    return (*(layer for layer in net.sizes if layer not in net.maskable and first), *every)


def masked(shared: Tree, held: Tree) -> Tree:
    """A broadcast with these masks, its pruned weights exactly 0."""
    return masks.apply(shared, held) | held


def largest(tree: Tree, counts: Mapping[str, int]) -> Tree:
    """Masks that keep the largest weights of `tree`, so many of each layer."""
    return {keys.mask(layer): masks.top(tree[keys.weight(layer)].abs(), k) for layer, k in counts.items()}


def drawn(net: Net, counts: Mapping[str, int], seed: int) -> Tree:
    """Masks at positions drawn from the seed, so many of each layer."""
    return {keys.mask(layer): _drawn(net.initial[keys.weight(layer)], k, seed, i) for i, (layer, k) in enumerate(counts.items())}


def _drawn(w: Tensor, k: int, seed: int, place: int) -> Tensor:
    order = rng.permutation(rng.key(seed, "mask", place), w.numel()).to(w.device)
    return masks.first(order, k, w.shape)


def empty_layers(held: Tree) -> int:
    """How many layers keep no weight at all: a ranking of all layers together may empty some."""
    return sum(not bool(mask.any()) for key, mask in held.items() if key.startswith(keys.MASKS))
