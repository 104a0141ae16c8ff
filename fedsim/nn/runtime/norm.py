"""Norms as run-time layers: pure functions of the tree, over the real images of a padded batch and over the open channels only.

They read running statistics from the tree and return new ones. torch's norms change buffers of their own; a client that is one row
of a pack has none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.core import keys
from fedsim.nn.runtime.call_context import CallContext
from fedsim.nn.runtime.chwn import batch_norm, group_norm, takes

TORCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class BatchNorm(nn.Module):
    """Replaces torch's batch norm, with the same parameters."""

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm, name: str, context: CallContext) -> None:
        super().__init__()
        if norm.momentum is None:
            raise ValueError(
                f"{name}: a batch norm with momentum = None counts its batches, which clients cannot average; give it a number"
            )
        self.weight, self.bias = norm.weight, norm.bias
        self.eps, self.own = norm.eps, norm.momentum
        self.tracked = norm.track_running_stats
        self.mean_key, self.var_key = f"{keys.BUFFERS}{name}.running_mean", f"{keys.BUFFERS}{name}.running_var"
        self.name, self.context = name, context

    @property
    def momentum(self) -> float:
        """Share of a batch in the running statistics."""
        return self.own if self.context.momentum is None else self.context.momentum

    def forward(self, input: Tensor) -> Tensor:
        context = self.context
        mean, var = self._running(context) if self.tracked else (None, None)
        if mean is not None and not (self.training and context.train):  # a model may keep a part of itself in evaluation mode
            flat = (
                input.movedim(0, -1).reshape(1, input.shape[1], -1) if context.patterns and takes(input) else input
            )  # a view of CHWN layout
            out = F.batch_norm(flat, mean, var, self.weight, self.bias, False, 0.0, self.eps)
            return out if flat is input else out.view(*input.shape[1:], -1).movedim(-1, 0)
        few = input.numel() == input.shape[1]
        if context.real is not None or few:
            real = context.real if context.real is not None else input.new_ones(input.shape[0])
            return self._over_real(input, real, context)
        if context.patterns and takes(input):
            return self._in_chwn(input, context)
        if context.pure or mean is None or var is None:
            return self._pure(input, context)
        mean, var = mean.clone(), var.clone()  # they may be the broadcast's, which no client may change
        out = F.batch_norm(input, mean, var, self.weight, self.bias, True, self.momentum, self.eps)
        context.buffers |= {self.mean_key: mean, self.var_key: var}
        return out

    def _in_chwn(self, x: Tensor, context: CallContext) -> Tensor:
        """For x in CHWN layout."""
        out, mean, var = batch_norm(x, self.weight, self.bias, self.eps)
        count = x.numel() / x.shape[1]
        self._move(context, mean, var * (count / (count - 1)))
        return out

    def _pure(self, x: Tensor, context: CallContext) -> Tensor:
        """By torch's own kernel; the running statistics are computed from the mean and deviation that it returns."""
        out, mean, inverse = torch.native_batch_norm(x, self.weight, self.bias, None, None, True, 0.0, self.eps)
        count = x.numel() / x.shape[1]
        var = (inverse.detach().pow(-2) - self.eps) * (count / (count - 1))
        self._move(context, mean.detach(), var)
        return out

    def _over_real(self, x: Tensor, real: Tensor, context: CallContext) -> Tensor:
        """Mean and variance over the images with real = 1; fewer than two values leave the running variance as it was."""
        if len(real) != len(x):
            rows = f"a batch of {len(real)} images, some of which do not count, reaches it as {len(x)} rows"
            raise ValueError(f"{self.name}: {rows}; so this batch norm cannot tell which rows count; it needs one row for each image")
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
        old = self._running(context)[1] if self.tracked else unbiased
        self._move(context, mean.detach(), torch.where(count < 2, old, unbiased))
        return out

    def _running(self, context: CallContext) -> tuple[Tensor, Tensor]:
        """The running statistics, as an earlier use of the layer in this call has left them."""
        mean, var = self.mean_key, self.var_key
        return (context.buffers[mean], context.buffers[var]) if mean in context.buffers else (context.tree[mean], context.tree[var])

    def _move(self, context: CallContext, mean: Tensor, var: Tensor) -> None:
        if not self.tracked:
            return
        old_mean, old_var = self._running(context)
        context.buffers[self.mean_key] = old_mean + self.momentum * (mean - old_mean)
        context.buffers[self.var_key] = old_var + self.momentum * (var - old_var)


class GroupNorm(nn.Module):
    """Replaces torch's group norm of one group; under a hard gate its statistics are those of the open channels."""

    def __init__(self, norm: nn.GroupNorm, name: str, context: CallContext) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.name = norm.weight, norm.bias, norm.eps, name
        self.num_groups = 1
        self.context = context

    def forward(self, input: Tensor) -> Tensor:
        gate = self.context.norm_gates.get(self.name)
        if gate is None and input[0].numel() == 1:  # torch refuses a single value, whose deviation is 0
            gate = input.new_ones(1)
        if gate is None and self.context.patterns and takes(input):
            return group_norm(input, self.weight, self.bias, self.eps)
        if gate is None:
            return F.group_norm(input, 1, self.weight, self.bias, self.eps)
        shape = [1, -1] + [1] * (input.dim() - 2)
        axes = list(range(1, input.dim()))
        held = gate.to(input.dtype).view(shape)
        count = held.sum() * (input[0].numel() / input.shape[1])
        mean = (input * held).sum(axes, keepdim=True) / count
        centred = input - mean
        var = (centred.square() * held).sum(axes, keepdim=True) / count
        out = centred * (var + self.eps).rsqrt()
        return out if self.weight is None else out * self.weight.view(shape) + self.bias.view(shape)
