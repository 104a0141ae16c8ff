"""The virtual clock of one exchange: seconds and joules of each client, from what the ledger charges it and its device.

t = t_down + t_comp + t_up, with t_down = latency + 8 · bytes_down / down and t_up likewise,
t_comp = sum over densities d of F_d · s(d) / flops + steps · overhead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum

import numpy as np
from numpy.typing import NDArray

from fedsim.devices.draws import Floats
from fedsim.devices.mix import ClientDevices, DeviceMix

BITS = 8  # of a byte


@dataclass(frozen=True)
class Need:
    """What the ledger charges a client for one exchange.

    flops: density -> FLOPs that the layers of this density would take if they were dense (of channels that are cut or closed: those of
    the smaller layer). What is priced densely, such as growth probes and hypernetworks, stands at density 1.
    """

    flops: Mapping[float, int]
    steps: int
    bytes_down: int
    bytes_up: int
    memory: int  # bytes


@dataclass(frozen=True, eq=False)
class Times:
    """Seconds of each client in the three parts of an exchange, (K,) each."""

    down: Floats
    compute: Floats
    up: Floats

    @property
    def total(self) -> Floats:
        return self.down + self.compute + self.up

    def until(self, seconds: Floats) -> Times:
        """What of the parts has passed `seconds` after the beginning."""
        down = np.minimum(self.down, seconds)
        compute = np.clip(seconds - self.down, 0, self.compute)
        up = np.where(seconds >= self.total, self.up, np.clip(seconds - self.down - self.compute, 0, self.up))
        return Times(down, compute, up)

    def joules(self, devices: ClientDevices, waiting: Floats | float = 0.0) -> Floats:
        """(K,) energy = power · t_comp + power_radio · (t_down + t_up) + power_idle · waiting."""
        return devices.power * self.compute + devices.power_radio * (self.down + self.up) + devices.power_idle * waiting


def times(mix: DeviceMix, devices: ClientDevices, needs: Sequence[Need]) -> Times:
    """The seconds that each client takes, in the order of the devices."""
    down, up, steps = (np.array([getattr(need, name) for need in needs], float) for name in ("bytes_down", "bytes_up", "steps"))
    return Times(
        devices.latency + BITS * down / devices.down,
        _dense_equivalent(mix, devices.kind, needs) / devices.flops + steps * devices.overhead,
        devices.latency + BITS * up / devices.up,
    )


def _dense_equivalent(mix: DeviceMix, kind: NDArray[np.int64], needs: Sequence[Need]) -> Floats:
    """(K,) FLOPs of dense training that take as long: sum of F_d · s(d). Clients with equal work share one computation."""
    known: dict[tuple[int, int], float] = {}
    curves = [each.sparse_time for each in mix.kinds]
    found = np.empty(len(needs))
    for i, (number, need) in enumerate(zip(kind.tolist(), needs, strict=True)):
        mark = number, id(need.flops)
        if mark not in known:
            shares = curves[number].share(np.array(list(need.flops), float))
            known[mark] = fsum(count * share for count, share in zip(need.flops.values(), shares.tolist(), strict=True))
        found[i] = known[mark]
    return found
