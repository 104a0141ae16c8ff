"""Replaces the layers of a model by run-time layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from fedsim.kernels.activation_pruning.layers import operation
from fedsim.kernels.sparse.pattern import Geometry
from fedsim.nn.layers import input_gate, nsconv, shortcut
from fedsim.nn.layers.nsconv import NormalisedConv2d
from fedsim.nn.layers.standardized_conv import StandardisedConv2d
from fedsim.nn.runtime import activation_cache
from fedsim.nn.runtime.activation import AvgPool2d, MaxPool2d, ReLU, ReLU6, RuntimeScaledReLU, RuntimeShortcut
from fedsim.nn.runtime.call_context import CallContext
from fedsim.nn.runtime.conv import Conv1d, Conv2d, Conv3d, Linear, RuntimeNSConv2d, RuntimeStandardizedConv2d, Weighted
from fedsim.nn.runtime.dropout import AlphaDropout, Drawn, Dropout, Dropout1d, Dropout2d, Dropout3d, FeatureAlphaDropout
from fedsim.nn.runtime.gate import RuntimeInputGate
from fedsim.nn.runtime.norm import TORCH_NORMS, BatchNorm, GroupNorm
from fedsim.nn.runtime.recurrent import GRU, LSTM, RNN

CONVERTED: dict[type[nn.Module], Any] = {
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
    nn.Linear: Linear,
    nn.ReLU: ReLU,
    nn.ReLU6: ReLU6,
    nsconv.ScaledReLU: RuntimeScaledReLU,
    nn.MaxPool2d: MaxPool2d,
    nn.AvgPool2d: AvgPool2d,
    shortcut.Shortcut: RuntimeShortcut,
    nn.RNN: RNN,
    nn.LSTM: LSTM,
    nn.GRU: GRU,
    nn.Dropout: Dropout,
    nn.Dropout1d: Dropout1d,
    nn.Dropout2d: Dropout2d,
    nn.Dropout3d: Dropout3d,
    nn.AlphaDropout: AlphaDropout,
    nn.FeatureAlphaDropout: FeatureAlphaDropout,
}


WEIGHTED = (RuntimeStandardizedConv2d, RuntimeNSConv2d, RuntimeInputGate)
REPLACED: tuple[tuple[Any, Any], ...] = (
    (TORCH_NORMS, BatchNorm),
    (nn.GroupNorm, GroupNorm),
    (StandardisedConv2d, RuntimeStandardizedConv2d),
    (NormalisedConv2d, RuntimeNSConv2d),
    (input_gate.InputGate, RuntimeInputGate),
)


def replace_layers(module: nn.Module, context: CallContext) -> dict[str, Geometry]:
    """Replaces layers of the module by run-time layers that share `context`, in place. The geometry of every layer that can run sparse.

    ValueError for layers that draw random numbers or change themselves.
    """
    replacements: dict[nn.Module, nn.Module] = {}  # a layer that stands in two places stays one layer
    for name, layer in list(module.named_modules(remove_duplicate=False)):
        _check(name, layer)
        for kind, replacement in REPLACED:
            if isinstance(layer, kind) and (kind is not nn.GroupNorm or layer.num_groups == 1):
                parent, _, slot = name.rpartition(".")
                own = replacements.setdefault(layer, replacement(layer, name, context))
                own.training = layer.training
                setattr(module.get_submodule(parent), slot, own)
    return _converted(module, context)


def keep_first_input(module: nn.Module, layers: Iterable[str]) -> None:
    """The first of these layers, in the order of the forward pass, keeps its whole input: the images are in memory anyway."""
    found: list[Any] = [module.get_submodule(name) for name in layers]
    for layer in [layer for layer in found if hasattr(layer, "may_prune")][:1]:
        layer.may_prune = False


def _check(name: str, layer: nn.Module) -> None:
    if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0 and type(layer) not in CONVERTED:
        raise ValueError(f"{name}: {type(layer).__name__} draws in a way of its own, by torch's generator; use torch.nn.Dropout itself")
    if isinstance(layer, nn.modules.instancenorm._InstanceNorm) and layer.track_running_stats:
        raise ValueError(f"{name}: an instance norm with running statistics changes them in place; set track_running_stats = False")
    if isinstance(layer, nn.modules.batchnorm._BatchNorm) and not isinstance(layer, TORCH_NORMS):
        raise ValueError(f"{name}: {type(layer).__name__} is synchronised or lazy, which is not supported; use torch.nn.BatchNorm2d")
    filters = isinstance(layer, StandardisedConv2d | NormalisedConv2d)
    if filters and (layer.padding_mode != "zeros" or activation_cache.pads_unevenly(layer)):
        raise ValueError(f'{name}: a {type(layer).__name__} needs padding_mode = "zeros" and equal padding on all sides (odd kernels)')


def _converted(module: nn.Module, context: CallContext) -> dict[str, Geometry]:
    """Changes the class of layers whose parameters stay as they are; the geometries of those that can run sparse."""
    geometries = {}
    for name, layer in module.named_modules():
        if kind := CONVERTED.get(type(layer)):
            layer.__class__ = kind
            layer.context, layer.key = context, name
            context.has_dropout |= isinstance(layer, Drawn) and layer.p > 0
            if issubclass(kind, Weighted):
                layer.op, layer.may_prune = operation(layer), True
        if (kind or isinstance(layer, RuntimeNSConv2d)) and (geometry := _geometry(layer)) is not None:
            geometries[name] = geometry
    return geometries


def _geometry(layer: Any) -> Geometry | None:
    if isinstance(layer, nn.Linear):
        return Geometry()
    if isinstance(layer, RuntimeNSConv2d):
        way: Any = layer.op
        return Geometry(way.stride, way.padding, way.dilation, way.groups)
    if not isinstance(layer, nn.Conv2d) or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return None
    return Geometry(_two(layer.stride), _two(layer.padding), _two(layer.dilation), layer.groups)


def _two(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
