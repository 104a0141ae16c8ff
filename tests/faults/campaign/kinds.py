"""The kinds of faults: which function tries one, how often a whole campaign does, and what they need of the machine."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from campaign import clocks, damage, disks, elsewhere, kills, recording, torn
from campaign.lab import Lab
from campaign.outcomes import Outcome

Try = Callable[[Lab, int, random.Random], list[Outcome]]  # of the lab, the number of the case, and the source of all that is drawn


@dataclass(frozen=True)
class Kind:
    """try_: does a case of this kind, which may be several faults. cases: in a whole campaign. missing: why it cannot be tried."""

    try_: Try
    cases: int
    missing: Callable[[], str] = lambda: ""


KINDS = {
    "kills": Kind(kills.ranks, 30),
    "torn-writes": Kind(torn.torn, 8, recording.missing),
    "full-disk": Kind(disks.full_disk, 8, disks.no_root),
    "truncated": Kind(damage.truncated, 24),
    "read-only": Kind(disks.read_only, 8),
    "vanished": Kind(disks.vanished, 6),
    "flipped": Kind(damage.flipped, 24),
    "file-limit": Kind(disks.file_limit, 8),
    "clock-jumps": Kind(clocks.jumps, 8, clocks.no_faketime),
    "stopped-rank": Kind(clocks.stopped, 8),
    "system-calls": Kind(elsewhere.between_calls, 20, recording.missing),
    "machine-lost": Kind(torn.machine_lost, 8, recording.missing),
    "machine-restarted": Kind(clocks.restarted, 4, clocks.no_time_namespace),
    "starts": Kind(elsewhere.start_of_resume, 8, recording.missing),
    "two-resumes": Kind(elsewhere.two_resumes, 8),
    "mirrors": Kind(elsewhere.mirrored, 4),
    "sweeps": Kind(elsewhere.sweep, 4),
    "every-third": Kind(elsewhere.every_third, 2),
}
