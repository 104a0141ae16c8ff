"""The hypernetworks against torch.nn.GRU, LayerNorm, Linear and weight_norm, and their counts against the published ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

from fedsim.core import rng, tree
from fedsim.core.tree import Tree
from fedsim.pruning import hypernetwork

WIDTHS = (5, 3, 7)
RESNET56 = [16] * 9 + [32] * 9 + [64] * 9


def drawn(normalised: bool, seed: int = 0) -> Tree:
    """Parameters in float64, every one of them moved from where it starts."""
    values = hypernetwork.fresh(WIDTHS, rng.key(seed), normalised)
    generator = torch.Generator().manual_seed(seed)
    return {key: value.double() + torch.rand(value.shape, generator=generator, dtype=torch.float64) / 9 for key, value in values.items()}


class Reference(nn.Module):
    """The same network of torch's own layers."""

    def __init__(self, net: Tree) -> None:
        super().__init__()
        self.gru = nn.GRU(64, 128, bidirectional=True, batch_first=True)
        self.norm = nn.LayerNorm(256)
        self.maps = nn.ModuleList(nn.Linear(256, width, bias=False) for width in WIDTHS)
        for direction, suffix in enumerate(("", "_reverse")):
            for ours, theirs in (("ih", "weight_ih"), ("hh", "weight_hh"), ("ih_bias", "bias_ih"), ("hh_bias", "bias_hh")):
                setattr(self.gru, f"{theirs}_l0{suffix}", nn.Parameter(net[ours][direction]))
        self.norm.weight, self.norm.bias = nn.Parameter(net["norm"]), nn.Parameter(net["shift"])
        lengths = net["length"].split(WIDTHS) if "length" in net else [None] * len(WIDTHS)
        for layer, rows, length in zip(self.maps, net["map"].split(WIDTHS), lengths, strict=True):
            layer.weight = nn.Parameter(rows)
            if length is not None:
                parametrizations.weight_norm(layer)
                layer.parametrizations.weight.original0 = nn.Parameter(length.unsqueeze(1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.gru(x.view(-1, len(WIDTHS), 64))[0]).relu()
        return torch.cat([layer(h[:, at]) for at, layer in enumerate(self.maps)], -1)

    def gradients(self) -> Tree:
        """Under our names."""
        both = {"ih": "weight_ih", "hh": "weight_hh", "ih_bias": "bias_ih", "hh_bias": "bias_hh"}
        found = {o: torch.stack([self.gru.get_parameter(f"{t}_l0{s}").grad for s in ("", "_reverse")]) for o, t in both.items()}
        found |= {"norm": self.norm.weight.grad, "shift": self.norm.bias.grad}
        if not nn.utils.parametrize.is_parametrized(self.maps[0]):
            return found | {"map": torch.cat([layer.weight.grad for layer in self.maps])}
        length, direction = ([getattr(layer.parametrizations.weight, f"original{i}").grad for layer in self.maps] for i in (0, 1))
        return found | {"map": torch.cat(direction), "length": torch.cat(length).flatten()}


@pytest.mark.parametrize("normalised", [True, False], ids=["base", "client"])
def test_logits_and_gradients_are_those_of_torchs_layers(normalised) -> None:
    net = drawn(normalised)
    x = torch.randn(4, 64 * len(WIDTHS), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    slope = torch.randn(4, sum(WIDTHS), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    leaves = {key: value.clone().requires_grad_() for key, value in net.items()}
    ours, entry = hypernetwork.logits(leaves, at := x.clone().requires_grad_(), WIDTHS), x.clone().requires_grad_()
    reference = Reference(net)
    theirs = reference(entry)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    (ours * slope).sum().backward()
    (theirs * slope).sum().backward()
    assert torch.allclose(at.grad, entry.grad, atol=1e-12)
    expected = reference.gradients()
    assert leaves.keys() == expected.keys()
    for key, value in leaves.items():
        assert torch.allclose(value.grad, expected[key], atol=1e-11), key


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_inputs_of_any_rank(lead) -> None:
    net = drawn(False)
    x = torch.randn(*lead, 64 * len(WIDTHS), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = hypernetwork.logits(net, x, WIDTHS)
    assert found.shape == (*lead, sum(WIDTHS))
    alone = [hypernetwork.logits(net, one, WIDTHS) for one in x.reshape(-1, x.shape[-1])]
    assert torch.allclose(found.reshape(-1, sum(WIDTHS)), torch.stack(alone), atol=1e-12)


def test_the_counts_of_resnet56() -> None:
    base, client = (hypernetwork.fresh(RESNET56, rng.key(0), normalised) for normalised in (True, False))
    z = hypernetwork.orthogonal(27, rng.key(1))
    table = hypernetwork.embedding(27, rng.key(2, torch.arange(10)))
    assert len(z) == 1728
    assert tree.size(base) + len(z) == 410_288
    assert table.shape == (10, 1728)
    assert tree.size(client) + table.numel() == 424_832


def test_flops_are_those_that_torch_counts() -> None:
    net, x = drawn(normalised=False), torch.randn(3, 64 * len(WIDTHS), dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        hypernetwork.logits(net, x, WIDTHS)
    assert counter.get_total_flops() == 3 * hypernetwork.flops(WIDTHS)
    assert hypernetwork.flops(RESNET56) == 2 * (27 * 2 * 384 * (64 + 128) + 256 * 1008)


@pytest.mark.parametrize("layers", [1, 3, 64])
def test_the_rows_of_z_are_at_right_angles(layers) -> None:
    z = hypernetwork.orthogonal(layers, rng.key(3)).view(layers, 64).double()
    assert torch.allclose(z @ z.T, torch.eye(layers, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("layers", [65, 100])
def test_its_columns_are_where_there_are_more_layers_than_columns(layers) -> None:
    z = hypernetwork.orthogonal(layers, rng.key(3)).view(layers, 64).double()
    assert torch.allclose(z.T @ z, torch.eye(64, dtype=torch.float64), atol=1e-6)


def test_fresh_values_depend_on_the_key_alone_and_lie_within_torchs_bounds() -> None:
    one, same, other = (hypernetwork.fresh(WIDTHS, rng.key(k), True) for k in (0, 0, 1))
    assert all(torch.equal(value, same[key]) for key, value in one.items())
    for key, bound in {"ih": 128, "hh": 128, "ih_bias": 128, "hh_bias": 128, "map": 256}.items():
        assert not torch.equal(one[key], other[key])
        assert one[key].abs().max() <= bound**-0.5
        assert one[key].abs().max() > 0.9 * bound**-0.5
    assert torch.equal(one["norm"], torch.ones(256))
    assert not one["shift"].any()


def test_a_base_begins_with_the_rows_that_were_drawn() -> None:
    """Their length is a parameter of its own; until it is trained, weight normalisation changes nothing."""
    base = hypernetwork.fresh(WIDTHS, rng.key(0), True)
    x = hypernetwork.orthogonal(len(WIDTHS), rng.key(1))
    plain = {key: value for key, value in base.items() if key != "length"}
    assert torch.allclose(hypernetwork.logits(base, x, WIDTHS), hypernetwork.logits(plain, x, WIDTHS), atol=1e-6)
    longer = base | {"map": 3 * base["map"]}
    assert torch.allclose(hypernetwork.logits(longer, x, WIDTHS), hypernetwork.logits(base, x, WIDTHS), atol=1e-5)


def test_embeddings_are_standard_normal_and_a_clients_own() -> None:
    table = hypernetwork.embedding(27, rng.key(5, torch.arange(20)))
    assert abs(float(table.mean())) < 4 / table.numel() ** 0.5
    assert abs(float(table.var()) - 1) < 4 * (2 / table.numel()) ** 0.5
    assert torch.equal(table[7], hypernetwork.embedding(27, rng.key(5, 7)))
