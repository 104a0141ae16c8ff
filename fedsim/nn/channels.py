"""The channels of a network: gates split into groups, weights in use counted, tensors and modules cut to the kept ones.

Shapes: n channels of all groups in network order, C_l those of group l. `kept` says what a cut leaves: group -> (c,) int64 positions.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.core import keys
from fedsim.core.tree import Tree
from fedsim.nn import slots, subnetwork
from fedsim.nn.channel_groups import NORMS, Group
from fedsim.nn.gradients.compact import ChannelBlock, cuttable
from fedsim.nn.layers import input_gate
from fedsim.nn.layers.standardized_conv import StandardisedConv2d, filter_moments
from fedsim.nn.subnetwork import ordinary

Place = tuple[int, str, int]  # axis of a tensor, the group it runs along, positions of a channel


@dataclass(frozen=True)
class Channels:
    """All channel groups of a network: what a gate closes, what a cut leaves, and how many weights are then in use.

    Args:
        groups: in network order, as `channel_groups.find_groups` gives them.
        shapes: layer -> shape of its weight.

    >>> from fedsim.nn.net import Net
    >>> net = Net(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    >>> net.channels.widths
    [3]
    >>> kept = net.channels.kept(torch.tensor([True, False, True]))
    >>> kept
    {'1': tensor([0, 2])}
    >>> net.channels.used([2])  # weights in use with two open channels
    {'1': 8, '3': 4}
    >>> {key: tuple(value.shape) for key, value in net.channels.cut(net.initial, kept).items()}
    {'w/1.weight': (2, 4), 'w/1.bias': (2,), 'w/3.weight': (2, 2), 'w/3.bias': (2,)}
    """

    groups: tuple[Group, ...]
    shapes: dict[str, tuple[int, ...]]  # layer -> shape of its weight
    standardised: frozenset[str] = frozenset()  # layers whose filters are
    halves: frozenset[str] = frozenset()  # dynamic gates that read sigmoid(0) = 1/2 from a closed channel

    @property
    def n(self) -> int:
        """The number of channels of all groups: the length of a gate."""
        return sum(self.widths)

    @cached_property
    def widths(self) -> list[int]:
        """C_l, the number of channels of each group."""
        return [group.size for group in self.groups]

    @cached_property
    def rows(self) -> dict[str, str]:
        """Tensor -> the group whose channels are its first axis."""
        return {row: group.name for group in self.groups for row in group.rows}

    @cached_property
    def norms(self) -> dict[str, str]:
        """Norm -> group."""
        return {norm: group.name for group in self.groups for norm in group.norms}

    @cached_property
    def depthwise(self) -> dict[str, str]:
        """Depth-wise convolution -> group."""
        return {layer: group.name for group in self.groups for layer in group.depthwise}

    @cached_property
    def _places(self) -> dict[str, list[Place]]:
        """Tensor -> where its channels are."""
        places: dict[str, list[Place]] = {row: [(0, group, 1)] for row, group in self.rows.items()}
        for group in self.groups:
            for column in group.columns:
                each = self.shapes[column.removesuffix(".weight")][1] // group.size
                places.setdefault(column, []).append((1, group.name, each))
        return places

    # ---- gates of all groups in a row

    def split(self, gate: Tensor) -> Tree:
        """Group -> its part (…, C_l) of gates (…, n) of all groups."""
        return dict(zip((group.name for group in self.groups), gate.split(self.widths, -1), strict=True))

    def kept(self, gate: Tensor) -> Tree:
        """Group -> (c,) int64 positions of its open channels, of a hard gate (n,) bool; ValueError for a group with none open."""
        kept = {name: part.nonzero().flatten() for name, part in self.split(gate).items()}
        if empty := [name for name, index in kept.items() if not len(index)]:
            raise ValueError(f"the gate keeps no channel of {empty[0]}; every group keeps at least one")
        return kept

    def gate(self, kept: Tree) -> Tensor:
        """(n,) bool, the hard gate that keeps these channels."""
        return torch.cat([torch.zeros(g.size, dtype=torch.bool).index_fill(0, kept[g.name].cpu(), True) for g in self.groups])

    def open(self, gate: Tensor) -> list[list[int]]:
        """The number of open channels of every group, for each row of hard gates (R, n) bool."""
        return torch.stack([part.sum(-1) for part in self.split(gate).values()], -1).tolist()

    def used(self, open: Sequence[int]) -> dict[str, int]:
        """Layer -> number of weights in use, for every layer that a group touches; `open`: open channels of each group, in order."""
        widths = {group.name: width for group, width in zip(self.groups, open, strict=True)}
        return {name: self._used(name, shape, widths) for name, shape in self.shapes.items() if f"{name}.weight" in self._places}

    def _used(self, layer: str, shape: tuple[int, ...], widths: dict[str, int]) -> int:
        sizes = list(shape)
        for axis, group, each in self._places[f"{layer}.weight"]:
            sizes[axis] = widths[group] * each
        return prod(sizes)

    def cover(self, tree: Tree, gate: Tensor) -> Tree:
        """Which entries of every tensor a hard gate (n,) bool leaves in use: bool of its shape, under the same key. Fit for `vmap`.

        >>> from fedsim.nn.net import Net
        >>> net = Net(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
        >>> cover = net.channels.cover(net.initial, torch.tensor([True, False, True]))
        >>> cover["w/1.bias"], cover["w/3.weight"]
        (tensor([ True, False,  True]), tensor([[ True, False,  True],
                [ True, False,  True]]))
        """
        parts = self.split(gate)
        return {key: _cover(value, self._places.get(_tensor(key), ()), parts) for key, value in tree.items()}

    # ---- cutting

    def cut(self, tree: Tree, kept: Tree) -> Tree:
        """The tree with every tensor cut to the kept channels: "w/…", "buf/…", "mask/…", "opt/momentum/…" alike."""
        compact = {key: _selected(value, self._places.get(_tensor(key), ()), kept) for key, value in tree.items()}
        return compact | self._halved(tree, compact, kept)

    def _halved(self, tree: Tree, compact: Tree, kept: Tree) -> Tree:
        """c' = c + 1/2 of the removed columns of U, of dynamic gates that read 1/2 from a closed channel (ADP, 3.4)."""
        found = {}
        for gate in sorted(self.halves):
            places, weight = self._places.get(f"{gate}.weight", ()), tree.get(keys.weight(gate))
            if weight is None or not any(axis == 1 for axis, _, _ in places):
                continue
            mine = _selected(weight, [place for place in places if place[0] == 0], kept)
            gone = _selected(mine, [place for place in places if place[0] == 1], self._others(kept))
            found[f"{keys.WEIGHTS}{gate}.bias"] = compact[f"{keys.WEIGHTS}{gate}.bias"] + 0.5 * gone.sum(1)
        return found

    def blocks(self, weights: Tree, kept: Tree) -> dict[str, ChannelBlock]:
        """Key -> where its kept channels lie, for the weights that a kernel can cut; the weights of standardised layers are left out."""
        index = {group: part.cpu().numpy() for group, part in kept.items()}
        stored = {keys.weight(layer) for layer in self.standardised}
        places = {key: self._places.get(_tensor(key)) for key, value in weights.items() if cuttable(value) and key not in stored}
        return {key: _block(weights[key].shape, found, index) for key, found in places.items() if found}

    def lost(self, tree: Tree, kept: Tree) -> Tree:
        """ "buf/LAYER.removed" (out, 3) of the standardised layers that lose input channels: what goes on counting in their filters."""
        found = {}
        for layer in sorted(self.standardised):
            places = self._places.get(f"{layer}.weight", ())
            weight, before = tree[keys.weight(layer)], tree.get(keys.removed(layer))
            mine = _selected(weight, [place for place in places if place[0] == 0], kept)
            gone = _selected(mine, [place for place in places if place[0] == 1], self._others(kept))
            if any(place[0] == 1 for place in places) and gone.shape[1]:
                mean, squares = filter_moments(gone)
                lost = torch.stack([torch.full_like(mean, gone[0].numel()), mean, squares], 1)
                old = None if before is None else _selected(before, [place for place in places if place[0] == 0], kept)
                found[keys.removed(layer)] = lost if old is None else _together(lost, old)
        return found

    def _others(self, kept: Tree) -> Tree:
        """Group -> positions of the channels that are not kept."""
        return {name: (~part).nonzero().flatten().to(kept[name].device) for name, part in self.split(self.gate(kept)).items()}

    def spread(self, small: Tree, full: Tree, kept: Tree) -> Tree:
        """Running statistics of the full net: those of the kept channels from `small`, the others from `full`."""
        groups = {key: self.rows.get(_tensor(key)) for key in small}
        return {key: full[key].index_copy(0, kept[group], small[key]) if group else small[key] for key, group in groups.items()}

    def stayed(self, new: Tree, old: Tree, gates: Tree) -> Tree:
        """Running statistics: `old` where the gate (group -> (C_l,) bool) of the channel is closed, else `new`."""
        groups = {key: self.rows.get(_tensor(key)) for key in new}
        return {key: torch.where(gates[group], new[key], old[key]) if group else new[key] for key, group in groups.items()}

    def compact(self, module: nn.Module, kept: Tree) -> nn.Module:
        """A copy of the module that has the kept channels only: smaller layers, nothing masked."""
        small, values = copy.deepcopy(module), {keys.WEIGHTS + name: value.detach() for name, value in module.named_parameters()}
        values |= {keys.BUFFERS + name: value for name, value in module.named_buffers()}
        compact, lost = self.cut(values, kept), self.lost(values, kept)
        for name, layer in small.named_modules():
            for slot in layer._parameters:
                if f"{name}.{slot}" in self._places:
                    value = compact[f"{keys.WEIGHTS}{name}.{slot}"]
                    layer._parameters[slot] = nn.Parameter(value, layer.get_parameter(slot).requires_grad)
            for slot in layer._buffers:
                if f"{name}.{slot}" in self._places:
                    layer._buffers[slot] = compact[f"{keys.BUFFERS}{name}.{slot}"]
            if keys.removed(name) in lost:
                layer._buffers["removed"] = lost[keys.removed(name)]
            _measure(layer, name in self.depthwise)
        return subnetwork.sliced(small, kept) if input_gate.gates_of(small) else small


def _together(one: Tensor, other: Tensor) -> Tensor:
    """Numbers, means and squared deviations (out, 3) of both together (Chan, Golub and LeVeque 1979)."""
    (n, a, s), (m, b, t) = one.unbind(1), other.unbind(1)
    return torch.stack([n + m, (n * a + m * b) / (n + m), s + t + (a - b).square() * (n * m / (n + m))], 1)


def _measure(layer: nn.Module, depthwise: bool) -> None:
    """Sets the sizes of a layer to those of its tensors."""
    weight = layer._parameters.get("weight")
    if isinstance(layer, nn.Conv2d):
        layer.out_channels = layer.weight.shape[0]
        layer.groups = layer.out_channels if depthwise else layer.groups
        layer.in_channels = layer.weight.shape[1] * layer.groups
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, NORMS) and (own := layer.running_mean if weight is None else weight) is not None:
        layer.num_features = len(own)
    elif isinstance(layer, nn.GroupNorm) and weight is not None:
        layer.num_channels = len(weight)


@cache
def _tensor(key: str) -> str:
    """The module's name of a tensor: "opt/momentum/conv.weight" is "conv.weight"."""
    prefix, _, name = key.partition("/")
    return name.partition("/")[2] if prefix == "opt" else name


def _selected(value: Tensor, places: Sequence[Place], kept: Tree) -> Tensor:
    for axis, group, each in places:
        index = kept[group].to(value.device)
        if each > 1:  # a flattened channel
            value = value.unflatten(axis, (-1, each)).index_select(axis, index).flatten(axis, axis + 1)
        else:
            value = value.index_select(axis, index)
    return value


def _cover(value: Tensor, places: Sequence[Place], open: Tree) -> Tensor:
    cover = torch.ones(value.shape, dtype=torch.bool, device=value.device)
    for axis, group, each in places:
        part = open[group].to(value.device).unsqueeze(-1).expand(-1, each).reshape(-1)
        cover = cover & part.view([-1 if other == axis else 1 for other in range(value.dim())])
    return cover


def _block(shape: Sequence[int], places: Sequence[Place], index: dict[str, Any]) -> ChannelBlock:
    held = {axis: (index[group], each) for axis, group, each in places}
    if len(shape) == 1:
        return ChannelBlock((1, shape[0], 1), np.zeros(1, np.int64), held[0][0])
    columns, each = held.get(1, (np.arange(shape[1]), 1))
    rows = held[0][0] if 0 in held else np.arange(shape[0])
    return ChannelBlock((shape[0], shape[1] // each, each * prod(shape[2:])), rows, columns)


def standardised_of(module: nn.Module) -> frozenset[str]:
    """The layers whose filters are standardised."""
    return frozenset(name for name, layer in module.named_modules() if isinstance(layer, StandardisedConv2d))


def halves_of(module: nn.Module) -> frozenset[str]:
    """The dynamic gates that take the sigmoid of their pooled input."""
    return frozenset(name for name, gate in input_gate.gates_of(module).items() if gate.sigmoid)


def filled(module: nn.Module, values: Tree) -> nn.Module:
    """A copy of the module in evaluation mode, on the CPU, with the "w/" and "buf/" of a tree that `Net.folded` made.

    ValueError for a tree that lacks a parameter or a buffer of the module.
    """
    module = ordinary(copy.deepcopy(module))
    own: Tree = {keys.WEIGHTS + name: value for name, value in module.named_parameters()}
    own |= {keys.BUFFERS + name: value for name, value in slots.averaged(module).items()}
    if missing := own.keys() - values.keys():
        raise ValueError(f"these are not the values of this model: they lack {', '.join(sorted(missing))}")
    for key, value in own.items():
        value.data = values[key].detach().cpu().clone()
    return module.eval()
