"""ReLUs, pools and shortcuts as run-time layers. Under activation pruning they keep a bit or a byte an entry for the backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.kernels import max_pool
from fedsim.kernels.activation_pruning.relu_and_pool import averaged, has_places, largest_of_windows
from fedsim.kernels.sparse.chwn_layout import is_chwn
from fedsim.nn.layers import nsconv, shortcut
from fedsim.nn.runtime import activation_cache
from fedsim.nn.runtime.chwn import is_chwn_images

if TYPE_CHECKING:
    from fedsim.nn.runtime.call_context import CallContext


class Activation(nn.Module):
    """A ReLU as a run-time layer."""

    context: CallContext
    kind: type[nn.Module]

    def forward(self, input: Tensor) -> Tensor:
        if activation_cache.is_pruning(self.context):
            return activation_cache.relu_with_signs(self, input)
        return cast(Tensor, super().forward(input))


class ReLU(Activation, nn.ReLU):
    kind = nn.ReLU


class ReLU6(Activation, nn.ReLU6):
    kind = nn.ReLU6


class RuntimeScaledReLU(Activation, nsconv.ScaledReLU):
    kind = nsconv.ScaledReLU


class MaxPool2d(nn.MaxPool2d):
    context: CallContext

    def forward(self, input: Tensor) -> Tensor:
        context = self.context
        if not context.pure and max_pool.takes(input, self):
            return max_pool.halved(input)
        if self.return_indices or not (context.patterns and is_chwn_images(input)):
            return self._of(input)
        return self._of(input.transpose(0, 1)).transpose(0, 1)

    def _of(self, x: Tensor) -> Tensor:
        pruning = activation_cache.is_pruning(self.context) and has_places(self)
        return largest_of_windows(self, x) if pruning else cast(Tensor, super().forward(x))


class AvgPool2d(nn.AvgPool2d):
    context: CallContext

    def forward(self, input: Tensor) -> Tensor:
        if not (self.context.patterns and is_chwn_images(input)):
            return self._of(input)
        return self._of(input.transpose(0, 1)).transpose(0, 1)

    def _of(self, x: Tensor) -> Tensor:
        return averaged(self, x) if activation_cache.is_pruning(self.context) else super().forward(x)


class RuntimeShortcut(shortcut.Shortcut):
    context: CallContext

    def widened(self, x: Tensor) -> Tensor:
        if not (self.context.patterns and is_chwn(x)):
            return super().widened(x)
        return F.pad(x.movedim(0, -1), (0, 0) * 3 + (0, self.extra)).movedim(-1, 0)
