"""Timing that benches share: runs that take turns, so that a machine's slow moments meet all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

from fedsim.simulation.planning.timing import seconds_of

BUSY = 0.1  # seconds that one reading takes at least


def interleaved(
    runs: Mapping[str, Callable[[], object]], device: str | torch.device, readings: int, busy: float = BUSY, warm: int = 1
) -> dict[str, list[float]]:
    """Seconds of a call of every run, `readings` of each in turn. A reading is the mean of as many calls as take `busy` seconds."""
    calls = {}
    for name, run in runs.items():
        seconds_of(run, device, warm)
        calls[name] = 1 + int(busy / seconds_of(run, device))
    taken = [{name: seconds_of(run, device, calls[name]) for name, run in runs.items()} for _ in range(readings)]
    return {name: [reading[name] for reading in taken] for name in runs}


def median_seconds(run: Callable[[], object], times: int, quiet: float = 0.0) -> float:
    """The median of `times` calls, each after `quiet` seconds of sleep."""
    readings = []
    for _ in range(times):
        time.sleep(quiet)
        readings.append(seconds_of(run))
    return median(readings)
