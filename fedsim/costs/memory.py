"""Bytes that a client holds while it trains, from plain numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from fedsim.core.activation_pruning import bits
from fedsim.costs.flops import layers_named, ones
from fedsim.costs.profile import DENSE, VALUE_BYTES, Breakdown, KeptCounts, ModelProfile, positions_bytes

COPIED = 1  # tensor of the size of a convolution's weight that torch's kernels make on a CPU beside the gradient: one in their own order
REMADE = 2  # tensors of a normalised weight's size that its backward pass makes beside its gradient


def position_bytes(anatomy: ModelProfile, kept: KeptCounts) -> int:
    """I: where the kept weights stand, for each masked layer the cheaper of an index list and a bit per weight."""
    ones(anatomy, kept)
    return sum(positions_bytes(kept[a.name], a.weights) for a in anatomy.layers if a.name in kept)


# ---- memory
def client_memory(
    anatomy: ModelProfile,
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
    batch it is `memory(…).without("activations")`.
    """
    nnz = sum(ones(anatomy, kept).values())
    formed = [layer.weights for layer in anatomy.layers if layer.name in layers_named(anatomy, dense)]
    return Breakdown(
        weights=VALUE_BYTES * (nnz + anatomy.free + anatomy.buffers),
        positions=position_bytes(anatomy, kept),
        gradients=VALUE_BYTES * (nnz + anatomy.free),
        dense_gradient=VALUE_BYTES * (sum(formed) if at_once else max(formed, default=0)),
        optimiser=VALUE_BYTES * slots * (nnz + anatomy.free),
        top=2 * VALUE_BYTES * top,
        personal=personal,
        beside=beside,
        activations=saved(anatomy, batch).total,
    )


def executed_memory(
    anatomy: ModelProfile, batch: int, masked: Sequence[str] | Mapping[str, int] = (), slots: int = 0, pack: int = 1
) -> Breakdown:
    """Bytes that this program holds for a pack of clients in one step of masked dense training, in float32.

    masked: layers that have a mask ("*" = all), which costs a byte per weight and the product of mask and weight; given with their
    kept weights, where inputs are pruned: there a step works with the kept values, which cost an index each, and their gradients.
    """
    names = layers_named(anatomy, list(masked))
    hidden = sum(layer.weights for layer in anatomy.layers if layer.name in names)
    thin = {name: masked[name] for name in names & _pruned(anatomy)} if isinstance(masked, Mapping) else {}
    product = sum(layer.weights for layer in anatomy.layers if layer.name in names - anatomy.normalised - thin.keys())
    held = {
        "weights": VALUE_BYTES * (anatomy.parameters + anatomy.buffers),
        "optimiser": VALUE_BYTES * slots * anatomy.parameters,
        "masks": hidden + VALUE_BYTES * sum(thin.values()),
    }
    highest = max(_moments(anatomy, batch, product + sum(thin.values()), thin), key=lambda terms: terms.total)
    return Breakdown({name: pack * value for name, value in (held | highest).items()})


def _pruned(anatomy: ModelProfile) -> set[str]:
    """Layers whose inputs are pruned: none, or all but the first."""
    if anatomy.keep is None:
        return set()
    return {layer.name for layer in anatomy.layers[1:] if anatomy.keep.layers == "all" or len(layer.shape) > 2}


def _moments(anatomy: ModelProfile, batch: int, product: int, thin: KeptCounts) -> Iterator[Breakdown]:
    """What a step holds beside its state when its backward pass stands at each module, and when its gradients are masked."""
    layers, formed = {layer.name: layer for layer in anatomy.layers}, 0
    for moment in reversed(anatomy.moments):
        layer = layers.get(moment.layer)
        mine, copied = (layer.weights, len(layer.shape) > 2) if layer else (0, False)
        formed += thin.get(moment.layer, mine) + moment.free
        kept = _saved(anatomy, batch, moment.activations, moment.caches, moment.signs)
        made = REMADE * (moment.layer in anatomy.normalised or moment.layer in thin) + COPIED * copied
        beside = batch * moment.transient + VALUE_BYTES * made * mine
        yield Breakdown(gradients=VALUE_BYTES * formed, effective=VALUE_BYTES * product, activations=kept.total, transient=beside)
    yield Breakdown(gradients=VALUE_BYTES * anatomy.parameters, effective=VALUE_BYTES * product, activations=0, transient=0)


def saved(anatomy: ModelProfile, batch: int) -> Breakdown:
    """Bytes that are saved for the backward pass of a batch, weights left aside: pruned inputs, signs of ReLUs, and all else."""
    return _saved(anatomy, batch, anatomy.activations, len(anatomy.caches), len(anatomy.signs))


def _saved(anatomy: ModelProfile, batch: int, activations: int, caches: int, signs: int) -> Breakdown:
    if not batch:
        return Breakdown(caches=0, signs=0, others=0)
    return Breakdown(
        caches=sum(anatomy.keep.bytes(batch * entries) for entries in anatomy.caches[:caches]) if anatomy.keep else 0,
        signs=sum(bits(batch * entries) for entries in anatomy.signs[:signs]),
        others=batch * activations + anatomy.vectors,
    )
