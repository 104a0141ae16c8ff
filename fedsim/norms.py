"""Batch norm as Net runs it: a pure function of the tree, over the real images of a padded batch only.

Running statistics are read from the tree and handed back; torch's module would change its own buffers, which a client that is
one row of a pack does not have.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
    buffers: Tree = field(default_factory=dict)


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
            return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps)
        few = x.numel() == x.shape[1]
        if call.real is not None or few:
            real = call.real if call.real is not None else x.new_ones(x.shape[0])
            return self._over_real(x, real, call)
        if call.pure or mean is None or var is None:
            return self._pure(x, call)
        mean, var = mean.clone(), var.clone()  # they may be the broadcast's, which no client may change
        out = F.batch_norm(x, mean, var, self.weight, self.bias, True, self.momentum, self.eps)
        call.buffers |= {self.mean_key: mean, self.var_key: var}
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


def swap(module: nn.Module, call: Call) -> None:
    """Puts a BatchNorm of ours in the place of every batch norm of `module`, and refuses layers that draw numbers of their own."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0:
            raise ValueError(f"{name}: dropout draws from the global generator, so no two fleets would agree; set p = 0")
        if isinstance(layer, nn.modules.instancenorm._InstanceNorm) and layer.track_running_stats:
            raise ValueError(f"{name}: an instance norm with running statistics changes them in place; set track_running_stats = False")
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and not isinstance(layer, TORCH_NORMS):
            raise ValueError(f"{name}: {type(layer).__name__} synchronises or is lazy; use torch.nn.BatchNorm2d")
        if isinstance(layer, TORCH_NORMS):
            parent = module.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], BatchNorm(layer, name, call))
