"""Dropout draws by a key: the same on every fleet and in every pack, and otherwise for every step, client, round, layer and use."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from two_clients import SIZES, population

from fedsim.core import keys, rng
from fedsim.core.activation_pruning import ActivationPruning
from fedsim.core.keys import GATE
from fedsim.core.types import Batch, Feed, LocalTraining
from fedsim.federated import pretraining
from fedsim.federated.client_work import Statistics, Train
from fedsim.fleet import packed, serial
from fedsim.fleet.cuda_graph import fleet as cuda_graph
from fedsim.fleet.messages import Pack, WorkerContext, WorkOrder
from fedsim.nn.net import Net
from fedsim.nn.profiler import profile

AXES = {nn.Dropout1d: 3, nn.Dropout2d: 4}
KINDS = [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout]
FLEETS = {"serial": serial, "packed": packed, "cuda_graph": cuda_graph}


class Alone(nn.Module):
    """A dropout layer behind a weight of 1, used so often."""

    def __init__(self, drop: nn.Module, uses: int = 1) -> None:
        super().__init__()
        self.scale, self.drop, self.uses = nn.Parameter(torch.ones(())), drop, uses

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.drop(x * self.scale) for _ in range(self.uses)])


class Again(nn.Module):
    """Its middle, used so often, is computed a second time in the backward pass, if it should be."""

    def __init__(self, again: bool, uses: int = 1) -> None:
        super().__init__()
        self.first, self.out, self.again, self.uses = nn.Linear(9, 8), nn.Linear(8, 4), again, uses
        self.middle = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 8), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(self.uses):
            x = checkpoint(self.middle, x, use_reentrant=False) if self.again else self.middle(x)
        return self.out(x)


class Fixed(nn.Sequential):
    """Always in evaluation mode, as a part that is not trained."""

    def train(self, mode: bool = True) -> Fixed:
        return super().train(False)


class Small(nn.Module):
    """Two convolutions and a classifier, with dropout behind each of them; one layer is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3), nn.Linear(8 * 16, 4)
        self.norm, self.channels, self.drop = nn.BatchNorm2d(8), nn.Dropout2d(0.4), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(F.relu(self.first(x)))
        return self.out(self.drop(torch.flatten(self.channels(F.relu(self.norm(self.second(x)))), 1)))


def batch(x: Tensor, key: int | None = 0, t: int = 0, feed: int = 0, real: Tensor | None = None) -> Batch:
    held = None if key is None else rng.key(key)
    return Batch(x, torch.arange(len(x)) % 4, real, torch.tensor(t), torch.tensor(9), feed, held)


def dropped(net: Net, given: Batch) -> Tensor:
    return net(net.initial, given.x, True, draws=given)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_values_are_torchs(kind, p) -> None:
    """The same set of values as torch's layer gives, in the same share, kept or dropped for as many entries together."""
    torch.manual_seed(0)
    layer, x = kind(p), torch.full((40, 50, 3, 3, 2)[: AXES.get(kind, 5)], 0.7)
    found, right = dropped(Net(Alone(layer)), batch(x))[0], layer(x)
    values = right.unique()
    assert torch.allclose(found.unique(), values)
    high, share = (part == part.max() for part in (found, right)), 1 - p
    mine, theirs = (float(part.float().mean()) for part in high)
    assert abs(mine - theirs) < 0.06
    if 0 < p < 1:
        assert abs(mine - share) < 0.03
        together = found.flatten(2).std(-1) < 1e-6
        assert together.all() == (kind not in (nn.Dropout, nn.AlphaDropout))


@pytest.mark.parametrize(("kind", "shape"), [(nn.Dropout1d, (30, 40)), (nn.Dropout3d, (30, 4, 5, 6)), (nn.Dropout2d, (30, 4, 5))])
@pytest.mark.filterwarnings("ignore:dropout2d")
def test_channels_of_smaller_inputs_are_those_that_torch_takes(kind, shape) -> None:
    x = torch.ones(shape)
    for y in (dropped(Net(Alone(kind(0.5))), batch(x))[0], kind(0.5)(x)):
        assert (y.flatten(2 if kind is nn.Dropout2d else 1).std(-1) == 0).all()
        assert 0 < int((y != 0).sum()) < y.numel()


def test_evaluation_keeps_all_and_inplace_overwrites() -> None:
    net, x = Net(Alone(nn.Dropout(0.5))), torch.randn(4, 9)
    assert torch.equal(net(net.initial, x)[0][0], x)
    over = Net(nn.Sequential(nn.Linear(9, 9), nn.Dropout(0.5, inplace=True)))
    assert torch.equal(dropped(over, batch(x)), F.linear(x, *over.initial.values()) * (dropped(over, batch(x)) != 0) * 2)


def test_every_step_client_feed_layer_and_use_draws_otherwise() -> None:
    x = torch.ones(8, 64)
    net, other = Net(Alone(nn.Dropout(0.5), uses=2)), Net(nn.Sequential(Alone(nn.Dropout(0.5))))
    given = batch(x)
    seen = [*dropped(net, given), *dropped(other, given)]
    seen += [dropped(net, one)[0] for one in (batch(x, key=1), batch(x, t=1), batch(x, feed=1))]
    assert all(0.3 < float((one == two).float().mean()) < 0.7 for i, one in enumerate(seen) for two in seen[:i])
    assert all(0.3 < float((one == two).float().mean()) < 0.7 for one, two in pairwise(seen[0]))  # images
    assert torch.equal(dropped(net, given), dropped(net, given))


def test_an_image_draws_the_same_wherever_a_batch_ends() -> None:
    torch.manual_seed(0)
    net, x = Net(Small().double()).to("cpu", torch.float64), torch.randn(5, 3, 8, 8, dtype=torch.float64)
    real = torch.tensor([1.0, 1, 1, 0, 0], dtype=torch.float64)
    short, padded = batch(x[:3]), batch(x, real=real)
    for one, other in zip(net.gradient(net.initial, short)[:3], net.under_vmap().gradient(net.initial, padded)[:3], strict=True):
        for mine, right in zip(*[part.values() if isinstance(part, dict) else [part] for part in (one, other)], strict=True):
            assert torch.allclose(mine, right)


def carried(net: Net, work: Train | Statistics, engine, packs: list[list[int]], r: int = 1, calls: int = 0) -> dict[str, Tensor]:
    site = WorkerContext(net, population(8), 0)
    order = WorkOrder(work, net, net.initial, r, sum(SIZES))
    totals = []
    with torch.no_grad():
        for pack in packs:
            answer = engine.carry_out(order, Pack(pack, {}, [None] * len(pack), [[calls] * len(pack), [0] * len(pack)]), site)
            totals.append(answer.total.value())
    return {key: sum(total[key] for total in totals) for key in totals[0]}


@pytest.mark.parametrize("work", [Train, Statistics])
def test_fleets_and_packs_draw_the_same(work) -> None:
    torch.manual_seed(0)
    net, feed = Net(Small()), Feed("train", epochs=2, batch=2, augment=False)
    made = Train((feed,), lr=0.5) if work is Train else Statistics((feed,), 0.5)
    right = carried(net, made, serial, [[0, 1]])
    for engine in FLEETS.values():
        for packs in ([[0, 1]], [[0], [1]]):
            found = carried(net, made, engine, packs)
            assert all(torch.allclose(found[key], value, atol=1e-4, rtol=1e-4) for key, value in right.items())
    again = carried(net, made, serial, [[0], [1]])
    assert all(torch.equal(value, again[key]) for key, value in right.items())
    for other in ({"r": 2}, {"calls": 1}):  # each client sees all its images in one batch, so that only the draws differ
        whole = replace(made, feeds=(Feed("train", epochs=1, batch=8, augment=False),))
        one, two = (carried(net, whole, serial, [[0, 1]], **change) for change in ({}, other))
        assert not all(torch.allclose(one[key], value, atol=1e-4) for key, value in two.items())


@pytest.mark.parametrize("masked", [False, True])
def test_closed_channels_draw_as_if_they_were_there(masked) -> None:
    """Under a hard gate, with the compact gradient or without, and under vmap."""
    torch.manual_seed(0)
    net, x = Net(Small().double()).to("cpu", torch.float64), torch.randn(5, 3, 8, 8, dtype=torch.float64)
    gate = torch.arange(net.channels.n) % 3 != 0
    mask = {keys.mask("second"): torch.rand(8, 6, 3, 3) < 0.5} if masked else {}
    tree, given = net.initial | {GATE: gate} | mask, batch(x)
    loss, gradient, _, _ = net.gradient(tree, given, compact=True)
    right_loss, right, _, _ = net.under_vmap().gradient(tree, given)
    assert torch.allclose(loss, right_loss)
    assert all(torch.allclose(gradient[key], value) for key, value in right.items())
    soft, whole = net.initial | {GATE: gate.double()} | mask, net.gradient(net.initial | mask, given)[0]
    assert not torch.allclose(loss, whole)
    assert torch.allclose(net(tree, x)[0], net.under_vmap()(tree, x)[0])  # in evaluation closed channels are cut out
    assert soft[GATE].sum() == gate.sum()


def test_a_batch_without_a_key_is_refused_by_name() -> None:
    net = Net(Small())
    with pytest.raises(ValueError, match=r"drop: dropout draws by the key of a batch.*draws=batch.*key=sent\.key"):
        net.gradient(net.initial, batch(torch.randn(2, 3, 8, 8), key=None))


def test_the_second_derivative_is_of_the_same_draws() -> None:
    torch.manual_seed(0)
    net, x = Net(Small().double()).to("cpu", torch.float64), torch.randn(5, 3, 8, 8, dtype=torch.float64)
    given, along = batch(x), {key: torch.randn_like(net.initial[key]) for key in net.weights}
    found = net.hessian_vector(net.initial, given, along)
    step = 1e-6
    ahead, behind = (
        net.gradient(net.initial | {key: net.initial[key] + sign * step * value for key, value in along.items()}, given)[1]
        for sign in (1, -1)
    )
    assert all(torch.allclose(value, (ahead[key] - behind[key]) / (2 * step), atol=1e-4) for key, value in found.items())


def test_the_server_draws_by_the_step() -> None:
    """Pretraining on public images gives its batches one key."""
    found = list(pretraining.batches(_Setting(), population(8).train, 2))
    assert all(one.key is not None and torch.equal(one.key, found[0].key) for one in found)
    assert [int(one.t) for one in found] == list(range(len(found)))


class _Setting:
    net, seed, train = Net(Small()), 0, LocalTraining(batch=3)


@pytest.mark.parametrize(("layer", "factors"), [(nn.Dropout(0.5), 4 * 6 * 6), (nn.Dropout2d(0.5), 4), (nn.Dropout(0.0), 0)])
@pytest.mark.parametrize("keep", [None, ActivationPruning(0.5)])
def test_the_profile_counts_a_factor_for_each_entry_or_channel(layer, factors, keep) -> None:
    def network(middle: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), middle, nn.Flatten(), nn.Linear(144, 4))

    with_it, without = (profile(network(middle), (3, 8, 8), keep).activations for middle in (layer, nn.Identity()))
    assert with_it - without == 4 * factors


def test_a_part_that_is_computed_again_in_the_backward_pass_draws_the_same() -> None:
    torch.manual_seed(0)
    plain = Again(again=False)
    other = Again(again=True)
    other.load_state_dict(plain.state_dict())
    given = batch(torch.randn(6, 9))
    (loss, right, _, _), (mine, found, _, _) = (net.gradient(net.initial, given) for net in (Net(plain), Net(other)))
    assert torch.equal(loss, mine)
    assert all(torch.allclose(found[key], value) for key, value in right.items())


def test_a_layer_that_draws_twice_where_a_part_is_computed_again_is_refused() -> None:
    net = Net(Again(again=True, uses=2))
    with pytest.raises(ValueError, match=r"middle\.\d: this dropout layer is called 2 times in a forward of which the backward pass"):
        net.gradient(net.initial, batch(torch.randn(6, 9)))


def test_a_part_that_stays_in_evaluation_mode_drops_nothing() -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(9, 8), Fixed(nn.Dropout(0.5)), nn.Linear(8, 4)), torch.randn(6, 9)
    assert torch.equal(dropped(Net(module), batch(x)), module.train()(x))
