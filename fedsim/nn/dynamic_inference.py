"""Dynamic inference: for one image at a time, computes the channels alone that its dynamic gates leave open.

The filters of open channels, and their columns for the open channels of the layer before, are gathered into a small weight; closed
channels are never computed. The answer is the gated model's but for rounding. It needs batch norms or none, which look at
one channel at a time, and a batch of one image: the images of a larger one have different channels open.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fedsim.nn.layers.gate_insertion import ADDING
from fedsim.nn.layers.input_gate import GATES_MODULE, InputGate, Shift

BY_CHANNEL = (nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


@dataclass(frozen=True)
class Flow:
    """The open channels of an activation."""

    x: Tensor  # (1, c, …)
    index: Tensor | None = None  # (c,) which of the C channels these are; None: all
    width: int = 0  # C

    def whole(self) -> Tensor:
        """(1, C, …), closed channels 0."""
        if self.index is None:
            return self.x
        return self.x.new_zeros(1, self.width, *self.x.shape[2:]).index_copy_(1, self.index, self.x)


class Skipping(fx.Interpreter):
    """A gated model in evaluation mode, called with one image (1, C, H, W). ValueError for a model that it cannot follow."""

    def __init__(self, module: nn.Module) -> None:
        if not isinstance(module, fx.GraphModule):
            raise ValueError("the model has no dynamic gates: build it with model.gate_keep")
        super().__init__(copy.deepcopy(module).eval())
        self.layers: dict[str, Any] = dict(self.module.named_modules())
        if any(getattr(layer, "random", False) for layer in self.layers.values()):
            raise ValueError('dynamic inference needs gate_choice = "saliency"; with "random" there is nothing to skip')
        gates = [node for node in module.graph.nodes if isinstance(self.layers.get(str(node.target)), InputGate)]
        self.merged: dict[str, str] = {}  # layer -> the convolution that does its work as well
        self.gated: dict[str, Gated] = {}
        for gate in gates:
            name = str(gate.target).removeprefix(f"{GATES_MODULE}.")
            behind = _between(gate, name)
            self.gated[name] = Gated(self.layers[name], [self.layers[layer] for layer in behind], self.layers[str(gate.target)])
            self.merged |= dict.fromkeys([*behind, str(gate.target)], name)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """(1, classes) logits."""
        if len(x) != 1:
            raise ValueError(f"dynamic inference takes one image at a time; this batch has {len(x)}")
        logits: Flow = self.run(Flow(x))
        return logits.whole()

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Flow:
        flow, layer = args[-1], self.layers[target]
        if target in self.gated:
            return self.gated[target](flow)
        if target in self.merged:
            return flow
        if isinstance(layer, BY_CHANNEL):
            return Flow(layer(flow.x), flow.index, flow.width)
        return Flow(layer(flow.whole()))

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Flow:
        if target in ADDING and len(args) == 2 and not kwargs and all(isinstance(arg, Flow) for arg in args):
            some, stream = args if args[0].index is not None else args[::-1]
            if some.index is not None and stream.index is None:
                return Flow(stream.x.index_add(1, some.index, some.x))
        return Flow(target(*(arg.whole() if isinstance(arg, Flow) else arg for arg in args), **kwargs))

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Flow:
        return Flow(getattr(args[0].whole(), target)(*args[1:], **kwargs))


def _between(gate: fx.Node, conv: str) -> list[str]:
    """The layers from the convolution to its gate, in their order."""
    found: list[str] = []
    node = gate.args[1]
    while isinstance(node, fx.Node) and str(node.target) != conv:
        found.insert(0, str(node.target))
        node = node.args[0]
    return found


class Gated:
    """A convolution with its norm and its gate, computed for the open channels alone."""

    def __init__(self, conv: nn.Conv2d, behind: list[Any], gate: InputGate) -> None:
        self.conv, self.gate = conv, gate
        scale, shift = torch.ones_like(conv.weight[:, 0, 0, 0]), torch.zeros_like(conv.weight[:, 0, 0, 0])
        for layer in behind:
            if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None and layer.running_var is not None:
                deviation = (layer.running_var + layer.eps).rsqrt()
                scale = deviation if layer.weight is None else deviation * layer.weight
                shift = -layer.running_mean * scale + (0 if layer.bias is None else layer.bias)
            elif isinstance(layer, Shift):
                shift = shift + layer.bias
            else:
                raise ValueError(f"channels cannot be skipped before a {type(layer).__name__}, which reads them all; use batch norms")
        self.scale, self.shift = scale.detach(), shift.detach()
        if conv.bias is not None:
            self.shift = (self.shift + self.scale * conv.bias).detach()

    def __call__(self, flow: Flow) -> Flow:
        conv, g = self.conv, self._open(flow)
        index = g.nonzero().flatten()
        weight = conv.weight.index_select(0, index)
        if flow.index is not None:
            weight = weight.index_select(1, flow.index)
        g = g.index_select(0, index)
        scale, shift = (part.index_select(0, index).mul_(g).view(-1, 1, 1) for part in (self.scale, self.shift))
        out = F.conv2d(flow.x, weight, None, conv.stride, conv.padding, conv.dilation)
        return Flow(torch.addcmul(shift, out, scale), index, len(self.scale))

    def _open(self, flow: Flow) -> Tensor:
        """(C_out,) the gates of the image."""
        pooled = Flow(flow.x.mean((2, 3), keepdim=True), flow.index, flow.width)
        return self.gate.selected(self.gate.saliency(pooled.whole()))[0]
