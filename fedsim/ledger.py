"""The ledger: density, FLOPs, model size and memory from plain numbers (specs: metrics, sections 2 to 5).

A multiply-add counts as two FLOPs, a backward pass as two forward passes. Masks are counted, not zeros: `kept` maps the name of
a masked layer to the number of ones in its mask; a layer that is not in `kept` is dense. Sums are handed out with their terms.

Symbols of the formulas: n all conv and linear weights, nnz kept ones, u parameters that are never masked, b running statistics;
f_D and f_S forward FLOPs of one image, dense and sparse.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log2
from types import MappingProxyType

from fedsim.keep import Keep, bits

VALUE = 4  # bytes of a float32
NORMALISING = 5  # operations for each entry of a normalised weight
COPIED = 1  # tensor of the size of a convolution's weight that torch's kernels make on a CPU beside the gradient: one in their own order
REMADE = 2  # tensors of a normalised weight's size that its backward pass makes beside its gradient
CHARGES = ("train", "forward", "inputs")
ENCODINGS = ("dense", "bitmask", "coordinate", "csr32", "csr16", "entropy", "affine8")

Kept = Mapping[str, int]
"""Ones in the mask of each masked layer: {"layer1.0.conv1": 1843}."""

DENSE: Kept = MappingProxyType({})


@dataclass(frozen=True)
class Layer:
    """A convolution or a linear map."""

    name: str  # "layer1.0.conv1" has the weight "w/layer1.0.conv1.weight"
    weights: int
    flops: int  # forward, one image, dense
    shape: tuple[int, ...]  # of its weight, outputs first
    positions: int  # output positions of one image, H'W'; uses of the weights


@dataclass(frozen=True)
class Moment:
    """A step where the backward pass stands at one module."""

    activations: int  # bytes per image that are saved up to it
    caches: int  # caches that are
    signs: int  # ReLUs' bits that are
    transient: int  # bytes per image of gradients and restored inputs beside them
    layer: str = ""  # it is a convolution or a linear map, whose weight's gradient is formed now
    free: int = 0  # other parameters whose gradient is


@dataclass(frozen=True)
class Anatomy:
    """What the ledger needs to know of a model."""

    layers: tuple[Layer, ...]  # conv and linear, in state_dict order
    free: int  # u: parameters that are never masked (biases, scale and shift of norms)
    buffers: int  # b: running means and variances
    activations: int  # bytes saved for backward per image, float32
    vectors: int = 0  # bytes saved for backward per batch, whatever its size (the channel statistics of batch norms)
    keep: Keep | None = None  # how inputs of layers are pruned before they are saved
    caches: tuple[int, ...] = ()  # entries per image of every input that is; not in `activations`
    signs: tuple[int, ...] = ()  # entries per image of every ReLU that saves a bit each; not in `activations`
    normalised: frozenset[str] = frozenset()  # layers whose weight in use is made anew in every pass
    moments: tuple[Moment, ...] = ()  # of a backward pass, in the order of the forward pass

    @property
    def weights(self) -> int:
        """n, all conv and linear weights."""
        return sum(layer.weights for layer in self.layers)

    @property
    def parameters(self) -> int:
        """n + u."""
        return self.weights + self.free


class Terms(dict[str, int]):
    """The terms of a sum, by name."""

    @property
    def total(self) -> int:
        return sum(self.values())

    def __add__(self, other: Mapping[str, int]) -> Terms:
        """Term by term; a name that only one of them has is kept."""
        return Terms({name: self.get(name, 0) + other.get(name, 0) for name in {**self, **other}})

    def without(self, *names: str) -> Terms:
        return Terms({name: value for name, value in self.items() if name not in names})


# ---- density


def ones(anatomy: Anatomy, kept: Kept) -> dict[str, int]:
    """Kept weights of every layer, dense ones included; ValueError for a layer that is unknown or cannot keep that many."""
    sizes = {layer.name: layer.weights for layer in anatomy.layers}
    for name, count in kept.items():
        if name not in sizes:
            raise ValueError(f"no layer {name!r} to count; the model has {', '.join(sizes)}")
        if not 0 <= count <= sizes[name]:
            raise ValueError(f"layer {name!r} keeps {count} weights; it has {sizes[name]}")
    return {**sizes, **kept}


def density(anatomy: Anatomy, kept: Kept) -> float:
    """The whole density: kept over all conv and linear weights, layers without a mask counted as kept."""
    return sum(ones(anatomy, kept).values()) / anatomy.weights


def density_all(anatomy: Anatomy, kept: Kept) -> float:
    """Kept over all parameters: (nnz + u) / (n + u)."""
    return (sum(ones(anatomy, kept).values()) + anatomy.free) / anatomy.parameters


def density_maskable(anatomy: Anatomy, kept: Kept) -> float:
    """Kept over all weights of the masked layers; 1 where nothing is masked."""
    whole = sum(layer.weights for layer in anatomy.layers if layer.name in kept)
    return sum(kept.values()) / whole if whole else 1.0


def densities(anatomy: Anatomy, kept: Kept) -> dict[str, float]:
    """Kept share of every layer."""
    counts = ones(anatomy, kept)
    return {layer.name: counts[layer.name] / layer.weights for layer in anatomy.layers}


# ---- FLOPs


def forward_flops(anatomy: Anatomy, kept: Kept = DENSE) -> int:
    """f_S of one image; f_D without `kept`. The sum of d_l f_l, which is not d f_D."""
    return sum(layer_flops(anatomy, kept).values())


def layer_flops(anatomy: Anatomy, kept: Kept = DENSE) -> dict[str, int]:
    """d_l f_l of every layer, exactly: 2 · ones · positions."""
    counts = ones(anatomy, kept)
    return {layer.name: 2 * counts[layer.name] * layer.positions for layer in anatomy.layers}


def feed_flops(
    anatomy: Anatomy, images: int, kept: Kept = DENSE, charge: str = "train", dense: Sequence[str] = (), dense_images: int | None = None
) -> Terms:
    """What `images` images cost (an image seen in two epochs counts twice).

    forward f_S; with charge "inputs" backward f_S, the gradients of inputs alone; with "train" backward 2 f_S, and dense_gradient
    f_l - d_l f_l of the layers in `dense` ("*" = all), whose weight gradient is formed at all positions for `dense_images` of them
    (None: all): together 2 f_S + f_S of the others + f_D of these.
    """
    if charge not in CHARGES:
        raise ValueError(f"a feed's charge is one of {', '.join(CHARGES)}; not {charge!r}")
    sparse = layer_flops(anatomy, kept)
    terms = Terms(forward=images * sum(sparse.values()))
    if charge == "inputs":
        terms |= {"backward": terms["forward"]}
    if charge == "train":
        names = _named(anatomy, dense)
        extra = sum(layer.flops - sparse[layer.name] for layer in anatomy.layers if layer.name in names)
        terms |= {"backward": 2 * terms["forward"], "dense_gradient": extra * (images if dense_images is None else dense_images)}
    return terms


def training_flops(anatomy: Anatomy, kept: Kept = DENSE, dense: Sequence[str] = ()) -> int:
    """Of one image: 3 f_S, or 2 f_S + f_S of the others + f_D of the `dense` layers."""
    return feed_flops(anatomy, 1, kept, "train", dense).total


def normalising_flops(anatomy: Anatomy) -> int:
    """About what it takes to normalise weights once, as every step does: 5 N a filter. A line of its own, in no other figure."""
    return NORMALISING * sum(layer.weights for layer in anatomy.layers if layer.name in anatomy.normalised)


def micronet(layer: Layer, kept: float, bias: bool = True, activation: bool = True) -> tuple[float, float]:
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


def size_bits(anatomy: Anatomy, kept: Kept = DENSE, encoding: str = "bitmask") -> dict[str, float]:
    """Bits of the whole model: masked layers in that encoding, dense layers and what is never masked as float32; with their "total"."""
    ones(anatomy, kept)
    terms = {
        "masked": sum(encoded_bits(encoding, a.weights, kept[a.name], a.shape[0]) for a in anatomy.layers if a.name in kept),
        "dense": float(sum(32 * a.weights for a in anatomy.layers if a.name not in kept)),
        "free": 32.0 * (anatomy.free + anatomy.buffers),
    }
    return terms | {"total": sum(terms.values())}


def position_bytes(anatomy: Anatomy, kept: Kept) -> int:
    """I: where the kept weights stand, for each masked layer the cheaper of an index list and a bit per weight."""
    ones(anatomy, kept)
    return sum(positions(kept[a.name], a.weights) for a in anatomy.layers if a.name in kept)


def positions(kept: int, weights: int) -> int:
    """Bytes that say where the kept ones of `weights` weights stand."""
    return min(VALUE * kept, -(-weights // 8))


def _entropy(p: float) -> float:
    """Bits of one draw of probability p."""
    return 0.0 if p in (0.0, 1.0) else -p * log2(p) - (1 - p) * log2(1 - p)


# ---- memory


def memory(
    anatomy: Anatomy,
    kept: Kept = DENSE,
    batch: int = 0,
    slots: int = 0,
    dense: Sequence[str] = (),
    at_once: bool = False,
    top: int = 0,
    personal: int = 0,
    beside: int = 0,
) -> Terms:
    """Bytes that the described client would hold while it trains: sparse storage, 32-bit indices or bitmasks.

    slots: values of the optimiser per parameter (SGD 0, with momentum 1, Adam 2). dense: layers whose gradient is formed at all
    positions ("*" = all), one after the other, or `at_once` where it is uploaded. top: entries of the top-k buffers (value and index).
    personal: bytes of state of its own. beside: bytes of other models that it holds meanwhile. Without the activations of the
    batch it is `memory(…).without("activations")`.
    """
    nnz = sum(ones(anatomy, kept).values())
    formed = [layer.weights for layer in anatomy.layers if layer.name in _named(anatomy, dense)]
    return Terms(
        weights=VALUE * (nnz + anatomy.free + anatomy.buffers),
        positions=position_bytes(anatomy, kept),
        gradients=VALUE * (nnz + anatomy.free),
        dense_gradient=VALUE * (sum(formed) if at_once else max(formed, default=0)),
        optimiser=VALUE * slots * (nnz + anatomy.free),
        top=2 * VALUE * top,
        personal=personal,
        beside=beside,
        activations=saved(anatomy, batch).total,
    )


def executed(anatomy: Anatomy, batch: int, masked: Sequence[str] | Mapping[str, int] = (), slots: int = 0, pack: int = 1) -> Terms:
    """Bytes that this program holds for a pack of clients in one step of masked dense training, in float32.

    masked: layers that have a mask ("*" = all), which costs a byte per weight and the product of mask and weight; given with their
    kept weights, where inputs are pruned: there a step works with the kept values, which cost an index each, and their gradients.
    """
    names = _named(anatomy, list(masked))
    hidden = sum(layer.weights for layer in anatomy.layers if layer.name in names)
    thin = {name: masked[name] for name in names & _pruned(anatomy)} if isinstance(masked, Mapping) else {}
    product = sum(layer.weights for layer in anatomy.layers if layer.name in names - anatomy.normalised - thin.keys())
    held = {
        "weights": VALUE * (anatomy.parameters + anatomy.buffers),
        "optimiser": VALUE * slots * anatomy.parameters,
        "masks": hidden + VALUE * sum(thin.values()),
    }
    highest = max(_moments(anatomy, batch, product + sum(thin.values()), thin), key=lambda terms: terms.total)
    return Terms({name: pack * value for name, value in (held | highest).items()})


def _pruned(anatomy: Anatomy) -> set[str]:
    """Layers whose inputs are pruned: none, or all but the first."""
    if anatomy.keep is None:
        return set()
    return {layer.name for layer in anatomy.layers[1:] if anatomy.keep.layers == "all" or len(layer.shape) > 2}


def _moments(anatomy: Anatomy, batch: int, product: int, thin: Kept) -> Iterator[Terms]:
    """What a step holds beside its state when its backward pass stands at each module, and when its gradients are masked."""
    layers, formed = {layer.name: layer for layer in anatomy.layers}, 0
    for moment in reversed(anatomy.moments):
        layer = layers.get(moment.layer)
        mine, copied = (layer.weights, len(layer.shape) > 2) if layer else (0, False)
        formed += thin.get(moment.layer, mine) + moment.free
        kept = _saved(anatomy, batch, moment.activations, moment.caches, moment.signs)
        made = REMADE * (moment.layer in anatomy.normalised or moment.layer in thin) + COPIED * copied
        beside = batch * moment.transient + VALUE * made * mine
        yield Terms(gradients=VALUE * formed, effective=VALUE * product, activations=kept.total, transient=beside)
    yield Terms(gradients=VALUE * anatomy.parameters, effective=VALUE * product, activations=0, transient=0)


def saved(anatomy: Anatomy, batch: int) -> Terms:
    """Bytes that are saved for the backward pass of a batch, weights left aside: pruned inputs, signs of ReLUs, and all else."""
    return _saved(anatomy, batch, anatomy.activations, len(anatomy.caches), len(anatomy.signs))


def _saved(anatomy: Anatomy, batch: int, activations: int, caches: int, signs: int) -> Terms:
    if not batch:
        return Terms(caches=0, signs=0, others=0)
    return Terms(
        caches=sum(anatomy.keep.bytes(batch * entries) for entries in anatomy.caches[:caches]) if anatomy.keep else 0,
        signs=sum(bits(batch * entries) for entries in anatomy.signs[:signs]),
        others=batch * activations + anatomy.vectors,
    )


def _named(anatomy: Anatomy, names: Sequence[str]) -> set[str]:
    """The layers meant; "*" means all; ValueError for an unknown one."""
    known = [layer.name for layer in anatomy.layers]
    if "*" in names:
        return set(known)
    for name in names:
        if name not in known:
            raise ValueError(f"no layer {name!r}; the model has {', '.join(known)}")
    return set(names)
