"""Channel groups: channels of several layers that must be cut together, found from the module graph.

A group is the output channels of a convolution or linear layer with every tensor that has an entry for each of them: the bias, the
norm that follows, depth-wise filters, and the input columns of the layers that read them. A gate multiplies the channels after every
activation. torch.fx traces the graph. Channels that reach a node which the walk does not understand (an unknown layer, an addition,
a concatenation) cannot be cut. In a network with additions this holds for the residual stream, the stem and the last layer before
the classifier.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from fedsim.nn.layers.gate_insertion import ADDING, graph_of_both_modes
from fedsim.nn.layers.input_gate import InputGate, Shift
from fedsim.nn.layers.nsconv import WHOLE, NormalisedConv2d
from fedsim.nn.layers.standardized_conv import StandardisedConv2d

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Tanh)  # f(0) = 0
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Identity, nn.Dropout, nn.Dropout2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
CARRIED = (*NORMS, Shift)  # layers with entries for each channel
LAYERS = (nn.Conv2d, nn.Linear, StandardisedConv2d)  # exactly: a class of a user's own may do anything with its weight
ACTIVATING = {F.relu, F.relu6, torch.relu, F.leaky_relu, F.elu, F.silu, F.gelu, F.hardswish, torch.tanh, "relu", "relu_", "tanh"}
POOLING = {F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, "contiguous"}
FLATTENING = {torch.flatten, "flatten"}  # from axis 1
RESHAPING = {"view", "reshape", torch.reshape}  # to (B, -1)
AVERAGING = {"mean", torch.mean}  # over the two axes of positions
KEEPING = {*ADDING, operator.mul, operator.sub, operator.truediv, torch.mul, torch.cat}  # the first axis stays that of the images
SHAPES = ("shape", "ndim", "device", "dtype")  # of a tensor: not what it holds


Places = list[tuple[Any, str, str]]


@dataclass(frozen=True)
class Group:
    """Channels with one gate each."""

    name: str  # of the layer that makes them: "layer1.0.conv1"
    size: int  # C_l
    rows: tuple[str, ...]  # tensors whose first axis they are: "layer1.0.conv1.weight", "layer1.0.norm1.running_mean" …
    columns: tuple[str, ...]  # weights whose second axis they are, maybe several positions a channel
    norms: tuple[str, ...]
    depthwise: tuple[str, ...]  # convolutions with one filter a channel
    points: tuple[str, ...]  # nodes of the graph after which the gate stands
    nodes: tuple[str, ...]  # all nodes that hand these channels on
    gate: str = ""  # their dynamic gate; then they may be added to a residual stream, which stays whole


@dataclass
class _Space:
    """Channels on the walk through the graph; whether they can be cut is not known yet."""

    size: int = 0
    why: str = ""  # why they cannot be cut; empty: nothing prevents it
    rows: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    depthwise: list[str] = field(default_factory=list)
    points: list[str] = field(default_factory=list)
    gate: str = ""


@dataclass(frozen=True)
class _Flow:
    """The channels that one node of the graph gives to the next ones."""

    space: _Space
    gated: bool = False  # since the last layer that made or mixed it
    flat: bool = False  # (B, features)
    folded: bool = False  # maybe several features a channel
    maker: str = ""  # the layer that made it
    dynamic_gate: bool = False  # their dynamic gate has just been multiplied in
    images: bool = True  # the first axis is that of the images


class _Reading:
    """One walk through the graph, node by node."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self.layers = dict(module.named_modules())
        self.spaces: list[_Space] = []
        self.flows: dict[fx.Node, _Flow] = {}
        self.streams = False  # whether anything is added
        self.stems: list[_Space] = []
        self.heads: dict[str, _Space] = {}  # layer -> what it reads
        self.touched: dict[str, list[_Space]] = {}  # layer -> spaces that it made or changed
        shared = [id(value) for layer in module.modules() for value in layer._parameters.values() if value is not None]
        self.tied = {number for number in shared if shared.count(number) > 1}
        self.unknown: set[str] = set()  # layers with a weight that the walk does not understand
        for node in graph.nodes:
            self._walk(node)

    def _walk(self, node: fx.Node) -> None:
        flows = [self.flows[entry] for entry in node.all_input_nodes if entry in self.flows]
        if node.op == "call_module":
            self.flows[node] = self._layer(node, str(node.target), flows)
        elif node.op in ("call_function", "call_method"):
            if flows and not _number(node):
                self.flows[node] = self._function(node, flows)
        elif node.op == "output":
            self._end(flows)
        else:
            image = node.op == "placeholder"
            self.flows[node] = self._fixed([], "the image" if image else str(node.target), image)

    def _layer(self, node: fx.Node, name: str, flows: list[_Flow]) -> _Flow:
        layer = self.layers[name]
        own = list(layer.parameters())
        again, tied = name in self.touched, any(id(value) in self.tied for value in own)
        if type(layer) is InputGate and not (again or tied):
            return self._gate(name, layer, [self.flows[entry] for entry in node.args])  # type: ignore[index]
        flows = [replace(flow, dynamic_gate=False) for flow in flows]
        if len(flows) != 1 or again or tied:
            for space in self.touched.get(name, []):
                space.why = space.why or f"{name} is used twice"
            return self._fixed(flows, name)
        flow = flows[0]
        if type(layer) in LAYERS:
            return self._weighted(name, layer, flow)
        if type(layer) in ACTIVATIONS:
            return self._activated(node, flow)
        if type(layer) in POOLS:
            return flow
        if type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1):
            return replace(flow, flat=True, folded=True)
        if (type(layer) in CARRIED or (type(layer) is nn.GroupNorm and layer.num_groups == 1)) and not (flow.gated or flow.folded):
            flow.space.rows += _names(name, layer)
            flow.space.norms += [name] * (type(layer) is not Shift)
            self.touched[name] = [flow.space]
            return flow
        if any(value.dim() > 1 for value in own):
            self.unknown.add(name)
        return self._fixed(flows, name)

    def _weighted(self, name: str, layer: Any, flow: _Flow) -> _Flow:
        outside, inside = layer.weight.shape[:2]
        groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        self.touched[name] = [flow.space]
        if isinstance(layer, nn.Linear) and not flow.flat:
            return self._fixed([flow], name)
        if groups > 1 and groups == outside and inside == 1 and flow.space.size == outside:
            flow.space.rows += _names(name, layer)
            flow.space.depthwise.append(name)
            return _Flow(flow.space, False, maker=name, images=flow.images)
        if groups > 1:
            return self._fixed([flow], name)
        if flow.maker == "":
            self.stems.append(made := self._new(outside))
        else:
            made = self._new(outside)
            flow.space.columns.append(f"{name}.weight")
            self.heads[name] = flow.space
            if not flow.gated:
                flow.space.why = flow.space.why or f"{name} reads them before any activation"
        made.rows += _names(name, layer)
        self.touched[name].append(made)
        return _Flow(made, False, isinstance(layer, nn.Linear), maker=name, images=flow.images)

    def _gate(self, name: str, layer: InputGate, flows: list[_Flow]) -> _Flow:
        """A dynamic gate reads the channels of its first input, as the convolution does, and has a row for each of its second input's."""
        entry, out = flows
        entry.space.columns.append(f"{name}.weight")
        if not entry.gated:
            entry.space.why = entry.space.why or f"{name} reads them before any activation"
        out.space.rows += _names(name, layer)
        out.space.gate = name
        self.touched[name] = [entry.space, out.space]
        return replace(out, dynamic_gate=True)

    def _function(self, node: fx.Node, flows: list[_Flow]) -> _Flow:
        if node.target in ADDING and len(flows) > 1:
            self.streams = True
            gated = [flow for flow in flows if flow.dynamic_gate]
            free = gated if len(gated) == 1 and len(node.args) == 2 and not node.kwargs else []  # the other is a stream, which stays whole
            return self._fixed([flow for flow in flows if not any(flow is one for one in free)], node.name)
        flows = [replace(flow, dynamic_gate=False) for flow in flows]
        if len(flows) == 1 and node.target in ACTIVATING:
            return self._activated(node, flows[0])
        if len(flows) == 1 and node.target in POOLING:
            return flows[0]
        if len(flows) == 1 and _flattens(node, self._keeps_images):
            return replace(flows[0], flat=True, folded=True)
        return self._fixed(flows, node.name, node.target in KEEPING)

    def _keeps_images(self, entry: fx.Node, rows: object) -> bool:
        """Whether a new shape (rows, …) leaves the first axis of the entry as it is."""
        asked = _whose_rows(rows)
        return asked is entry or (asked in self.flows and self.flows[asked].images and self.flows[entry].images)

    def _activated(self, node: fx.Node, flow: _Flow) -> _Flow:
        if flow.folded and not flow.gated:
            return self._fixed([flow], node.name)
        if not flow.gated:
            flow.space.points.append(node.name)
        return replace(flow, gated=True)

    def _end(self, flows: list[_Flow]) -> None:
        for flow in flows:
            flow.space.why = "they are the logits"
        if self.streams:
            last = [self.heads[flow.maker] for flow in flows if flow.maker in self.heads]
            for space in (*self.stems, *last):
                space.why = space.why or "they belong to the residual stream"

    def _new(self, size: int) -> _Space:
        self.spaces.append(_Space(size))
        return self.spaces[-1]

    def _fixed(self, flows: list[_Flow], where: str, keeping: bool | None = None) -> _Flow:
        """A node that is not understood, or that mixes channels: what it reads and what it gives cannot be cut.

        keeping: whether the first axis of its result is that of its inputs; None: of a layer of torch or fedsim, it is.
        """
        layer = self.layers.get(where)
        keeping = _is_known(layer) if keeping is None else keeping
        for flow in flows:
            flow.space.why = flow.space.why or f"{where} needs them all"
        maker = flows[0].maker if flows else ""
        images = keeping and all(flow.images for flow in flows)
        return _Flow(_Space(why=where), maker=maker or ("" if not flows else where), images=images)

    def reasons(self) -> list[str]:
        """Why channels cannot be cut: of kinds of layers whose channels are not known, and of the first layers of known kinds."""
        unknown = {type(layer): name for name, layer in reversed(self.layers.items()) if name in self.unknown}
        kinds = [
            WHOLE if kind is NormalisedConv2d else f"{name} ({kind.__name__}) cannot be cut by gates" for kind, name in unknown.items()
        ]
        known = [f"{space.rows[0].rpartition('.')[0]}: {space.why or 'nothing reads them'}" for space in self.spaces if space.rows]
        return [*kinds, *known[:5]]

    def groups(self) -> tuple[Group, ...]:
        nodes: dict[int, list[str]] = {}
        for node, flow in self.flows.items():
            nodes.setdefault(id(flow.space), []).append(node.name)
        free = [space for space in self.spaces if not space.why and (space.gate or (space.points and space.columns))]
        free = [space for space in free if space.gate] or free
        return tuple(_group(space, tuple(nodes[id(space)])) for space in free)


def _group(space: _Space, nodes: tuple[str, ...]) -> Group:
    name, rows, columns = space.rows[0].rpartition(".")[0], tuple(space.rows), tuple(space.columns)
    return Group(name, space.size, rows, columns, tuple(space.norms), tuple(space.depthwise), tuple(space.points), nodes, space.gate)


def _flattens(node: fx.Node, keeps_images: Callable[[fx.Node, object], bool]) -> bool:
    """Whether a call makes (B, features) of (B, C, H, W), channel after channel."""
    entry, rest = node.all_input_nodes[0], (*node.args[1:], *node.kwargs.values())
    if node.target in FLATTENING:
        return rest in ((1,), (1, -1)) and "end_dim" not in node.kwargs
    if node.target in RESHAPING:
        shape = rest[0] if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest
        return bool(len(shape) == 2 and shape[1] == -1 and keeps_images(entry, shape[0]))
    return bool(node.target in AVERAGING) and len(rest) == 1 and str(rest[0]) in ("[2, 3]", "(2, 3)", "[-2, -1]", "(-2, -1)")


def _whose_rows(rows: object) -> fx.Node | None:
    """The node whose first size this is: x of x.size(0), x.shape[0], x.size()[0]."""
    if not isinstance(rows, fx.Node):
        return None
    first: tuple[Any, ...] = (0,)
    if rows.target is operator.getitem and rows.args[1] == 0 and isinstance(rows.args[0], fx.Node):
        rows, first = rows.args[0], ()
        if rows.target is getattr and rows.args[1] == "shape":
            return rows.all_input_nodes[0]
    return rows.all_input_nodes[0] if rows.target == "size" and (*rows.args[1:], *rows.kwargs.values()) == first else None


def _is_known(layer: nn.Module | None) -> bool:
    """Whether a layer is one of torch's or fedsim's that leave the first axis as it is."""
    own = layer is None or type(layer).__module__.partition(".")[0] not in ("torch", "fedsim")
    return not own and not isinstance(layer, nn.Flatten | nn.Unflatten)


def _number(node: fx.Node) -> bool:
    """Whether a call asks for a number about a tensor, not for what it holds."""
    return node.target in ("size", "dim") or (node.target is getattr and node.args[1] in SHAPES)


def _names(name: str, layer: nn.Module) -> list[str]:
    """The tensors of a layer with an entry for each channel."""
    tensors = {**layer._parameters, **layer._buffers}
    return [f"{name}.{slot}" for slot, value in tensors.items() if value is not None and value.dim()]


def find_groups(module: nn.Module) -> tuple[fx.Graph, tuple[Group, ...]]:
    """The module's graph and its groups in network order; ValueError that says why there are none."""
    try:
        graph = graph_of_both_modes(module)
    except ValueError as error:
        raise ValueError(f"the model has no gates: {error}") from error
    reading = _Reading(module, graph)
    groups = reading.groups()
    if not groups:
        why = "; ".join(reading.reasons()) or "no convolution is found whose channels another layer reads"
        raise ValueError(f"the model has no gates: there are no channels that can be cut alone ({why})")
    return graph, groups


def with_gates(
    module: nn.Module, graph: fx.Graph, groups: Sequence[Group], gate: Callable[[str], nn.Module]
) -> tuple[fx.GraphModule, Places]:
    """The module's own layers, with the layer `gate(group name)` after every activation of a group.

    The second result lists the parameters that belong to a container and not to a layer: (dict that holds the parameter, its key
    there, its name in the module), and its empty buffers alike. Other buffers and plain tensors keep their values.
    """
    graph = copy.deepcopy(graph)
    owner = {point: group.name for group in groups for point in group.points}
    twin = fx.GraphModule(module, graph)
    for node in [node for node in graph.nodes if node.name in owner]:
        place = f"gate_{node.name}"
        twin.add_submodule(place, gate(owner[node.name]))
        with graph.inserting_after(node):
            behind = graph.call_module(place, (node,))
        node.replace_all_uses_with(behind, lambda user, behind=behind: user is not behind)
    twin.recompile()
    read = [(name, kind) for node in graph.nodes if node.op == "get_attr" and (kind := _put_in(module, name := str(node.target)))]
    return twin, [_opened(twin, name, kind) for name, kind in read]


def _put_in(module: nn.Module, name: str) -> str:
    """The dict of a parameter or a buffer that a call puts in, and that may be empty until then; empty text for what stays."""
    parent, _, slot = name.rpartition(".")
    holder = module.get_submodule(parent)
    if slot in holder._parameters:
        return "_parameters"
    return "_buffers" if slot in holder._buffers and holder._buffers[slot] is None else ""


def _opened(twin: fx.GraphModule, name: str, kind: str) -> tuple[Any, str, str]:
    """A place for a value, where the graph module has copied an empty one."""
    parent, _, slot = name.rpartition(".")
    holder = twin.get_submodule(parent)
    holder.__dict__.pop(slot, None)
    places = getattr(holder, kind)
    places[slot] = None
    return places, slot, name
