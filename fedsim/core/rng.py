"""A key becomes numbers: one integer hash, equal on CPU and CUDA, and no generator state anywhere.

A key is an int64 tensor, folded from (seed, purpose, round, call, client, epoch or step, sample). The hash is splitmix64's
finaliser (Steele, Lea and Flood, OOPSLA 2014) in wrapping int64 arithmetic; every function is elementwise over keys, so a
key of shape (K,) draws for K clients at once and `vmap` needs no rule.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha256
from itertools import takewhile
from math import pi
from typing import cast

import numpy as np
import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX2 = 0x94D049BB133111EB - (1 << 64)
_WORD = (1 << 64) - 1


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64, which torch's arithmetic shift is not."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


@lru_cache(1024)
def word(text: str) -> int:
    """A purpose's name as an int64, the same in every process."""
    return int.from_bytes(sha256(text.encode()).digest()[:8], "little", signed=True)


def key(*parts: int | str | Tensor) -> Tensor:
    """An int64 key, (), of the given parts in order; parts that are tensors broadcast, so the key of a tensor (K,) is (K,).

    >>> clients = torch.arange(3)
    >>> together = uniform(key(7, "round", clients), 4)  # (3, 4)
    >>> alone = uniform(key(7, "round", 2), 4)  # the same numbers for client 2 alone
    >>> torch.equal(together[2], alone)
    True
    """
    plain = cast(list[int | str], list(takewhile(lambda part: not isinstance(part, Tensor), parts)))
    folded = torch.tensor(number(*plain))
    for part in parts[len(plain) :]:
        folded = fold(folded, part)
    return folded


def number(*parts: int | str) -> int:
    """`key` in plain integers: a tensor of one number costs a hundred times as much to mix."""
    x = 0
    for part in parts:
        x = (x ^ (word(part) if isinstance(part, str) else part)) + _GOLDEN & _WORD
        x = (x ^ x >> 30) * _MIX1 & _WORD
        x = (x ^ x >> 27) * _MIX2 & _WORD
        x ^= x >> 31
    return x - (x >> 63 << 64)


def fold(folded: Tensor, part: int | str | Tensor) -> Tensor:
    """A key of one more part: key(a, b, c) is fold(key(a, b), c)."""
    part = word(part) if isinstance(part, str) else part
    return _mix((folded ^ part) + _GOLDEN)


def bits(folded: Tensor, count: int) -> Tensor:
    """(…, count) int64 for keys (…): 64 uniform bits each."""
    return _mix(folded.unsqueeze(-1) + _GOLDEN * torch.arange(1, count + 1, device=folded.device))


def generators() -> tuple[bytes, bytes, int]:
    """The states of the generators of torch and numpy that all code shares: they differ after a draw by one of them."""
    of_numpy = np.random.get_state(legacy=False)["state"]
    return torch.get_rng_state().numpy().tobytes(), of_numpy["key"].tobytes(), of_numpy["pos"]


def uniform(folded: Tensor, count: int) -> Tensor:
    """(…, count) float32 in [0, 1), multiples of 2^-24."""
    return _shift(bits(folded, count), 40).to(torch.float32) * 2.0**-24


def integers(folded: Tensor, count: int, high: int) -> Tensor:
    """(…, count) int64 in 0 … high-1; the bias is below high / 2^63."""
    return _shift(bits(folded, count), 1) % high


def normal(folded: Tensor, count: int) -> Tensor:
    """(…, count) float32 standard normal by Box and Muller; equal across machines up to the rounding of log and cos."""
    u = uniform(fold(folded, 1), count).double()
    v = uniform(fold(folded, 2), count).double()
    return ((-2 * torch.log1p(-u)).sqrt() * torch.cos(2 * pi * v)).float()


def permutation(folded: Tensor, count: int) -> Tensor:
    """(…, count) int64: for each key a permutation of 0 … count-1.

    >>> permutation(key(0, "epoch", 1), 5).sort().values
    tensor([0, 1, 2, 3, 4])
    """
    return bits(folded, count).argsort(dim=-1, stable=True)
