"""Inserts dynamic gates at the convolutions of a model, by its module graph."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from fedsim.errors import BadInput
from fedsim.nn.layers.input_gate import GATES_MODULE, SHIFTS_MODULE, Gating, InputGate, Shift

NORMS = (nn.BatchNorm2d, nn.GroupNorm)
APART = "its forward takes different steps in training and in evaluation"
ADDING = {operator.add, operator.iadd, torch.add, "add", "add_"}


class Tracer(fx.Tracer):
    """Traces a model down to its layers.

    changing: buffers of containers are values of the call, so that the graph has what forward does to them; else constants.
    """

    def __init__(self, changing: bool) -> None:
        super().__init__()
        self.proxy_buffer_attributes = changing

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not any(True for _ in m.children())


def graph_of(module: nn.Module) -> fx.Graph:
    """The module's graph, which also puts new values into the buffers that its forward assigns.

    Where numbers of buffers decide what forward does, as in a loop, they are constants; ValueError if it changes them too.
    """
    held = [(name, layer, dict(layer._buffers)) for name, layer in module.named_modules()]
    try:
        graph = Tracer(changing=True).trace(module)
        assigned = [(f"{name}.{slot}".lstrip("."), value) for name, layer, _ in held for slot, value in layer._buffers.items()]
    except Exception:
        _restore(held)
        return _with_constants(module)
    _restore(held)
    end = next(node for node in graph.nodes if node.op == "output")
    with graph.inserting_before(end):
        for name, value in assigned:
            if isinstance(value, fx.Proxy):
                graph.call_method("copy_", (graph.get_attr(name), value.node))
    return graph


def _restore(held: list[tuple[str, nn.Module, dict[str, Any]]]) -> None:
    for _, layer, before in held:
        layer._buffers.update(before)


def _with_constants(module: nn.Module) -> fx.Graph:
    before = {name: (value, value._version) for name, value in module.named_buffers()}
    graph = Tracer(changing=False).trace(module)
    after = dict(module.named_buffers())
    if moved := [name for name, (value, version) in before.items() if after.get(name) is not value or value._version != version]:
        raise ValueError(f"its forward changes the buffer {moved[0]}, and asks for numbers of buffers")
    return graph


def graph_of_both_modes(module: nn.Module) -> fx.Graph:
    """The module's graph, the same in training and in evaluation, without tensors that are made at every call. ValueError says why not."""
    twin, other = (copy.deepcopy(module).train(mode) for mode in (True, False))
    try:
        graph, evaluated = graph_of(twin), graph_of(other)
    except Exception as error:
        raise ValueError(f"torch.fx cannot trace it ({type(error).__name__}: {error})") from error
    if _constants(twin):
        raise ValueError(
            "its forward makes a tensor at every call, such as torch.tensor(0.3); write the number itself, or keep the tensor by"
            " register_buffer"
        )
    if _steps(twin, graph) != _steps(other, evaluated):
        raise ValueError(APART)
    return graph


def _constants(module: nn.Module) -> dict[str, Any]:
    """The tensors that its forward made while it was traced, by the names under which torch.fx has put them there."""
    return {name: value.tolist() for name, value in vars(module).items() if name.startswith("_tensor_constant")}


def _steps(module: nn.Module, graph: fx.Graph) -> tuple[str, dict[str, Any]]:
    return str(graph), _constants(module)


def insert_gates(module: nn.Module, gating: Gating) -> fx.GraphModule:
    """The module with a dynamic gate at every convolution above 1x1, in a network with additions all but the one that reads the image.

    BadInput for one that torch.fx cannot trace, that keeps a part of itself in evaluation mode, or that has no such convolution.
    """
    if fixed := [name for name, layer in module.train().named_modules() if not layer.training]:
        raise BadInput(f"[model] gate_keep: {fixed[0]} stays in evaluation mode, and the gated model would train it; leave gate_keep out")
    other = copy.deepcopy(module).eval()
    try:
        graph, evaluated = graph_of(module), graph_of(other)
    except Exception as error:
        raise BadInput(f"[model] gate_keep: torch.fx cannot trace the model ({type(error).__name__}: {error})") from error
    if _steps(module, graph) != _steps(other, evaluated):
        raise BadInput(f"[model] gate_keep: {APART}")
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


def forward_order(module: nn.Module, layers: Sequence[str]) -> list[str]:
    """The layers in the order in which a forward pass uses them: a gate beside its convolution, the layer of the logits last.

    They stay in their order where torch.fx cannot trace the module, or does not see all of them.
    """
    try:
        graph = graph_of(module)
    except Exception:
        return list(layers)
    names = [str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")]
    used = dict.fromkeys(name for name in (name.removesuffix(".weight") for name in names) if name in layers)
    return list(used) if len(used) == len(layers) else list(layers)


def _without_identities(module: nn.Module, graph: fx.Graph) -> fx.Graph:
    """The graph without identities, which may stand where a model has no norm."""
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
    """Inserts a gate after the convolution's norm, or after the convolution itself if it has none."""
    name, graph, last = str(conv.target), module.graph, conv
    layer: Any = module.get_submodule(name)
    behind = next(iter(conv.users)) if len(conv.users) == 1 else None
    by_image = behind is not None and calls(module, behind, nn.GroupNorm)
    if behind is not None and calls(module, behind, NORMS):
        last = behind if gating.place == "norm" else _without_scale(module, behind)
    module.add_submodule(f"{GATES_MODULE}.{name}", InputGate(layer.in_channels, layer.out_channels, gating, residual, by_image))
    with graph.inserting_after(last):
        gate = graph.call_module(f"{GATES_MODULE}.{name}", (entry_of(conv), last))
    last.replace_all_uses_with(gate, lambda user: user is not gate)


def _without_scale(module: fx.GraphModule, norm: fx.Node) -> fx.Node:
    """The norm without an affine map, and a shift behind it."""
    name = str(norm.target)
    own: Any = module.get_submodule(name)
    channels = own.num_features if isinstance(own, nn.BatchNorm2d) else own.num_channels
    bare = nn.BatchNorm2d(channels, own.eps, own.momentum, affine=False) if isinstance(own, nn.BatchNorm2d) else None
    module.set_submodule(name, bare or nn.GroupNorm(own.num_groups, channels, own.eps, affine=False))
    module.add_submodule(f"{SHIFTS_MODULE}.{name}", Shift(channels))
    with module.graph.inserting_after(norm):
        shift = module.graph.call_module(f"{SHIFTS_MODULE}.{name}", (norm,))
    norm.replace_all_uses_with(shift, lambda user: user is not shift)
    return shift


def calls(module: nn.Module, node: fx.Node, kinds: Any) -> bool:
    """Whether a node calls a layer of one of these kinds."""
    return node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), kinds)
