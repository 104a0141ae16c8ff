"""Gates that look at every image: which output channels of a convolution are used for it (ADP, arXiv:2106.06921 v1).

A gate sees its convolution's input x (B, C_in, H, W), pooled: s = mean over height and width, or the sigmoid of that. It gives
g = ReLU(U s + c) (B, C_out), of which the `keep` largest of every image stay and the others become 0, in training and inference
alike. g multiplies the convolution's output behind its norm. To the ledger, and to methods that mask weights, U is a linear layer.
A gate is put into a model that is built already, so that the model's own layers keep their names and, for a seed, their first
values; its own are "gates.LAYER.weight" (C_out, C_in) and "gates.LAYER.bias" (C_out,).
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fedsim import draw
from fedsim.fault import BadInput

GATES = "gates"  # the container of a model's gates
NORMS = (nn.BatchNorm2d, nn.GroupNorm)
ADDING = {operator.add, operator.iadd, torch.add, "add", "add_"}


@dataclass(frozen=True)
class Gating:
    """What the gates of a model are like."""

    keep: float  # d, share of its output channels that a gated layer keeps for an image, at most
    sigmoid: bool | None = None  # of the pooled input; None: not in a network with additions
    bias: float | None = None  # c at the start; None: 1, and 0 in a network with additions
    l1: float = 0.0  # of the sum of g, the mean over the batch, in the loss
    choice: str = "saliency"  # which channels stay: those of largest g, or for each image "random" ones
    place: str = "norm"  # where the gate multiplies: behind the norm, or "affine": in the place of the norm's scale


class InputGate(nn.Module):
    """y · g(x), y (B, C_out, H, W) the output of the norm behind the gated convolution, x the convolution's input."""

    def __init__(self, inside: int, outside: int, gating: Gating, residual: bool) -> None:
        super().__init__()
        self.keep: int | None = max(1, round(Fraction(str(gating.keep)) * outside)) if gating.keep < 1 else None  # None: all
        self.sigmoid = not residual if gating.sigmoid is None else gating.sigmoid
        self.l1, self.random = gating.l1, gating.choice == "random"
        self.weight = nn.Parameter(nn.init.kaiming_normal_(torch.empty(outside, inside)))  # U
        self.bias = nn.Parameter(torch.full((outside,), float(not residual) if gating.bias is None else gating.bias))  # c

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        g = self.selected(self.saliency(x), keys_of(x) if self.random else None)
        return y * g[..., None, None]

    def saliency(self, x: Tensor) -> Tensor:
        """(B, C_out) g = ReLU(U s + c)."""
        s = x.mean((2, 3))
        return F.linear(s.sigmoid() if self.sigmoid else s, self.weight, self.bias).relu()

    def selected(self, g: Tensor, keys: Tensor | None = None) -> Tensor:
        """g with the channels of each image that do not stay set to 0; `keys` (B,) of the images, where these are drawn."""
        if self.keep is None:
            return g
        return largest(g, self.keep) if keys is None else drawn(g, self.keep, keys)

    def extra_repr(self) -> str:
        outside, inside = self.weight.shape
        return f"{inside}, {outside}, keep={outside if self.keep is None else self.keep}, sigmoid={self.sigmoid}"


class Shift(nn.Module):
    """Adds a number to every channel: what is left of a norm's affine map when a gate takes the place of its scale."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias[:, None, None]


def largest(g: Tensor, k: int) -> Tensor:
    """g (..., C) with all but the `k` largest of a row set to 0; of equal values the lower channel stays."""
    return g * _first(g.detach(), k)


def drawn(g: Tensor, k: int, keys: Tensor) -> Tensor:
    """g (B, C) with all but `k` drawn ones of each image set to 0, by the images' keys (B,)."""
    return g * _first(draw.uniform(keys, g.shape[-1]), k)


def _first(score: Tensor, k: int) -> Tensor:
    """(..., C) bool, the `k` largest."""
    order = score.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, order, True)


def keys_of(x: Tensor) -> Tensor:
    """(B,) int64, a key of each image's own values, which are told apart to a 4096th."""
    values = (x.flatten(1) * 4096).round().long()
    weights = draw.bits(torch.zeros((), dtype=torch.int64, device=x.device), values.shape[1]) | 1
    return draw.fold((values * weights).sum(1), "gate")


class Tracer(fx.Tracer):
    """Follows a model down to its layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not any(True for _ in m.children())


def gated(module: nn.Module, gating: Gating) -> fx.GraphModule:
    """The module with a gate at every convolution larger than 1x1, in a network with additions all but the one that reads the image.

    BadInput for one that torch.fx cannot trace, or that has no such convolution.
    """
    try:
        graph = Tracer().trace(module)
    except Exception as error:
        raise BadInput(f"[model] gate_keep: torch.fx cannot trace the model ({type(error).__name__}: {error})") from error
    made = fx.GraphModule(module, _without_identities(module, graph))
    residual = any(node.target in ADDING and len(node.all_input_nodes) > 1 for node in graph.nodes)
    uses = Counter(node.target for node in graph.nodes if node.op == "call_module")
    nodes = [node for node in graph.nodes if uses[node.target] == 1 and _takes_gate(made, node, residual)]
    if not nodes:
        raise BadInput("[model] gate_keep: no convolution to gate: one above 1x1, ungrouped, used once, not a residual network's first")
    for node in nodes:
        _insert(made, node, gating, residual)
    made.recompile()
    return made


def _without_identities(module: nn.Module, graph: fx.Graph) -> fx.Graph:
    """Where a model has no norm, one may stand for it."""
    for node in [node for node in graph.nodes if calls(module, node, nn.Identity)]:
        node.replace_all_uses_with(entry_of(node))
        graph.erase_node(node)
    return graph


def _takes_gate(module: fx.GraphModule, node: fx.Node, residual: bool) -> bool:
    layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    if not isinstance(layer, nn.Conv2d) or layer.groups > 1 or layer.kernel_size == (1, 1):
        return False
    return not (residual and entry_of(node).op == "placeholder")


def entry_of(node: fx.Node) -> fx.Node:
    return node.all_input_nodes[0]


def _insert(module: fx.GraphModule, conv: fx.Node, gating: Gating, residual: bool) -> None:
    """A gate behind the convolution's norm, or behind the convolution itself where it has none."""
    name, graph, last = str(conv.target), module.graph, conv
    layer: Any = module.get_submodule(name)
    behind = next(iter(conv.users)) if len(conv.users) == 1 else None
    if behind is not None and calls(module, behind, NORMS):
        last = behind if gating.place == "norm" else _without_scale(module, behind)
    module.add_submodule(f"{GATES}.{name}", InputGate(layer.in_channels, layer.out_channels, gating, residual))
    with graph.inserting_after(last):
        gate = graph.call_module(f"{GATES}.{name}", (entry_of(conv), last))
    last.replace_all_uses_with(gate, lambda user: user is not gate)


def _without_scale(module: fx.GraphModule, norm: fx.Node) -> fx.Node:
    """The norm without an affine map, and a shift behind it."""
    name = str(norm.target)
    own: Any = module.get_submodule(name)
    channels = own.num_features if isinstance(own, nn.BatchNorm2d) else own.num_channels
    bare = nn.BatchNorm2d(channels, own.eps, own.momentum, affine=False) if isinstance(own, nn.BatchNorm2d) else None
    module.set_submodule(name, bare or nn.GroupNorm(own.num_groups, channels, own.eps, affine=False))
    module.add_submodule(f"shifts.{name}", Shift(channels))
    with module.graph.inserting_after(norm):
        shift = module.graph.call_module(f"shifts.{name}", (norm,))
    norm.replace_all_uses_with(shift, lambda user: user is not shift)
    return shift


def gates_of(module: nn.Module) -> dict[str, InputGate]:
    """The gates of a model, by the name of the gate."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, InputGate)}


def calls(module: nn.Module, node: fx.Node, kinds: Any) -> bool:
    """Whether a node calls a layer of one of these kinds."""
    return node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), kinds)
