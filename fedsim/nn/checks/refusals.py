"""Kinds of modules that are refused by name before anything is computed, each with what to do instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
MOST = 3  # faults that one message lists
UNKEYED = "draws random numbers by torch's generator, so fleets would give different results"


def refusals(module: nn.Module) -> list[str]:
    """What fedsim does not support in this module, a line each; empty where nothing is known to be wrong."""
    for rule in (_wrapped, _lazy, _reparametrised, _values, _attributes, _drawing):
        if found := list(rule(module)):
            more = [f"and {len(found) - MOST} more of this kind"] if len(found) > MOST else []
            return found[:MOST] + more
    return []


def called(name: str, layer: nn.Module) -> str:
    """A layer in a message: its place in the model and its class."""
    return f"{name} ({type(layer).__name__})" if name else f"the model ({type(layer).__name__})"


def _wrapped(module: nn.Module) -> Iterator[str]:
    """What stands around a module and is not one itself."""
    for name, layer in module.named_modules():
        if isinstance(layer, torch.jit.ScriptModule):
            yield f"{called(name, layer)} is compiled by torch.jit; give the torch.nn.Module that it was made from"
            return
        if hasattr(layer, "_orig_mod"):
            yield f"{called(name, layer)} is compiled by torch.compile; give the module as it was before"
            return
        if isinstance(layer, WRAPPERS):
            yield f"{called(name, layer)} spreads a module over devices, which fedsim does by itself; give the module inside, its .module"
            return


def _lazy(module: nn.Module) -> Iterator[str]:
    fix = "call the model once on torch.zeros(2, *shape) where it is made, or say the sizes"
    for name, layer in module.named_modules():
        own = (*layer._parameters.values(), *layer._buffers.values())
        if any(isinstance(value, UninitializedParameter | UninitializedBuffer) for value in own) or _unfinished(layer):
            yield f"{called(name, layer)} is lazy, so its weights have no sizes yet; {fix}"


def _unfinished(layer: nn.Module) -> bool:
    return isinstance(layer, LazyModuleMixin) and layer.cls_to_become is not None


def _reparametrised(module: nn.Module) -> Iterator[str]:
    """Layers whose weight is no parameter: a mask, a sum over clients and a price belong to parameters."""
    for name, layer in module.named_modules():
        if parametrize.is_parametrized(layer):
            for slot in layer.parametrizations:
                fix = f'torch.nn.utils.parametrize.remove_parametrizations(layer, "{slot}")'
                yield f"{called(name, layer)} computes its {slot} from other parameters (torch.nn.utils.parametrize); {fix} makes it plain"
        for hook in layer._forward_pre_hooks.values():
            yield from (
                f"{called(name, layer)} {reason}" for kind, tell in HOOKS.items() if isinstance(hook, kind) and (reason := tell(hook))
            )


HOOKS: dict[type, Callable[..., str]] = {
    WeightNorm: lambda hook: f"has torch.nn.utils.weight_norm; torch.nn.utils.remove_weight_norm(layer, {hook.name!r}) makes it plain",
    SpectralNorm: lambda hook: (
        f"has torch.nn.utils.spectral_norm; torch.nn.utils.remove_spectral_norm(layer, {hook.name!r}) makes it plain"
    ),
    prune.BasePruningMethod: lambda hook: (
        f"is pruned by torch.nn.utils.prune; prune.remove(layer, {hook._tensor_name!r}) makes it plain; methods have masks of their own"
    ),
}


def _values(module: nn.Module) -> Iterator[str]:
    """Parameters that are not float32 on the CPU, where a model is made."""
    parameters = list(module.named_parameters())
    if not parameters:
        yield f"{called('', module)} has no parameters, so there is nothing to train"
    elif not any(value.requires_grad for _, value in parameters):
        yield f"{called('', module)} has no parameter with requires_grad = True, so there is nothing to train"
    for name, value in parameters:
        if value.dtype != torch.float32:
            how = 'execution.dtype = "bfloat16" computes in that' if value.dtype == torch.bfloat16 else "leave out .double() or .to(dtype)"
            yield f"parameter {name} is {str(value.dtype).removeprefix('torch.')}; fedsim holds parameters in float32: {how}"
        elif value.device.type != "cpu":
            yield f"parameter {name} stands on {value.device}; make the model on the CPU: fedsim moves it, by execution.device"


def _attributes(module: nn.Module) -> Iterator[str]:
    """Tensors that are results of a computation: a copy of the model would need their history."""
    for name, layer in module.named_modules():
        for slot, value in vars(layer).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                fix = "make it in forward, or store it with register_buffer and .detach()"
                yield f"{called(name, layer)} holds the tensor self.{slot}, a result of a computation with gradients; {fix}"


def _drawing(module: nn.Module) -> Iterator[str]:
    """Layers of torch that draw random numbers by themselves; those of dropout get theirs from fedsim."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.MultiheadAttention) and layer.dropout > 0:
            inner = ", or set self_attn.dropout = 0.0 of a transformer layer after it is made"
            yield f"{called(name, layer)} {UNKEYED}; make it with dropout=0.0{inner}"
        elif isinstance(layer, nn.RNNBase) and layer.dropout > 0 and layer.num_layers > 1:
            yield f"{called(name, layer)} {UNKEYED}; make it with dropout=0.0, and a torch.nn.Dropout between layers of their own"
        elif isinstance(layer, nn.RReLU) and layer.lower < layer.upper:
            yield f"{called(name, layer)} {UNKEYED}; use torch.nn.LeakyReLU"
        elif isinstance(layer, nn.FractionalMaxPool2d | nn.FractionalMaxPool3d):
            yield f"{called(name, layer)} {UNKEYED}; use torch.nn.AdaptiveMaxPool2d"
        elif isinstance(layer, DROPOUT) and type(layer) not in DROPOUT:
            yield f"{called(name, layer)} is a dropout of its own, which {UNKEYED}; use torch.nn.Dropout itself"
