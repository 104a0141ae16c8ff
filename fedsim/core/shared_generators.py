"""The random generators of torch, NumPy and Python, which all code of a process shares. fedsim draws by keys (`fedsim.rng`); these two
functions are for code of its users, who may draw by a shared generator. torch has another one on each GPU, whose draws are seeded too but
not noticed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

NAMES = ("torch", "NumPy", "Python")
LARGEST = 2**32  # of NumPy's seeds


def states() -> tuple[bytes, bytes, object]:
    """The states of the three, in the order of NAMES: one differs after a draw by it."""
    of_numpy = np.random.get_state(legacy=False)["state"]
    return torch.get_rng_state().numpy().tobytes(), of_numpy["key"].tobytes() + str(of_numpy["pos"]).encode(), random.getstate()


def moved(before: tuple[bytes, bytes, object]) -> str:
    """Whose generator has drawn since it had these states; "" if none has."""
    return next((name for name, old, new in zip(NAMES, before, states(), strict=True) if old != new), "")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The three begin from this seed, the same at every call; afterwards they go on as if nothing had been drawn inside."""
    of_numpy, of_python = np.random.get_state(legacy=False), random.getstate()
    on_gpu = torch.cuda.is_initialized()
    with torch.random.fork_rng(range(torch.cuda.device_count()) if on_gpu else ()):
        try:
            torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a hundred times as long
            if on_gpu:
                torch.cuda.manual_seed_all(seed)
            np.random.seed(seed % LARGEST)
            random.seed(seed)
            yield
        finally:
            np.random.set_state(of_numpy)
            random.setstate(of_python)
