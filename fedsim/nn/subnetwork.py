"""Makes torch modules of some of the channels of a gated module, and replaces fedsim's layers by torch's own for export."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from fedsim.nn.layers.gate_insertion import ADDING, NORMS, calls, entry_of
from fedsim.nn.layers.input_gate import GATES_MODULE, InputGate, Shift
from fedsim.nn.layers.nsconv import NormalisedConv2d
from fedsim.nn.layers.standardized_conv import StandardisedConv2d


def ordinary(module: nn.Module) -> nn.Module:
    """Replaces standardised and normalised convolutions of the module by torch's own, in place.

    The caller puts their values in.
    """
    for name, layer in list(module.named_modules()):
        if isinstance(layer, StandardisedConv2d | NormalisedConv2d):
            plain: nn.Module = copy.copy(layer)
            plain.__class__, plain._buffers = nn.Conv2d, {}
            plain._parameters = {slot: value for slot, value in layer._parameters.items() if slot != "gain"}
            parent, _, slot = name.rpartition(".")
            setattr(module.get_submodule(parent), slot, plain)
    return module


class Added(nn.Module):
    """A stream (B, C, H, W) with y (B, c, H, W) added to its channels `index` (c,)."""

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index)

    def forward(self, stream: Tensor, y: Tensor) -> Tensor:
        return stream.index_add(1, self.get_buffer("index"), y)


def sliced(module: nn.Module, kept: dict[str, Tensor]) -> nn.Module:
    """Adapts a gated module to tensors that are cut already: no gate selects, and streams get all their channels.

    kept: gated layer -> positions (c,) of its channels. The module is changed in place.
    """
    assert isinstance(module, fx.GraphModule)
    for node in [node for node in module.graph.nodes if calls(module, node, InputGate)]:
        name = str(node.target).removeprefix(GATES_MODULE + ".")
        if name not in kept:  # its channels are all there, and it goes on selecting
            continue
        gate: Any = module.get_submodule(str(node.target))
        gate.keep = None
        for user in [user for user in node.users if user.target in ADDING]:
            stream = next(entry for entry in user.all_input_nodes if entry is not node)
            module.add_submodule(f"added.{name}", Added(kept[name].to(gate.weight.device)))
            with module.graph.inserting_after(user):
                user.replace_all_uses_with(module.graph.call_module(f"added.{name}", (stream, node)))
            module.graph.erase_node(user)
    module.recompile()
    return module


def folded(module: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    """A copy without gates: each is replaced by a constant, multiplied into the map before it.

    values: gated layer -> g (c,), of a sliced module its kept channels'.
    """
    module = copy.deepcopy(module)
    assert isinstance(module, fx.GraphModule)
    for node in [node for node in module.graph.nodes if calls(module, node, InputGate)]:
        name, before = str(node.target).removeprefix(GATES_MODULE + "."), node.args[1]
        assert isinstance(before, fx.Node)
        node.replace_all_uses_with(_scaled(module, before, values[name].detach()))
        module.graph.erase_node(node)
        if not before.users:  # a shift that moved into the norm before it
            module.graph.erase_node(before)
    module.delete_all_unused_submodules()
    return optimised_for_inference(module)


def optimised_for_inference(module: nn.Module) -> nn.Module:
    """The same network for inference, changed in place: ReLUs overwrite an input that nothing else reads.

    Its layers stand side by side, "layer1.0.conv1" as "layer1_0_conv1": the look-up of nested layers takes a twentieth of a small
    network's time.
    """
    assert isinstance(module, fx.GraphModule)
    for node in [node for node in module.graph.nodes if calls(module, node, nn.ReLU)]:
        entry = entry_of(node)
        if len(entry.users) == 1 and calls(module, entry, (*NORMS, InputGate, Added)):
            with module.graph.inserting_after(node):
                node.replace_all_uses_with(module.graph.call_method("relu_", (entry,)))
            module.graph.erase_node(node)
    for node in [node for node in module.graph.nodes if calls(module, node, nn.Module)]:
        name = str(node.target).replace(".", "_")
        module.add_module(name, module.get_submodule(str(node.target)))
        node.target = name
    module.delete_all_unused_submodules()
    module.recompile()
    return module


def _scaled(module: fx.GraphModule, node: fx.Node, values: Tensor) -> fx.Node:
    """Multiplies the output channels of the layer at the node by `values`; a shift moves into the norm before it. The last node of it."""
    layer: Any = module.get_submodule(str(node.target))
    with torch.no_grad():
        if isinstance(layer, Shift):
            norm: Any = module.get_submodule(str(entry_of(node).target))
            norm.weight, norm.bias, norm.affine = nn.Parameter(values.clone()), nn.Parameter(layer.bias * values), True
            return entry_of(node)
        layer.weight.mul_(values.view(-1, *[1] * (layer.weight.dim() - 1)))
        if layer.bias is not None:
            layer.bias.mul_(values)
    return node
