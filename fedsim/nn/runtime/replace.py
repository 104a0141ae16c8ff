"""Puts the run-time layers in the place of a model's own."""

from __future__ import annotations

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
from fedsim.nn.runtime.gate import RuntimeInputGate
from fedsim.nn.runtime.norm import TORCH_NORMS, BatchNorm, GroupNorm

RUNTIME_CONVS: dict[type[nn.Module], Any] = {
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
}


def replace_convs_and_activations(module: nn.Module, call: CallContext) -> dict[str, Geometry]:
    """Gives the module's layers the ways above, in place; what geometry every layer has that could run sparse."""
    found = {}
    for name, layer in module.named_modules():
        if kind := RUNTIME_CONVS.get(type(layer)):
            layer.__class__ = kind
            layer.call, layer.key = [call], name
            if issubclass(kind, Weighted):
                layer.op, layer.prunes = operation(layer), True
            if (geometry := _geometry(layer)) is not None:
                found[name] = geometry
    return found


def _geometry(layer: Any) -> Geometry | None:
    if isinstance(layer, nn.Linear):
        return Geometry()
    if not isinstance(layer, nn.Conv2d) or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return None
    return Geometry(_two(layer.stride), _two(layer.padding), _two(layer.dilation), layer.groups)


def _two(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


WEIGHTED = (RuntimeStandardizedConv2d, RuntimeNSConv2d, RuntimeInputGate)
RUNTIME_NORMS: tuple[tuple[Any, Any], ...] = (
    (TORCH_NORMS, BatchNorm),
    (nn.GroupNorm, GroupNorm),
    (StandardisedConv2d, RuntimeStandardizedConv2d),
    (NormalisedConv2d, RuntimeNSConv2d),
    (input_gate.InputGate, RuntimeInputGate),
)


def replace_norms_and_gates(module: nn.Module, call: CallContext) -> None:
    """Puts layers of ours in the place of batch norms, group norms of one group, standardised and normalised convolutions.

    ValueError for layers that draw numbers of their own or change themselves.
    """
    made: dict[nn.Module, nn.Module] = {}
    for name, layer in list(module.named_modules(remove_duplicate=False)):
        if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0:
            raise ValueError(f"{name}: dropout draws from the global generator, so no two fleets would agree; set p = 0")
        if isinstance(layer, nn.modules.instancenorm._InstanceNorm) and layer.track_running_stats:
            raise ValueError(f"{name}: an instance norm with running statistics changes them in place; set track_running_stats = False")
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and not isinstance(layer, TORCH_NORMS):
            raise ValueError(f"{name}: {type(layer).__name__} synchronises or is lazy; use torch.nn.BatchNorm2d")
        if isinstance(layer, StandardisedConv2d | NormalisedConv2d) and (layer.padding_mode != "zeros" or activation_cache.uneven(layer)):
            raise ValueError(
                f'{name}: a {type(layer).__name__} pads by zeros, alike on all sides; padding_mode = "zeros" and odd kernels do'
            )
        for kind, own in RUNTIME_NORMS:
            if isinstance(layer, kind) and (kind is not nn.GroupNorm or layer.num_groups == 1):
                setattr(
                    module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], made.setdefault(layer, own(layer, name, call))
                )
