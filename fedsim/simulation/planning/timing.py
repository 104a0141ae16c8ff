"""The one timer: wall-clock seconds of calls. Work on a GPU counts until the device has done it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def seconds_of(run: Callable[[], object], device: str | torch.device = "cpu", calls: int = 1) -> float:
    """Seconds of one call, as the mean of `calls` calls."""
    _wait_for(device)
    began = time.perf_counter()
    for _ in range(calls):
        run()
    _wait_for(device)
    return (time.perf_counter() - began) / calls


def least_seconds(run: Callable[[], object], device: str | torch.device = "cpu", runs: int = 3, warm: int = 1, spent: float = 0.0) -> float:
    """The shortest of `runs` calls, or of as many as `spent` seconds allow, after `warm` calls that do not count."""
    for _ in range(warm):
        run()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < runs or time.perf_counter() - began < spent:
        times.append(seconds_of(run, device))
    return min(times)


def _wait_for(device: str | torch.device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
