"""Bytes that a client holds while it trains, from plain numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet

from fedsim.core.activation_pruning import bits
from fedsim.costs.flops import layers_named, ones
from fedsim.costs.profile import DENSE, VALUE_BYTES, Breakdown, KeptCounts, ModelProfile, positions_bytes

COPIED = 1  # tensor of the size of a convolution's weight that torch's kernels make on a CPU beside the gradient: one in their own order
ACTIVATIONS = ("activations", "signs")  # terms of what is saved for the backward pass of a batch
TERMS = ("weights", "positions", "gradients", "dense_gradient", "optimiser", "top", "personal", "beside", *ACTIVATIONS)
REMADE = 2  # tensors of a normalised weight's size that its backward pass makes beside its gradient


def position_bytes(model_profile: ModelProfile, kept: KeptCounts) -> int:
    """I: where the kept weights stand, for each masked layer the cheaper of an index list and a bit per weight."""
    ones(model_profile, kept)
    return sum(positions_bytes(kept[a.name], a.weights) for a in model_profile.layers if a.name in kept)


# ---- memory
def client_memory(
    model_profile: ModelProfile,
    kept: KeptCounts = DENSE,
    batch: int = 0,
    slots: int = 0,
    dense: Sequence[str] = (),
    at_once: bool = False,
    top: int = 0,
    personal: int = 0,
    beside: int = 0,
) -> Breakdown:
    """Bytes that the described client would hold while it trains: sparse storage, 32-bit indices or bitmasks.

    slots: values of the optimiser per parameter (SGD 0, with momentum 1, Adam 2). dense: layers whose gradient is formed at all
    positions ("*" = all), one after the other, or `at_once` where it is uploaded. top: entries of the top-k buffers (value and index).
    personal: bytes of state of its own. beside: bytes of other models that it holds meanwhile. Without the activations of the
    batch it is `client_memory(…).without(*ACTIVATIONS)`.
    """
    nnz = sum(ones(model_profile, kept).values())
    formed = [layer.weights for layer in model_profile.layers if layer.name in layers_named(model_profile, dense)]
    kept_back = saved(model_profile, batch)
    return Breakdown(
        weights=VALUE_BYTES * (nnz + model_profile.free + model_profile.buffers),
        positions=position_bytes(model_profile, kept),
        gradients=VALUE_BYTES * (nnz + model_profile.free),
        dense_gradient=VALUE_BYTES * (sum(formed) if at_once else max(formed, default=0)),
        optimiser=VALUE_BYTES * slots * (nnz + model_profile.free),
        top=2 * VALUE_BYTES * top,
        personal=personal,
        beside=beside,
        activations=kept_back["caches"] + kept_back["others"],
        signs=kept_back["signs"],
    )


def executed_memory(
    model_profile: ModelProfile, batch: int, masked: Sequence[str] | Mapping[str, int] = (), slots: int = 0, pack: int = 1
) -> Breakdown:
    """Bytes that this program holds for a pack of clients in one step of masked dense training, in float32.

    masked: layers that have a mask ("*" = all), which costs a byte per weight and the product of mask and weight; given with their
    kept weights, where inputs are pruned: there a step works with the kept values, which cost an index each, and their gradients.
    """
    names = layers_named(model_profile, list(masked))
    hidden = sum(layer.weights for layer in model_profile.layers if layer.name in names)
    thin = {name: masked[name] for name in names & _pruned(model_profile)} if isinstance(masked, Mapping) else {}
    product = sum(layer.weights for layer in model_profile.layers if layer.name in names - model_profile.normalised - thin.keys())
    held = {
        "weights": VALUE_BYTES * (model_profile.parameters + model_profile.buffers),
        "optimiser": VALUE_BYTES * slots * model_profile.parameters,
        "masks": hidden + VALUE_BYTES * sum(thin.values()),
    }
    effective = product + sum(thin.values())
    end = Breakdown(
        gradients=VALUE_BYTES * model_profile.parameters,
        effective=VALUE_BYTES * effective,
        activations=0,
        transient=_masking(model_profile, names - model_profile.normalised, thin),
    )
    highest = max((*_moments(model_profile, batch, effective, thin), end), key=lambda terms: terms.total)
    return Breakdown({name: pack * value for name, value in (held | highest).items()})


def _pruned(model_profile: ModelProfile) -> set[str]:
    """Layers whose inputs are pruned: none, or all but the first."""
    if model_profile.keep is None:
        return set()
    return {layer.name for layer in model_profile.layers[1:] if model_profile.keep.layers == "all" or len(layer.shape) > 2}


def _moments(model_profile: ModelProfile, batch: int, product: int, thin: KeptCounts) -> Iterator[Breakdown]:
    """What a step holds beside its state when its backward pass stands at each module."""
    layers, formed = {layer.name: layer for layer in model_profile.layers}, 0
    for moment in reversed(model_profile.moments):
        layer = layers.get(moment.layer)
        mine, copied = (layer.weights, len(layer.shape) > 2) if layer else (0, False)
        formed += thin.get(moment.layer, mine) + moment.free
        kept = _saved(model_profile, batch, moment.activations, moment.caches, moment.signs)
        made = (REMADE * (moment.layer in model_profile.normalised or moment.layer in thin) + COPIED * copied) * mine
        if moment.layer in thin:  # to take its gradient at the kept positions, as 64-bit integers; a linear map's gradient is copied first
            made = max(made, (2 - copied) * mine + 2 * thin[moment.layer])
        beside = batch * moment.transient + VALUE_BYTES * made
        yield Breakdown(gradients=VALUE_BYTES * formed, effective=VALUE_BYTES * product, activations=kept.total, transient=beside)


def _masking(model_profile: ModelProfile, masked: AbstractSet[str], thin: KeptCounts) -> int:
    """Bytes beside the gradients while these are masked, layer after layer: a second tensor for every layer, and one mask as numbers.

    For layers in `thin`, whose gradients are of kept values alone: these values again, and one layer's positions as 64-bit integers.
    """
    spread = VALUE_BYTES * sum(thin.values()) + 2 * VALUE_BYTES * max(thin.values(), default=0)
    sizes = [layer.weights for layer in model_profile.layers if layer.name in masked - thin.keys()]
    return spread + VALUE_BYTES * (sum(sizes) + max(sizes, default=0))


def saved(model_profile: ModelProfile, batch: int) -> Breakdown:
    """Bytes that are saved for the backward pass of a batch, weights left aside: pruned inputs, signs of ReLUs, and all else."""
    return _saved(model_profile, batch, model_profile.activations, len(model_profile.caches), len(model_profile.signs))


def _saved(model_profile: ModelProfile, batch: int, activations: int, caches: int, signs: int) -> Breakdown:
    if not batch:
        return Breakdown(caches=0, signs=0, others=0)
    return Breakdown(
        caches=sum(model_profile.keep.bytes(batch * entries) for entries in model_profile.caches[:caches]) if model_profile.keep else 0,
        signs=sum(bits(batch * entries) for entries in model_profile.signs[:signs]),
        others=batch * activations + model_profile.vectors,
    )
