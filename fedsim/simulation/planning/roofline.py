"""The machine's roof: what one rank reaches at most, in arithmetic and in memory traffic (the roofline: Williams et al., CACM 2009).

Arithmetic is a large product of matrices in the run's dtype, memory the triad a = b + s c of STREAM on arrays far beyond the last
cache, both with the threads of a rank. Rank 0 measures alone, in about 0.4 s, once for a machine, torch, device, dtype and number of
threads, and the user's cache remembers. The roof of a phase is a rank's peak times the ranks that work in it; ranks of one node share
its memory, and more ranks than cores share cores, so the true roof of many ranks may be lower.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial

import torch

from fedsim.simulation.planning import cache
from fedsim.simulation.planning.timing import least_seconds

SPENT, LEAST = 0.1, 3  # seconds and runs, at least, in which a peak is sought
LONG_ENOUGH = 0.002  # seconds of a product of matrices whose start does not count
LARGEST = 16_384  # rows of the matrices
ARRAY = {"cpu": 1 << 26, "cuda": 1 << 29}  # bytes of each of the triad's three arrays
PRECISION = {"tf32": "high"}  # dtypes that are float32 multiplied in another way
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Peaks:
    """Of one rank, per second."""

    flops: float
    bytes: float


def peaks(device: str = "cpu", dtype: str = "float32") -> Peaks:
    """The peaks of this machine's device, from the cache or measured now."""
    name = torch.cuda.get_device_name(device) if device != "cpu" else platform.machine()
    threads = torch.get_num_threads() if device == "cpu" else 0
    kept = cache.place("peaks", platform.node(), os.cpu_count(), torch.__version__, device.partition(":")[0], name, dtype, threads)
    try:
        known = Peaks(**json.loads(cache.known(kept) or "{}"))
        return Peaks(float(known.flops), float(known.bytes))
    except (ValueError, TypeError, RecursionError):
        found = measured(device, dtype)
        cache.remember(kept, json.dumps(asdict(found)))
        return found


def measured(device: str, dtype: str) -> Peaks:
    """The peaks, sought now."""
    with torch.no_grad(), _multiplied(dtype):
        return Peaks(_arithmetic(device, DTYPES[dtype]), _memory(device))


def _arithmetic(device: str, dtype: torch.dtype) -> float:
    rows = 256
    while least_seconds(_product(rows, device, dtype), device, 2, warm=0) < LONG_ENOUGH and rows < LARGEST:
        rows *= 2
    return 2 * rows**3 / least_seconds(_product(rows, device, dtype), device, LEAST, 0, SPENT)


def _product(rows: int, device: str, dtype: torch.dtype) -> Callable[[], object]:
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.rand(rows, rows, generator=generator, device=device).to(dtype) for _ in range(2))
    return partial(torch.mm, a, b, out=torch.empty_like(a))


def _memory(device: str) -> float:
    size = ARRAY[device.partition(":")[0]]
    a, b, c = (torch.ones(size // 4, device=device) for _ in range(3))
    return 3 * size / least_seconds(lambda: torch.add(b, c, alpha=3.0, out=a), device, LEAST, 0, SPENT)


@contextmanager
def _multiplied(dtype: str) -> Iterator[None]:
    """Products of float32 matrices as this dtype means them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(PRECISION.get(dtype, "highest"))
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
