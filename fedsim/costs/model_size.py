"""How large a model is when it is stored, in bits, and its operations as the MicroNet challenge counts them.

A bit count is for values in float32 unless the encoding says otherwise:

| encoding | bits of n weights, of which k are kept, in r rows |
|---|---|
| dense | 32 n: every weight |
| bitmask | 32 k + n: the kept weights, and 1 bit for each weight that says whether it is kept |
| coordinate | 64 k: each kept weight with a 32-bit position |
| csr32 | 64 k + 32 (r + 1): each kept weight with a 32-bit column, and a 32-bit offset where each row begins and where the last one ends |
| csr16 | 48 k + 32 (r + 1): the same with 16-bit columns |
| entropy | 32 k + n H(k / n): as bitmask, with the bits of the mask at their entropy H, the least that any code needs on average |
| affine8 | 8 k + 64: 8-bit kept weights, and a float32 scale and offset of the tensor; their positions are not stored |
"""

from __future__ import annotations

from math import log2

from fedsim.costs.flops import ones
from fedsim.costs.profile import DENSE, KeptCounts, LayerProfile, ModelProfile

ENCODINGS = ("dense", "bitmask", "coordinate", "csr32", "csr16", "entropy", "affine8")


def micronet(layer: LayerProfile, kept: float, bias: bool = True, activation: bool = True) -> tuple[float, float]:
    """(multiplications, additions) of a layer for one image, as the MicroNet challenge counts them.

    kept: weights of the layer that are kept. A kept weight is one multiplication and one addition at each output position. An activation
    adds one multiplication for each output value, a bias one addition. The first product of each output value needs no addition.
    The ledger does not use these numbers; they are for comparison with that challenge.
    """
    outputs = layer.shape[0] * layer.positions
    macs = kept * layer.positions
    return macs + outputs * activation, macs + outputs * bias - outputs


# ---- model size
def encoded_bits(encoding: str, n: int, nnz: float, rows: int = 1) -> float:
    """Bits of one tensor with `n` weights, of which `nnz` are kept, as a matrix of `rows` rows, in one of ENCODINGS.

    Raises ValueError for an unknown encoding, and where its positions have too few bits for this tensor.
    """
    if encoding not in ENCODINGS:
        raise ValueError(f"no encoding {encoding!r}; there are {', '.join(ENCODINGS)}")
    if encoding == "csr16" and n // rows >= 2**16:
        raise ValueError(f"csr16 takes rows of at most 65,535 weights; this tensor has rows of {n // rows:,}")
    if encoding in ("coordinate", "csr32") and n >= 2**31:
        raise ValueError(f"{encoding} stores positions below 2^31; this tensor has {n:,} weights")
    return {
        "dense": 32 * n,
        "bitmask": 32 * nnz + n,
        "coordinate": 64 * nnz,
        "csr32": 64 * nnz + 32 * (rows + 1),
        "csr16": 48 * nnz + 32 * (rows + 1),
        "entropy": 32 * nnz + n * _entropy(nnz / n),
        "affine8": 8 * nnz + 64,
    }[encoding]


def size_bits(model_profile: ModelProfile, kept: KeptCounts = DENSE, encoding: str = "bitmask") -> dict[str, float]:
    """Bits of the whole model, in parts and as "total".

    masked: the layers in `kept`, in that encoding. dense: the weights of the other layers, 32 bits each. free: biases, norms and other
    parameters that no mask covers, and buffers, 32 bits each.
    """
    ones(model_profile, kept)
    terms = {
        "masked": sum(encoded_bits(encoding, a.weights, kept[a.name], a.shape[0]) for a in model_profile.layers if a.name in kept),
        "dense": float(sum(32 * a.weights for a in model_profile.layers if a.name not in kept)),
        "free": 32.0 * (model_profile.free + model_profile.buffers),
    }
    return terms | {"total": sum(terms.values())}


def _entropy(p: float) -> float:
    """H(p): the entropy, in bits, of one value that is 1 with probability p and else 0."""
    return 0.0 if p in (0.0, 1.0) else -p * log2(p) - (1 - p) * log2(1 - p)
