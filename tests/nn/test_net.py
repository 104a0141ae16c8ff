"""Net against plain torch: outputs, gradients, the SGD step, Hessian-vector products, norms over real images."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import vmap
from torch.nn import functional as F

from fedsim.core.tree import each, under
from fedsim.core.types import Batch
from fedsim.nn import optim
from fedsim.nn.loss import cross_entropy
from fedsim.nn.net import Net


def module(norm: bool = True) -> nn.Module:
    torch.manual_seed(3)
    layers = [nn.Conv2d(2, 4, 3, padding=1), *([nn.BatchNorm2d(4)] if norm else []), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)]
    return nn.Sequential(*layers).double()


def pruned(torch_net: nn.Module) -> torch.Tensor:
    """The mask under which the last layer's weights have just been set to 0."""
    mask = torch.rand(5, 144, generator=torch.Generator().manual_seed(1)) < 0.3
    with torch.no_grad():
        torch_net[4].weight.mul_(mask)
    return mask


def double(net: Net) -> Net:
    return net.to("cpu", torch.float64)


def batch(count: int = 6, seed: int = 0, real: torch.Tensor | None = None) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 2, 6, 6, generator=generator, dtype=torch.float64)
    return Batch(x, torch.randint(0, 5, (count,), generator=generator), real, torch.tensor(0), torch.tensor(1))


def fresh(net: Net) -> dict:
    return each(torch.clone, net.initial)


def test_outputs_are_the_modules_in_both_modes() -> None:
    torch_net = module()
    net, one = double(Net(torch_net)), batch()
    state = fresh(net)
    for train in (True, False):
        torch_net.train(train)
        logits, buffers = net(state, one.x, train)
        state |= buffers
        assert torch.allclose(logits, torch_net(one.x), atol=1e-12)
    assert torch.equal(torch_net[1].running_var, state["buf/1.running_var"])


@pytest.mark.parametrize("pure", [False, True])
def test_a_gradient_leaves_the_tree_as_it_was(pure) -> None:
    net = double(Net(module()))
    tree = fresh(net)
    (net.under_vmap() if pure else net).gradient(tree, batch())
    assert all(torch.equal(value, net.initial[key]) for key, value in tree.items())


def test_the_given_module_stays_as_it_was() -> None:
    torch_net = module()
    before = copy.deepcopy(torch_net.state_dict())
    net = double(Net(torch_net))
    net.descend(fresh(net), net.gradient(fresh(net), batch())[1], 0.1)
    assert all(torch.equal(value, before[key]) for key, value in torch_net.state_dict().items())


@pytest.mark.parametrize("pure", [False, True])
def test_the_gradient_is_autograds(pure) -> None:
    torch_net, one = module(), batch()
    net = double(Net(torch_net))
    net = net.under_vmap() if pure else net
    loss, gradient, buffers, _ = net.gradient(fresh(net), one)
    expected = F.cross_entropy(torch_net(one.x), one.y)
    expected.backward()
    assert torch.allclose(loss, expected)
    for name, parameter in torch_net.named_parameters():
        assert torch.allclose(gradient["w/" + name], parameter.grad, atol=1e-12)
    assert torch.allclose(buffers["buf/1.running_var"], torch_net[1].running_var, atol=1e-9)


@pytest.mark.parametrize("pure", [False, True])
def test_a_masked_gradient_is_that_of_the_masked_network(pure) -> None:
    torch_net, one = module(), batch()
    net = double(Net(torch_net))
    net = net.under_vmap() if pure else net
    mask = pruned(torch_net)
    F.cross_entropy(torch_net(one.x), one.y).backward()
    _, gradient, _, _ = net.gradient(fresh(net) | {"mask/4.weight": mask}, one)
    assert torch.allclose(gradient["w/4.weight"], torch_net[4].weight.grad * mask, atol=1e-12)
    assert torch.allclose(gradient["w/0.weight"], torch_net[0].weight.grad, atol=1e-12)


@pytest.mark.parametrize("pure", [False, True])
@pytest.mark.parametrize("wrt", ["w", None])
def test_taps_see_the_dense_gradient_of_the_effective_weight(pure, wrt) -> None:
    torch_net, one = module(), batch()
    net = double(Net(torch_net))
    net = net.under_vmap() if pure else net
    mask = pruned(torch_net)
    F.cross_entropy(torch_net(one.x), one.y).backward()
    tree = fresh(net) | {"mask/4.weight": mask}
    _, gradient, _, taps = net.gradient(tree, one, wrt=wrt, tap=lambda layer, g: {f"grad/{layer}": g.clone()}, layers=("0", "4"))
    assert torch.allclose(taps["grad/4"], torch_net[4].weight.grad, atol=1e-12)
    assert torch.allclose(taps["grad/0"], torch_net[0].weight.grad, atol=1e-12)
    assert bool(gradient) == (wrt == "w")


def test_tapped_gradients_do_not_live_together() -> None:
    torch.manual_seed(0)
    net, alive, most = double(Net(nn.Sequential(nn.Flatten(), *[nn.Linear(72, 72) for _ in range(4)], nn.Linear(72, 5)))), [], []

    def tap(layer: str, g: torch.Tensor) -> dict:
        import weakref

        alive.append(weakref.ref(g))
        most.append(sum(ref() is not None for ref in alive))
        return {f"top/{layer}": g.flatten()[:2].clone()}

    net.gradient(fresh(net), batch(), wrt=None, tap=tap, layers=("1", "2", "3", "4"))
    assert max(most) == 1


def test_an_unknown_layer_or_gate_is_named() -> None:
    net = double(Net(module()))
    with pytest.raises(ValueError, match="no layer 'conv9' to tap; the net has 0, 1, 4"):
        net.gradient(fresh(net), batch(), tap=lambda layer, g: {}, layers=("conv9",))
    with pytest.raises(ValueError, match="no soft gate 'gate/channels'"):
        net.gradient(fresh(net), batch(), wrt="gate")


@pytest.mark.parametrize("pure", [False, True])
@pytest.mark.parametrize(("lr", "momentum", "decay"), [(0.1, 0.0, 0.0), (0.05, 0.9, 0.0), (0.05, 0.9, 1e-2), (0.2, 0.0, 1e-2)])
@pytest.mark.parametrize("tensor_rate", [False, True])
def test_descend_is_torch_sgd(pure, lr, momentum, decay, tensor_rate) -> None:
    torch_net = module()
    net = double(Net(torch_net))
    net = net.under_vmap() if pure else net
    optimiser = torch.optim.SGD(torch_net.parameters(), lr, momentum, weight_decay=decay)
    state = fresh(net) | {"opt/momentum/" + key[2:]: torch.zeros_like(value) for key, value in under(net.initial, "w/").items()}
    for step in range(4):
        one = batch(seed=step)
        optimiser.zero_grad()
        F.cross_entropy(torch_net(one.x), one.y).backward()
        optimiser.step()
        _, gradient, buffers, _ = net.gradient(state, one)
        state = net.descend(state | buffers, gradient, torch.tensor(lr, dtype=torch.float64) if tensor_rate else lr, momentum, decay)
    for name, parameter in torch_net.named_parameters():
        assert torch.allclose(state["w/" + name], parameter, atol=1e-10)


@pytest.mark.parametrize("pure", [False, True])
@pytest.mark.parametrize("decay", [0.0, 1e-2])
def test_descend_is_torch_adam(pure, decay) -> None:
    torch_net = module()
    net = double(Net(torch_net))
    net = net.under_vmap() if pure else net
    optimiser = torch.optim.Adam(torch_net.parameters(), 0.01, weight_decay=decay)
    state = fresh(net) | optim.fresh(under(fresh(net), "w/"), 0.0, "adam")
    for step in range(4):
        one = batch(seed=step)
        optimiser.zero_grad()
        F.cross_entropy(torch_net(one.x), one.y).backward()
        optimiser.step()
        _, gradient, buffers, _ = net.gradient(state, one)
        state = net.descend(state | buffers, gradient, 0.01, decay=decay, optimiser="adam")
    for name, parameter in torch_net.named_parameters():
        assert torch.allclose(state["w/" + name], parameter, atol=1e-9)


def test_nothing_moves_a_pruned_weight_under_adam() -> None:
    net = double(Net(module()))
    mask = torch.rand(5, 144, generator=torch.Generator().manual_seed(1)) < 0.3
    state = fresh(net) | optim.fresh(under(fresh(net), "w/"), 0.0, "adam")
    state["w/4.weight"] = state["w/4.weight"] * mask
    for step in range(5):
        _, gradient, buffers, _ = net.gradient(state | {"mask/4.weight": mask}, batch(seed=step))
        state = net.descend(state | buffers, gradient, 0.1, decay=1e-2, optimiser="adam")
    assert (state["w/4.weight"][~mask] == 0).all()


def test_nothing_moves_a_pruned_weight() -> None:
    net = double(Net(module()))
    mask = torch.rand(5, 144, generator=torch.Generator().manual_seed(1)) < 0.3
    state = fresh(net) | {"opt/momentum/" + key[2:]: torch.zeros_like(value) for key, value in under(net.initial, "w/").items()}
    state["w/4.weight"] = state["w/4.weight"] * mask
    for step in range(5):
        _, gradient, buffers, _ = net.gradient(state | {"mask/4.weight": mask}, batch(seed=step), extra=under(net.initial, "w/"))
        state = net.descend(state | buffers, gradient, 0.1, 0.9, 1e-2)
    assert (state["w/4.weight"][~mask] == 0).all()
    assert (state["w/4.weight"][mask] != 0).all()


def test_hessian_vector_is_the_difference_of_gradients() -> None:
    torch.manual_seed(0)
    net = double(Net(nn.Sequential(nn.Flatten(), nn.Linear(72, 6), nn.Tanh(), nn.Linear(6, 5))))
    one, at = batch(), under(net.initial, "w/")
    vector = {key: torch.randn_like(value) for key, value in at.items()}
    product, h = net.hessian_vector(net.initial, one, vector), 1e-5

    def gradient(step: float) -> dict:
        return net.gradient({key: value + step * vector[key] for key, value in at.items()}, one)[1]

    above, below = gradient(h), gradient(-h)
    for key in at:
        assert torch.allclose(product[key], (above[key] - below[key]) / (2 * h), atol=1e-8)


@pytest.mark.parametrize("pure", [False, True])
def test_padding_enters_nothing(pure) -> None:
    net = double(Net(module()))
    net = net.under_vmap() if pure else net
    short = batch(4)
    long = batch(7, seed=9)
    x = torch.cat([short.x, long.x[4:]])
    padded = Batch(x, torch.cat([short.y, long.y[4:]]), torch.tensor([1.0] * 4 + [0.0] * 3).double(), short.t, short.T)
    results = [net.gradient(fresh(net), one) for one in (short, padded)]
    for mine, theirs in zip(*[(r[0], *r[1].values(), *r[2].values()) for r in results], strict=True):
        assert torch.allclose(mine, theirs, atol=1e-10)


@pytest.mark.parametrize("real", [None, torch.ones(1).double()])
def test_fewer_than_two_values_leave_the_running_variance(real) -> None:
    net = double(Net(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 5))))
    _, _, buffers, _ = net.gradient(fresh(net), batch(1, real=real))
    assert torch.equal(buffers["buf/1.running_var"], net.initial["buf/1.running_var"])
    assert not torch.equal(buffers["buf/1.running_mean"], net.initial["buf/1.running_mean"])


def test_loss_over_real_images_is_their_mean() -> None:
    logits, y = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    assert torch.allclose(cross_entropy(logits, y, torch.tensor([1.0, 1, 1, 0, 0])), F.cross_entropy(logits[:3], y[:3]))


def test_a_vmapped_gradient_is_each_clients() -> None:
    net = double(Net(module()))
    ones = [batch(seed=seed) for seed in range(3)]
    states = [{key: value + 0.1 * seed for key, value in fresh(net).items()} for seed in range(3)]
    stacked = {key: torch.stack([state[key] for state in states]) for key in states[0]}

    def one(state: dict, x: torch.Tensor, y: torch.Tensor) -> tuple:
        return net.under_vmap().gradient(state, Batch(x, y, None, ones[0].t, ones[0].T))[:3]

    loss, gradient, buffers = vmap(one)(stacked, torch.stack([b.x for b in ones]), torch.stack([b.y for b in ones]))
    for i in range(3):
        alone = net.gradient(states[i], ones[i])
        assert torch.allclose(loss[i], alone[0])
        assert all(torch.allclose(gradient[key][i], value, atol=1e-10) for key, value in alone[1].items())
        assert all(torch.allclose(buffers[key][i], value, atol=1e-8) for key, value in alone[2].items())


def test_a_tied_weight_has_one_key() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(72, 72)
            self.second = nn.Linear(72, 72)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x.flatten(1)))

    net = double(Net(Tied()))
    assert net.weights == ("w/first.weight", "w/first.bias", "w/second.bias")
    assert net(net.initial, batch().x)[0].shape == (6, 72)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.BatchNorm2d(2, momentum=None), "momentum = None"),
        (nn.SyncBatchNorm(2), "SyncBatchNorm"),
        (nn.InstanceNorm2d(2, track_running_stats=True), "instance norm"),
    ],
)
def test_layers_that_no_fleet_could_agree_on_are_refused(layer, message) -> None:
    with pytest.raises(ValueError, match=message):
        Net(nn.Sequential(layer))
