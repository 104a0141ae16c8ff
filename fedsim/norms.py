"""Layers as Net runs them: pure functions of the tree, over the real images of a padded batch and the kept channels only.

Running statistics are read from the tree and handed back; torch's module would change its own buffers, which a client that is
one row of a pack does not have.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim import draw, saving
from fedsim.innermost import batch_norm, group_norm, takes
from fedsim.keep import Keep
from fedsim.kernels.pattern import Kept, Pattern
from fedsim.kernels.pruned import Layer, Tap, operation
from fedsim.models import gating
from fedsim.models.layers import StandardisedConv2d, standardised
from fedsim.models.normalised import NormalisedConv2d
from fedsim.tree import Tree

TORCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass
class Call:
    """What the layers of one call of Net share."""

    tree: Tree = field(default_factory=dict)
    train: bool = False
    real: Tensor | None = None  # (B,)
    momentum: float | None = None  # of running statistics; None: each norm's own
    pure: bool = False  # under a transform: nothing may be overwritten
    gates: Tree = field(default_factory=dict)  # group -> (C,)
    values: Tree = field(default_factory=dict)  # group -> (C,), what gates by the image are, where it does not depend on the image
    kept: Tree = field(default_factory=dict)  # norm -> (C,) hard gate of its channels
    patterns: dict[str, Pattern] = field(default_factory=dict)  # layers that run on their kept values alone, images innermost
    thin: dict[str, Kept] = field(default_factory=dict)  # layers that are given their kept values, and make the weight of them
    cut: bool = False  # the weights are narrower than the stored ones, standardised filters ready for use
    keep: Keep | None = None  # what layers keep of their inputs for a backward pass; None: all
    caches: list[Any] = field(default_factory=list)  # (whose, cache) of inputs that have been pruned already
    energy: Tree | None = None  # group -> (C,) sum of |activation|^power, where it is asked for
    power: int = 2
    saliency: Tree | None = None  # group -> (B, C) what the gates of every image were, where it is asked for
    penalties: list[Tensor] = field(default_factory=list)  # () each, added to the loss
    buffers: Tree = field(default_factory=dict)
    images: Tensor | None = None  # (B, C, H, W), what the net was called with

    def image_keys(self) -> Tensor:
        """(B,) of the images: the same for all layers, and however these are computed."""
        assert self.images is not None
        return gating.keys_of(self.images)


class BatchNorm(nn.Module):
    """Stands where torch's batch norm stood, with the same parameters."""

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm, name: str, call: Call) -> None:
        super().__init__()
        if norm.momentum is None:
            raise ValueError(
                f"{name}: a batch norm with momentum = None counts its batches, which clients cannot average; give it a number"
            )
        self.weight, self.bias = norm.weight, norm.bias
        self.eps, self.own = norm.eps, norm.momentum
        self.tracked = norm.track_running_stats
        self.mean_key, self.var_key = f"buf/{name}.running_mean", f"buf/{name}.running_var"
        self.call = [call]  # in a list: not a submodule, not copied into the module's own state

    @property
    def momentum(self) -> float:
        """Share of a batch in the running statistics."""
        return self.own if self.call[0].momentum is None else self.call[0].momentum

    def forward(self, x: Tensor) -> Tensor:
        call = self.call[0]
        mean, var = (call.tree[self.mean_key], call.tree[self.var_key]) if self.tracked else (None, None)
        if not call.train and mean is not None:
            flat = x.movedim(0, -1).reshape(1, x.shape[1], -1) if call.patterns and takes(x) else x  # a view of images innermost
            out = F.batch_norm(flat, mean, var, self.weight, self.bias, False, 0.0, self.eps)
            return out if flat is x else out.view(*x.shape[1:], -1).movedim(-1, 0)
        few = x.numel() == x.shape[1]
        if call.real is not None or few:
            real = call.real if call.real is not None else x.new_ones(x.shape[0])
            return self._over_real(x, real, call)
        if call.patterns and takes(x):
            return self._inner(x, call)
        if call.pure or mean is None or var is None:
            return self._pure(x, call)
        mean, var = mean.clone(), var.clone()  # they may be the broadcast's, which no client may change
        out = F.batch_norm(x, mean, var, self.weight, self.bias, True, self.momentum, self.eps)
        call.buffers |= {self.mean_key: mean, self.var_key: var}
        return out

    def _inner(self, x: Tensor, call: Call) -> Tensor:
        """For images that lie innermost."""
        out, mean, var = batch_norm(x, self.weight, self.bias, self.eps)
        count = x.numel() / x.shape[1]
        self._move(call, mean, var * (count / (count - 1)))
        return out

    def _pure(self, x: Tensor, call: Call) -> Tensor:
        """torch's own kernel, the running statistics worked out from what it hands back."""
        out, mean, inverse = torch.native_batch_norm(x, self.weight, self.bias, None, None, True, 0.0, self.eps)
        count = x.numel() / x.shape[1]
        var = (inverse.detach().pow(-2) - self.eps) * (count / (count - 1))
        self._move(call, mean.detach(), var)
        return out

    def _over_real(self, x: Tensor, real: Tensor, call: Call) -> Tensor:
        """Mean and variance over the images with real = 1; fewer than two values leave the running variance as it was."""
        axes = [axis for axis in range(x.dim()) if axis != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        weight = real.to(x.dtype).view([-1] + [1] * (x.dim() - 1))
        count = real.sum() * (x.numel() / (x.shape[0] * x.shape[1]))
        mean = (x * weight).sum(axes) / count
        centred = x - mean.view(shape)
        var = (centred * centred * weight).sum(axes) / count
        out = centred * (var + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        unbiased = var.detach() * count / (count - 1).clamp(min=1)
        old = call.tree[self.var_key] if self.tracked else unbiased
        self._move(call, mean.detach(), torch.where(count < 2, old, unbiased))
        return out

    def _move(self, call: Call, mean: Tensor, var: Tensor) -> None:
        if not self.tracked:
            return
        old_mean, old_var = call.tree[self.mean_key], call.tree[self.var_key]
        call.buffers[self.mean_key] = old_mean + self.momentum * (mean - old_mean)
        call.buffers[self.var_key] = old_var + self.momentum * (var - old_var)


class GroupNorm(nn.Module):
    """Stands where torch's group norm of one group stood; under a hard gate its statistics are those of the kept channels."""

    def __init__(self, norm: nn.GroupNorm, name: str, call: Call) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.name = norm.weight, norm.bias, norm.eps, name
        self.num_groups = 1
        self.call = [call]

    def forward(self, x: Tensor) -> Tensor:
        gate = self.call[0].kept.get(self.name)
        if gate is None and x[0].numel() == 1:  # torch refuses a single value, whose deviation is 0
            gate = x.new_ones(1)
        if gate is None and self.call[0].patterns and takes(x):
            return group_norm(x, self.weight, self.bias, self.eps)
        if gate is None:
            return F.group_norm(x, 1, self.weight, self.bias, self.eps)
        shape = [1, -1] + [1] * (x.dim() - 2)
        axes = list(range(1, x.dim()))
        held = gate.to(x.dtype).view(shape)
        count = held.sum() * (x[0].numel() / x.shape[1])
        mean = (x * held).sum(axes, keepdim=True) / count
        centred = x - mean
        var = (centred.square() * held).sum(axes, keepdim=True) / count
        out = centred * (var + self.eps).rsqrt()
        return out if self.weight is None else out * self.weight.view(shape) + self.bias.view(shape)


class Standardised(nn.Module):
    """Stands where a weight-standardised convolution stood. The stored filter is standardised, whatever is cut from it later."""

    def __init__(self, conv: StandardisedConv2d, name: str, call: Call) -> None:
        super().__init__()
        self.weight, self.bias, self.removed_key = conv.weight, conv.bias, f"buf/{name}.removed"
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups
        self.call, self.op, self.prunes = [call], operation(conv), True

    def forward(self, x: Tensor) -> Tensor:
        call = self.call[0]
        weight = self.weight if call.cut else standardised(self.weight, call.tree.get(self.removed_key))
        if saving.prunes(self):
            return saving.weighted(self, x, Layer(self.op), weight, self.bias)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.conv2d(x, weight.to(x.dtype), bias, self.stride, self.padding, self.dilation, self.groups)


class Normalised(nn.Module):
    """Stands where a normalised convolution stood, under the mask of its weight. It keeps no tensor of the weight's size."""

    tap: Tap | None = None  # of the gradient of the weight in use

    def __init__(self, conv: NormalisedConv2d, name: str, call: Call) -> None:
        super().__init__()
        self.weight, self.bias, self.gain, self.over = conv.weight, conv.bias, conv.gain, conv.over
        self.op, self.key, self.mask_key = operation(conv), name, f"mask/{name}.weight"
        self.call, self.prunes = [call], True

    def forward(self, x: Tensor) -> Tensor:
        call = self.call[0]
        way = Layer(self.op, self.over, self.tap)
        return saving.weighted(self, x, way, self.weight, self.bias, self.gain, call.tree.get(self.mask_key))


class Gate(nn.Module):
    """Multiplies a group's channels by its gate, where there is one."""

    def __init__(self, group: str, call: Call) -> None:
        super().__init__()
        self.group, self.call = group, [call]

    def forward(self, x: Tensor) -> Tensor:
        call = self.call[0]
        if call.energy is not None:
            real = 1.0 if call.real is None else call.real.to(x.dtype).view([-1] + [1] * (x.dim() - 1))
            found = (x.abs() ** call.power * real).sum([axis for axis in range(x.dim()) if axis != 1])
            call.energy[self.group] = call.energy[self.group] + found if self.group in call.energy else found
        gate = call.gates.get(self.group)
        return x if gate is None else x * gate.to(x.dtype).view([1, -1] + [1] * (x.dim() - 2))


class InputGate(gating.InputGate):
    """Stands where a gate by the image stood. Under a hard gate of its channels it selects none of them by itself.

    Where the tree has VALUES (n,), it is those numbers, whatever the image.
    """

    def __init__(self, gate: gating.InputGate, name: str, call: Call) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias, self.group = gate.weight, gate.bias, name.removeprefix(f"{gating.GATES}.")
        self.keep, self.sigmoid, self.l1, self.random = gate.keep, gate.sigmoid, gate.l1, gate.random
        self.call = [call]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        call = self.call[0]
        g = self._values(x, call)  # (B, C) or (C,)
        if call.saliency is not None:
            call.saliency[self.group] = g
        if call.train and self.l1:
            call.penalties.append(self.l1 * _mean(g.sum(-1), call.real))
        return y * g[..., None, None]

    def _values(self, x: Tensor, call: Call) -> Tensor:
        hard, constant = call.gates.get(self.group), call.values.get(self.group)
        g = self.saliency(x) if constant is None else constant
        if hard is not None or constant is not None:
            return g if hard is None else g * hard
        return self.selected(g, draw.fold(call.image_keys(), self.group) if self.random else None)


def _mean(values: Tensor, real: Tensor | None) -> Tensor:
    """Of (B,), over the real images."""
    return values.mean() if real is None else (values * real).sum() / real.sum()


WEIGHTED = (Standardised, Normalised, InputGate)
OURS: tuple[tuple[Any, Any], ...] = (
    (TORCH_NORMS, BatchNorm),
    (nn.GroupNorm, GroupNorm),
    (StandardisedConv2d, Standardised),
    (NormalisedConv2d, Normalised),
    (gating.InputGate, InputGate),
)


def swap(module: nn.Module, call: Call) -> None:
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
        if isinstance(layer, StandardisedConv2d | NormalisedConv2d) and (layer.padding_mode != "zeros" or saving.uneven(layer)):
            raise ValueError(
                f'{name}: a {type(layer).__name__} pads by zeros, alike on all sides; padding_mode = "zeros" and odd kernels do'
            )
        for kind, own in OURS:
            if isinstance(layer, kind) and (kind is not nn.GroupNorm or layer.num_groups == 1):
                setattr(
                    module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], made.setdefault(layer, own(layer, name, call))
                )
