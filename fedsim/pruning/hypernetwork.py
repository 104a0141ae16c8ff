"""Hypernetworks that produce gate logits: of a base network, and of a client's network from its embedding (specs: DWFNP, 3.2).

Input 64 L numbers, a row of 64 for each gated layer -> bidirectional GRU 64 -> 128 over the layers -> LayerNorm(256) shared by all
layers -> ReLU -> a linear map 256 -> C_l for each layer, without bias. The base's input z is fixed and orthogonal, its maps are
weight-normalised (Salimans and Kingma 2016); a client's input is learned.

Shapes: L layers, n channels, H = 128. A hypernetwork is a tree of parameters, so that it can be differentiated, averaged and sent:
"ih" (2, 3H, 64), "hh" (2, 3H, H), "ih_bias", "hh_bias" (2, 3H), for both directions; "norm", "shift" (2H,); "map" (n, 2H), and
"length" (n,) where the maps are weight-normalised.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsim.core import rng
from fedsim.core.tree import Tree

INPUT, HIDDEN = 64, 128


def fresh(widths: Sequence[int], key: Tensor, normalised: bool) -> Tree:
    """The first parameters for layers of these widths, uniform as torch draws those of GRU and Linear; `normalised` for a base."""
    n, wide = sum(widths), 3 * HIDDEN
    shapes = {"ih": (2, wide, INPUT), "hh": (2, wide, HIDDEN), "ih_bias": (2, wide), "hh_bias": (2, wide), "map": (n, 2 * HIDDEN)}
    tree = {}
    for number, (name, shape) in enumerate(shapes.items()):
        bound = (2 * HIDDEN if name == "map" else HIDDEN) ** -0.5
        tree[name] = (2 * rng.uniform(rng.fold(key, number), torch.Size(shape).numel()) - 1).view(shape) * bound
    tree |= {"norm": torch.ones(2 * HIDDEN), "shift": torch.zeros(2 * HIDDEN)}
    return tree | ({"length": tree["map"].norm(dim=1)} if normalised else {})


def orthogonal(layers: int, key: Tensor) -> Tensor:
    """(64 L,) z: the rows of the layers at right angles to each other, or the columns where L > 64."""
    drawn = rng.normal(key, layers * INPUT).view(layers, INPUT).double()
    tall = drawn if layers >= INPUT else drawn.T
    q, r = torch.linalg.qr(tall)
    q = q * r.diagonal().sign()
    return (q if layers >= INPUT else q.T).float().flatten()


def embedding(layers: int, keys: Tensor) -> Tensor:
    """(…, 64 L) standard normal first embeddings of clients with these keys."""
    return rng.normal(keys, layers * INPUT)


def flops(widths: Sequence[int]) -> int:
    """Of one forward pass for one input, by the ledger's rule: 2 for each multiplication of a map; norms and activations are left out."""
    recurrent = 2 * len(widths) * 3 * HIDDEN * (INPUT + HIDDEN)
    return 2 * (recurrent + 2 * HIDDEN * sum(widths))


def logits(net: Tree, x: Tensor, widths: Sequence[int]) -> Tensor:
    """(…, n) of inputs (…, 64 L)."""
    h = F.relu(F.layer_norm(_gru(net, x.unflatten(-1, (len(widths), INPUT))), (2 * HIDDEN,), net["norm"], net["shift"]))  # (…, L, 2H)
    maps = net["map"]
    if "length" in net:
        maps = maps * (net["length"] / maps.norm(dim=1)).unsqueeze(1)
    return torch.cat([h[..., layer, :] @ rows.T for layer, rows in enumerate(maps.split(list(widths)))], -1)


def _gru(net: Tree, x: Tensor) -> Tensor:
    """(…, L, 2H) of (…, L, 64), both directions side by side; the equations of torch.nn.GRU."""
    both = torch.stack([x, x.flip(-2)])  # (2, …, L, 64)
    lead = both.shape[1:-2]
    both = both.reshape(2, -1, x.shape[-2], INPUT)  # (2, N, L, 64)
    wide = torch.einsum("dnlc,dhc->ldnh", both, net["ih"]) + net["ih_bias"].unsqueeze(1)  # (L, 2, N, 3H)
    h = wide.new_zeros((*wide.shape[1:-1], HIDDEN))  # (2, N, H)
    turn, bias = net["hh"].transpose(1, 2), net["hh_bias"].unsqueeze(1)
    out = []
    for step in wide:
        reset_in, update_in, new_in = step.chunk(3, -1)
        reset_h, update_h, new_h = torch.baddbmm(bias, h, turn).chunk(3, -1)
        update = torch.sigmoid(update_in + update_h)
        new = torch.tanh(new_in + torch.sigmoid(reset_in + reset_h) * new_h)
        h = new + update * (h - new)
        out.append(h)
    forward, backward = torch.stack([step[0] for step in out], 1), torch.stack([step[1] for step in reversed(out)], 1)
    return torch.cat([forward, backward], -1).view(*lead, x.shape[-2], 2 * HIDDEN)
