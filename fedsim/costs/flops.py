"""FLOPs and densities of a network, from plain numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedsim.costs.profile import DENSE, Breakdown, KeptCounts, ModelProfile

NORMALISING = 5  # operations for each entry of a normalised weight
PASSES = {"train": 3, "forward": 1, "inputs": 2}  # a feed's cost -> passes, each of the FLOPs of a forward pass


# ---- density
def ones(model_profile: ModelProfile, kept: KeptCounts) -> dict[str, int]:
    """Kept weights of every layer, dense ones included; ValueError for a layer that is unknown or cannot keep that many."""
    sizes = {layer.name: layer.weights for layer in model_profile.layers}
    for name, count in kept.items():
        if name not in sizes:
            raise ValueError(f"no layer {name!r} to count; the model has {', '.join(sizes)}")
        if not 0 <= count <= sizes[name]:
            raise ValueError(f"layer {name!r} keeps {count} weights; it has {sizes[name]}")
    return {**sizes, **kept}


def density(model_profile: ModelProfile, kept: KeptCounts) -> float:
    """The whole density: kept over all conv and linear weights, layers without a mask counted as kept."""
    return sum(ones(model_profile, kept).values()) / model_profile.weights


def density_all(model_profile: ModelProfile, kept: KeptCounts) -> float:
    """Kept over all parameters: (nnz + u) / (n + u)."""
    return (sum(ones(model_profile, kept).values()) + model_profile.free) / model_profile.parameters


def density_maskable(model_profile: ModelProfile, kept: KeptCounts) -> float:
    """Kept over all weights of the masked layers; 1 where nothing is masked."""
    whole = sum(layer.weights for layer in model_profile.layers if layer.name in kept)
    return sum(kept.values()) / whole if whole else 1.0


def densities(model_profile: ModelProfile, kept: KeptCounts) -> dict[str, float]:
    """Kept share of every layer."""
    counts = ones(model_profile, kept)
    return {layer.name: counts[layer.name] / layer.weights for layer in model_profile.layers}


# ---- FLOPs
def forward_flops(model_profile: ModelProfile, kept: KeptCounts = DENSE) -> int:
    """f_S of one image; f_D without `kept`. The sum of d_l f_l, which is not d f_D."""
    return sum(layer_flops(model_profile, kept).values())


def layer_flops(model_profile: ModelProfile, kept: KeptCounts = DENSE) -> dict[str, int]:
    """d_l f_l of every layer, exactly: 2 · ones · positions."""
    counts = ones(model_profile, kept)
    return {layer.name: 2 * counts[layer.name] * layer.positions for layer in model_profile.layers}


def feed_flops(
    model_profile: ModelProfile,
    images: int,
    kept: KeptCounts = DENSE,
    cost: str = "train",
    dense: Sequence[str] = (),
    dense_images: int | None = None,
) -> Breakdown:
    """What `images` images cost (an image seen in two epochs counts twice).

    forward f_S; with cost "inputs" backward f_S, the gradients of inputs alone; with "train" backward 2 f_S, and dense_gradient
    f_l - d_l f_l of the layers in `dense` ("*" = all), whose weight gradient is formed at all positions for `dense_images` of them
    (None: all): together 2 f_S + f_S of the others + f_D of these.
    """
    if cost not in PASSES:
        raise ValueError(f"a feed's cost = {cost!r} is not known. There are: {', '.join(PASSES)}")
    sparse = layer_flops(model_profile, kept)
    terms = Breakdown(forward=images * sum(sparse.values()))
    if cost == "inputs":
        terms |= {"backward": terms["forward"]}
    if cost == "train":
        names = layers_named(model_profile, dense)
        extra = sum(layer.flops - sparse[layer.name] for layer in model_profile.layers if layer.name in names)
        terms |= {"backward": 2 * terms["forward"], "dense_gradient": extra * (images if dense_images is None else dense_images)}
    return terms


def by_density(
    model_profile: ModelProfile,
    images: int,
    kept: KeptCounts = DENSE,
    whole: KeptCounts = DENSE,
    cost: str = "train",
    dense: Sequence[str] = (),
    dense_images: int = 0,
) -> Iterator[tuple[float, int]]:
    """What `images` images cost, layer after layer, as the layer's density d and F, its FLOPs if it had no mask; what time depends on.

    whole: weights of layers that are smaller than the model's, such as after a cut. Weight gradients of the `dense` layers at all
    positions, for `dense_images` of the images, are work at density 1. The sum of d F is `feed_flops`.
    """
    passes, names = PASSES[cost], layers_named(model_profile, dense) if dense_images else ()
    for layer in model_profile.layers:
        size = whole.get(layer.name, layer.weights)
        probed = dense_images if layer.name in names else 0
        if size:
            yield kept.get(layer.name, size) / size, 2 * size * layer.positions * (passes * images - probed)
        if probed:
            yield 1.0, layer.flops * probed


def training_flops(model_profile: ModelProfile, kept: KeptCounts = DENSE, dense: Sequence[str] = ()) -> int:
    """Of one image: 3 f_S, or 2 f_S + f_S of the others + f_D of the `dense` layers."""
    return feed_flops(model_profile, 1, kept, "train", dense).total


def normalising_flops(model_profile: ModelProfile) -> int:
    """About what it takes to normalise weights once, as every step does: 5 N a filter. A line of its own, in no other figure."""
    return NORMALISING * sum(layer.weights for layer in model_profile.layers if layer.name in model_profile.normalised)


def layers_named(model_profile: ModelProfile, names: Sequence[str]) -> set[str]:
    """The layers meant; "*" means all; ValueError for an unknown one."""
    known = [layer.name for layer in model_profile.layers]
    if "*" in names:
        return set(known)
    for name in names:
        if name not in known:
            raise ValueError(f"no layer {name!r}; the model has {', '.join(known)}")
    return set(names)
