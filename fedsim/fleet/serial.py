"""The reference: one client after the other."""

from __future__ import annotations

from fedsim.fleet.local_fleet import LocalFleet
from fedsim.fleet.one_by_one import carry_out


class SerialFleet(LocalFleet):
    """Clients one after the other."""

    name = "serial"
    carry_out = staticmethod(carry_out)
