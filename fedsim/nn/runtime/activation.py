"""ReLUs and pools that keep a bit or a byte an entry for the backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.kernels import max_pool
from fedsim.kernels.activation_pruning.relu_and_pool import averaged, has_places, largest_of_windows
from fedsim.kernels.sparse.chwn_layout import innermost
from fedsim.nn.layers import nsconv, shortcut
from fedsim.nn.runtime import activation_cache
from fedsim.nn.runtime.chwn import flat_rows

if TYPE_CHECKING:
    from fedsim.nn.runtime.call_context import CallContext


class Activation(nn.Module):
    """A ReLU, as it stands in Net."""

    call: list[CallContext]
    kind: type[nn.Module]

    def forward(self, x: Tensor) -> Tensor:
        if activation_cache.saves(self.call[0]):
            return activation_cache.activated(self, x)
        return cast(Tensor, super().forward(x))


class ReLU(Activation, nn.ReLU):
    kind = nn.ReLU


class ReLU6(Activation, nn.ReLU6):
    kind = nn.ReLU6


class RuntimeScaledReLU(Activation, nsconv.ScaledReLU):
    kind = nsconv.ScaledReLU


class MaxPool2d(nn.MaxPool2d):
    call: list[CallContext]

    def forward(self, x: Tensor) -> Tensor:
        call = self.call[0]
        if not call.pure and max_pool.takes(x, self):
            return max_pool.halved(x)
        if self.return_indices or not (call.patterns and flat_rows(x)):
            return self._of(x)
        return self._of(x.transpose(0, 1)).transpose(0, 1)

    def _of(self, x: Tensor) -> Tensor:
        lean = activation_cache.saves(self.call[0]) and has_places(self)
        return largest_of_windows(self, x) if lean else cast(Tensor, super().forward(x))


class AvgPool2d(nn.AvgPool2d):
    call: list[CallContext]

    def forward(self, x: Tensor) -> Tensor:
        if not (self.call[0].patterns and flat_rows(x)):
            return self._of(x)
        return self._of(x.transpose(0, 1)).transpose(0, 1)

    def _of(self, x: Tensor) -> Tensor:
        return averaged(self, x) if activation_cache.saves(self.call[0]) else super().forward(x)


class RuntimeShortcut(shortcut.Shortcut):
    call: list[CallContext]

    def widened(self, x: Tensor) -> Tensor:
        if not (self.call[0].patterns and innermost(x)):
            return super().widened(x)
        return F.pad(x.movedim(0, -1), (0, 0) * 3 + (0, self.extra)).movedim(-1, 0)
