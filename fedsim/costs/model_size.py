"""Bits of a stored model under several encodings (metrics of the MicroNet challenge)."""

from __future__ import annotations

from math import log2

from fedsim.costs.flops import ones
from fedsim.costs.profile import DENSE, KeptCounts, LayerProfile, ModelProfile

ENCODINGS = ("dense", "bitmask", "coordinate", "csr32", "csr16", "entropy", "affine8")


def micronet(layer: LayerProfile, kept: float, bias: bool = True, activation: bool = True) -> tuple[float, float]:
    """(multiplications, additions) of one image as the MicroNet challenge counts them; for comparison only.

    Multiplications: d MACs, and one per output for the activation; additions: d MACs, one per output for the bias, less one per output.
    """
    outputs = layer.shape[0] * layer.positions
    macs = kept * layer.positions
    return macs + outputs * activation, macs + outputs * bias - outputs


# ---- model size
def encoded_bits(encoding: str, n: int, nnz: float, rows: int = 1) -> float:
    """Bits of `nnz` kept of `n` float32 weights, a matrix of `rows` rows, in one of ENCODINGS.

    Raises ValueError where the encoding's indices are too narrow.
    """
    if encoding not in ENCODINGS:
        raise ValueError(f"no encoding {encoding!r}; there are {', '.join(ENCODINGS)}")
    if encoding == "csr16" and n // rows >= 2**16:
        raise ValueError(f"csr16 has columns below 65,536; this tensor has {n // rows:,}")
    if encoding in ("coordinate", "csr32") and n >= 2**31:
        raise ValueError(f"{encoding} has indices below 2^31; this tensor has {n:,} weights")
    return {
        "dense": 32 * n,
        "bitmask": 32 * nnz + n,
        "coordinate": 64 * nnz,
        "csr32": 64 * nnz + 32 * (rows + 1),
        "csr16": 48 * nnz + 32 * (rows + 1),
        "entropy": 32 * nnz + n * _entropy(nnz / n),
        "affine8": 8 * nnz + 64,
    }[encoding]


def size_bits(anatomy: ModelProfile, kept: KeptCounts = DENSE, encoding: str = "bitmask") -> dict[str, float]:
    """Bits of the whole model: masked layers in that encoding, dense layers and what is never masked as float32; with their "total"."""
    ones(anatomy, kept)
    terms = {
        "masked": sum(encoded_bits(encoding, a.weights, kept[a.name], a.shape[0]) for a in anatomy.layers if a.name in kept),
        "dense": float(sum(32 * a.weights for a in anatomy.layers if a.name not in kept)),
        "free": 32.0 * (anatomy.free + anatomy.buffers),
    }
    return terms | {"total": sum(terms.values())}


def _entropy(p: float) -> float:
    """Bits of one draw of probability p."""
    return 0.0 if p in (0.0, 1.0) else -p * log2(p) - (1 - p) * log2(1 - p)
