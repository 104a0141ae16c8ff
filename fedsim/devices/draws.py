"""What is drawn of a client's device: by a key of the seed and the client, so that nothing is stored and any order gives the same."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.core import rng

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def uniform(seed: int, purpose: str, clients: Ints, *parts: int) -> Floats:
    """(K,) a number in [0, 1) for each client. parts: such as the round."""
    return rng.uniform(_key(seed, purpose, clients, *parts), 1)[:, 0].double().numpy()


def normal(seed: int, purpose: str, clients: Ints) -> Floats:
    """(K,) a standard normal number for each client."""
    return rng.normal(_key(seed, purpose, clients), 1)[:, 0].double().numpy()


def _key(seed: int, purpose: str, clients: Ints, *parts: int) -> torch.Tensor:
    return rng.key(seed, "device", purpose, *parts, torch.from_numpy(np.ascontiguousarray(clients, dtype=np.int64)))
