"""What the server does with its own public images, before any client takes part."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fedsim.core import keys, rng
from fedsim.core.tree import Tree, clone, under
from fedsim.core.types import Batch, Data
from fedsim.costs import flops
from fedsim.errors import BadInput
from fedsim.federated.protocol import Setting
from fedsim.nn import optim


def pretrained(setting: Setting, public: Data, epochs: int, needed: bool = True) -> Tree:
    """The model ("w/" and "buf/") after the server trained it on its public images.

    It begins with the initial model and takes the job's optimiser, batch size and rate of round 1. Images are not augmented, and
    activations are not pruned, because the server has enough memory. FedTiny (arXiv:2212.01977) begins in this way. Its FLOPs are on
    the server's bill.

    Args:
        setting: of the job: its net, seed and local training.
        public: the server's images; each epoch shows all of them once, in a new order.
        epochs: how often they are shown; 0: the initial model itself.
        needed: whether what it learns is needed; else it is charged and not trained, and the initial model is returned.

    Raises:
        BadInput: if a weight or a running statistic is no longer finite.
    """
    setting.server.charge("pretraining", flops.feed_flops(setting.model_profile, len(public) * epochs).total)
    net, rate = setting.net.without_activation_pruning(), setting.train.at(1)
    if not needed:
        return under(net.initial, keys.WEIGHTS, keys.BUFFERS)
    state = clone(net.initial)
    state |= optim.fresh(net.trained(under(state, keys.WEIGHTS)), rate.momentum, rate.optimiser)
    with torch.no_grad():
        for batch in batches(setting, public, epochs):
            _, gradient, buffers, _ = net.gradient(state, batch)
            state = net.descend(state | buffers, gradient, rate.lr, rate.momentum, rate.decay, rate.optimiser)
    trained = under(state, keys.WEIGHTS, keys.BUFFERS)
    if bad := [key for key, value in trained.items() if not bool(value.isfinite().all())]:
        raise BadInput(f"pretraining on the public images diverged ({bad[0]} is not finite): a lower train.lr may help")
    return trained


def batches(setting: Setting, public: Data, epochs: int) -> Iterator[Batch]:
    """Batches of the public images, of the job's batch size, in a new order every epoch; the last of an epoch may be smaller."""
    x, y = images(setting, public)
    orders = [rng.permutation(rng.key(setting.seed, "public", epoch), len(y)) for epoch in range(epochs)]
    parts = [part for order in orders for part in order.split(setting.train.batch)]
    steps, key = torch.tensor(len(parts), device=y.device), rng.key(setting.seed, "public draws").to(y.device)
    for t, part in enumerate(parts):
        part = part.to(y.device)
        yield Batch(x[part], y[part], None, torch.tensor(t, device=y.device), steps, key=key)


def balanced(setting: Setting, public: Data, per_class: int) -> list[Batch]:
    """Batches of at most `per_class` public images of each class, in an order drawn from the seed, for scores and not for training."""
    x, y = images(setting, public)
    order = rng.permutation(rng.key(setting.seed, "public scores"), len(y)).to(y.device)
    counts = one_hot(y[order], public.classes).cumsum(0)  # (n, classes) images of each class up to this one
    parts = order[counts.gather(1, y[order, None])[:, 0] <= per_class].split(setting.train.batch)
    steps, key = torch.arange(len(parts) + 1, device=y.device), rng.key(setting.seed, "public draws").to(y.device)
    return [Batch(x[part], y[part], None, steps[t], steps[-1], key=key) for t, part in enumerate(parts)]


def images(setting: Setting, public: Data) -> tuple[Tensor, Tensor]:
    """All public images x (n, C, H, W), normalised, in the dtype and on the device of the net's values; labels y (n,) int64 there too."""
    like = next(iter(setting.net.initial.values()))
    every = torch.arange(len(public))
    mean, std = (torch.tensor(values, dtype=like.dtype).view(-1, 1, 1) for values in (public.mean, public.std))
    x = public.images(every).to(like.dtype).div_(255).sub_(mean).div_(std)
    return x.to(like.device), public.labels(every).to(like.device)
