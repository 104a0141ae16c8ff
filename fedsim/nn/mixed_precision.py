"""bfloat16 arithmetic with float32 master weights: convolutions and products are rounded, nothing else is.

A layer with a convolution or a product takes its input and its weights rounded to bfloat16 (8 bits of mantissa, relative rounding
2^-9) and accumulates in float32. Stored weights, gradients of weights, optimiser, norms, logits and losses stay float32. A step's
gradient then agrees with float32's to a few hundredths of its length, the more images the better.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fedsim.nn.layers.input_gate import WEIGHTED
from fedsim.nn.runtime.activation_cache import rounded as rounding
from fedsim.nn.runtime.conv import RuntimeNSConv2d, RuntimeStandardizedConv2d

LOW = {"float32": None, "tf32": None, "bfloat16": torch.bfloat16}  # [execution] dtype -> what layers round to; tf32 is the device's own


class Lowered(Protocol):
    def set_compute_dtype(self, dtype: torch.dtype | None) -> None: ...
    def set_packed_convolution(self, how: str) -> None: ...


def settle(net: Lowered, dtype: str, device: str, stacked: str = "grouped") -> None:
    """Sets a run's arithmetic in this process: its dtype, how packs convolve, and on CUDA kernels that give the same bits every time."""
    net.set_compute_dtype(LOW[dtype])
    net.set_packed_convolution(stacked)
    if torch.device(device).type == "cuda":
        torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
        torch.backends.cudnn.conv.fp32_precision = "tf32" if dtype == "tf32" else "ieee"  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cudnn.deterministic = True


def lower(module: nn.Module, low: torch.dtype) -> Callable[[], None]:
    """From now on the layers of a module, whose weights are put in for each call, compute in `low`. Call the result to end that."""
    weighted = [layer for layer in module.modules() if isinstance(layer, (*WEIGHTED, RuntimeStandardizedConv2d, RuntimeNSConv2d))]
    others = [layer for layer in module.modules() if layer not in weighted and not list(layer.children())]

    def rounded(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        for slot, value in layer._parameters.items():
            if value is not None and not isinstance(layer, RuntimeStandardizedConv2d | RuntimeNSConv2d):
                layer._parameters[slot] = value.to(low)  # type: ignore[assignment]
        return tuple(rounding(value, low) for value in args)

    def widened(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return tuple(value.float() for value in args) if any(value is not None for value in layer._parameters.values()) else None

    hooks = [layer.register_forward_pre_hook(rounded) for layer in weighted]
    hooks += [layer.register_forward_pre_hook(widened) for layer in others]
    hooks += [layer.register_forward_hook(_float) for layer in weighted[-1:]]

    def end() -> None:
        for hook in hooks:
            hook.remove()

    return end


def _float(layer: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Tensor:
    """The logits, which losses read, in float32."""
    return logits.float()
