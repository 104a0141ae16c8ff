"""Shortcuts of residual blocks without parameters (option A)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Shortcut(nn.Module):
    """Option A of He et al. 2016: halves height and width by averages, and appends channels of zeros. No parameters."""

    def __init__(self, inside: int, outside: int, stride: int, detached: bool = False) -> None:
        super().__init__()
        self.extra = outside - inside
        self.detached = detached and self.extra > 0  # the published code of DWFNP cuts the gradient there
        # ceil_mode: an odd side ends as it does behind a padded convolution of stride 2
        self.pool: nn.Module = nn.AvgPool2d(stride, ceil_mode=True) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(x.detach() if self.detached else x)  # (B, inside, H', W')
        return self.widened(x) if self.extra else x  # (B, outside, H', W')

    def widened(self, x: Tensor) -> Tensor:
        """x with `extra` channels of zeros after its own."""
        return F.pad(x, (0, 0, 0, 0, 0, self.extra))
