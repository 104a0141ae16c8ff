"""Adjusting masks while a network trains: when, how much, which layers, and the swap itself.

FedTiny (specification, section 3.5) and its kin: every `every` rounds some layers exchange kept weights for pruned ones. The
smallest magnitude leaves, the largest gradient enters, and no layer ever changes its number of kept weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from math import ceil, cos, floor, pi

import torch
from torch import Tensor

from fedsim.core import keys, masks
from fedsim.core.masks import rank
from fedsim.core.tree import Tree
from fedsim.nn.layers.input_gate import GATES_MODULE
from fedsim.nn.net import Net


def due(r: int, every: int, stop: int) -> bool:
    """Whether round `r`, counted from 1, adjusts. ValueError where `every` is below 1."""
    if every < 1:
        raise ValueError(f"an adjustment every {every} rounds; at least 1")
    return r % every == 0 and r <= stop


def moves(kept: int, size: int, alpha: float, r: int, stop: int, up: bool = False) -> int:
    """a_t^l = floor(alpha (1 + cos(pi r / R_stop)) n_l), rounded `up` on wish, at most what is kept and what is pruned."""
    share = alpha * (1 + cos(pi * r / stop)) * kept
    return min(ceil(share - 1e-9) if up else floor(share + 1e-9), kept, size - kept)


def falling_density(r: int, begin: int, end: int, first: float, last: float) -> float:
    """d_t = d_f + (d_0 - d_f) (1 - (r - r_0) / (r_1 - r_0))^3: `first` up to round `begin`, `last` from round `end` on.

    Zhu and Gupta 2017, arXiv:1710.01878, equation 1, in densities.

    >>> [falling_density(r, 10, 20, 1.0, 0.5) for r in (5, 10, 15, 20, 25)]
    [1.0, 1.0, 0.5625, 0.5, 0.5]
    """
    done = min(max((r - begin) / (end - begin), 0.0), 1.0)
    return last + (first - last) * (1 - done) ** 3


def groups(layers: Sequence[str], count: int) -> list[list[str]]:
    """The layers, in network order, as `count` contiguous groups whose lengths differ by at most one, longer ones first.

    No group is empty: there are fewer where there are fewer layers.
    """
    if not layers:
        raise ValueError("no layer is left to be pruned: the first one stays dense, and others may be left out")
    count = min(count, len(layers))
    each, rest = divmod(len(layers), count)
    ends = accumulate((each + (i < rest) for i in range(count)), initial=0)
    return [list(layers[begin:end]) for begin, end in pairwise(ends)]


def stages(layers: Sequence[str]) -> list[list[str]]:
    """The layers by the part of the network they stand in ("layer1", "layer2" …); a gate in its convolution's; a part of one
    layer joins the part before it."""
    parts: dict[str, list[str]] = {}
    for layer in layers:
        parts.setdefault(layer.removeprefix(f"{GATES_MODULE}.").partition(".")[0], []).append(layer)
    large = [part for part, members in parts.items() if len(members) > 1]
    if len(large) < 2:
        raise ValueError(f"no stages in a model of {', '.join(parts)}: at least two of its parts have several maskable layers")
    found: list[list[str]] = []
    for part, members in parts.items():
        if part in large or not found:
            found.append(members)
        else:
            found[-1] += members
    if found[0] and len(found) > len(large):  # a single layer before the first stage belongs to it
        found[0:2] = [found[0] + found[1]]
    return found


def blocks(layers: Sequence[str], how: int | str) -> list[list[str]]:
    """The layers in so many groups; by "stages"; every "layer" by itself; or "all" at once. ValueError for a model without stages."""
    if how == "stages":
        return stages(layers)
    return groups(layers, {"layer": len(layers), "all": 1}.get(str(how), int(how) if isinstance(how, int) else 1))


def turn(r: int, every: int, count: int, order: str = "backward") -> int:
    """The block that round `r` adjusts, 1 nearest the input: from the output to the input or "forward", and again from the start."""
    before = (r // every - 1) % count  # adjustments before this one
    return count - before if order == "backward" else before + 1


def trainable(net: Net, layers: Sequence[str]) -> list[str]:
    """Those of the layers whose masks may move: what grew in a layer that is frozen would stay 0."""
    return [layer for layer in layers if keys.weight(layer) not in net.frozen]


def moving(shared: Tree, layers: Sequence[str], alpha: float, r: int, stop: int, up: bool = False) -> dict[str, int]:
    """`moves` of each of the layers, of those that move any."""
    held = {layer: shared[keys.mask(layer)] for layer in layers}
    found = {layer: moves(masks.count(mask), mask.numel(), alpha, r, stop, up) for layer, mask in held.items()}
    return {layer: k for layer, k in found.items() if k}


def votes(index: Tensor, value: Tensor, weight: Tensor, size: int) -> Tensor:
    """(N,) float64: sum over clients of weight_k · value_k at index_k, 0 where nobody voted; index and value (K, a), weight (K,).

    A client names each position once, so that adding client after client gives the same sum on every machine.
    """
    total = torch.zeros(size, dtype=torch.float64, device=value.device)
    for places, values, share in zip(index.long(), value.double(), weight.double(), strict=True):
        total[places] += share * values
    return total


def swap(mask: Tensor, w: Tensor, score: Tensor, k: int, leaving: Tensor | None = None, regrow: bool = False) -> tuple[Tensor, Tensor, int]:
    """(mask, w, moved): the `k` pruned positions of largest |score| enter as 0, as many kept ones of smallest |w| leave.

    Only positions pruned before can enter, so that none both enters and leaves; a score of 0 is no vote, and fewer votes than
    `k` move fewer on both sides. leaving (k,): kept positions that leave in their place, in this order.

    With `regrow` the smallest leave first, and then any position that is not kept may enter, those that have just left too (RigL). Then
    `k` always enter, at most as many as are kept and as there are pruned ones, and `moved` counts those that were pruned before.

    >>> w, g = torch.tensor([5, 4, 0.1, 0.2, 0, 0]), torch.tensor([0.0, 0, 9, 0, 1, 2])
    >>> swap(w != 0, w, g, k=2)[0].int(), swap(w != 0, w, g, k=2, regrow=True)[0].int()
    (tensor([1, 1, 0, 0, 1, 1], dtype=torch.int32), tensor([1, 1, 1, 0, 0, 1], dtype=torch.int32))
    """
    scores, weights, kept = score.flatten().abs(), w.flatten(), mask.flatten()
    held = kept.nonzero().flatten()
    after = kept.clone()
    if regrow:
        k = min(k, len(held), len(kept) - len(held))
        dropped = held[rank(-weights[held].abs())[:k]]
        after[dropped] = False
        free = (~after).nonzero().flatten()
        grown = free[rank(scores[free])[:k]]
    else:
        voted = (~kept & ~(scores <= 0)).nonzero().flatten()  # also what is no number, which rank refuses
        grown = voted[rank(scores[voted])[:k]]
        dropped = held[rank(-weights[held].abs())[: len(grown)]] if leaving is None else leaving[: len(grown)]
        grown = grown[: len(dropped)]
        after[dropped] = False
    after[grown] = True
    moved = weights.clone()
    moved[grown], moved[dropped] = 0.0, 0.0
    return after.view(mask.shape), moved.view(w.shape), masks.count(~kept[grown])


def exchanged(
    shared: Tree,
    scores: Mapping[str, Tensor],
    moves: Mapping[str, int],
    leaving: Mapping[str, Tensor] | None = None,
    regrow: bool = False,
) -> tuple[Tree, int]:
    """`shared` after every layer in `moves` exchanged that many weights, and how many moved; see `swap`.

    scores: layer -> score (N,) or of the weight's shape. ValueError for one that is not finite.
    """
    changed, total = {}, 0
    for layer, k in moves.items():
        mask, w = keys.mask(layer), keys.weight(layer)
        if not bool(scores[layer].isfinite().all()):
            raise ValueError(f"the clients' gradients of layer {layer!r} are not finite; a lower train.lr may help")
        changed[mask], changed[w], moved = swap(shared[mask], shared[w], scores[layer], k, (leaving or {}).get(layer), regrow)
        total += moved
    return shared | changed, total


def swapped(
    shared: Tree, each: Tree, moves: Mapping[str, int], weight: Tensor, leaving: Mapping[str, Tensor] | None = None
) -> tuple[Tree, int]:
    """`shared` after every layer in `moves` exchanged its weights by the clients' votes, and how many moved.

    each: top/index/LAYER and top/value/LAYER (K, a), a row per client; weight (K,), its share of a vote; leaving: what leaves, where
    that is not the smallest.
    """
    scores = {}
    for layer in moves:
        index, value = each[keys.top_index(layer)], each[keys.top_value(layer)]
        scores[layer] = votes(index, value, weight, shared[keys.weight(layer)].numel())
    return exchanged(shared, scores, moves, leaving)
