"""ledger: golden numbers of the specification, identities between the formulas, and a measured step beside each figure that has one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import log2

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from fedsim.core.activation_pruning import ActivationPruning
from fedsim.core.types import Batch
from fedsim.costs import flops, memory, model_size
from fedsim.costs.model_size import ENCODINGS, encoded_bits
from fedsim.costs.profile import BackwardMoment, Breakdown, LayerProfile, ModelProfile
from fedsim.models import build
from fedsim.models.settings import ModelSettings
from fedsim.nn import profiler
from fedsim.nn.net import Net

CONV = LayerProfile("conv", weights=216, flops=2 * 216 * 64, shape=(8, 3, 3, 3), positions=64)
WIDE = LayerProfile("wide", weights=1152, flops=2 * 1152 * 16, shape=(16, 8, 3, 3), positions=16)
HEAD = LayerProfile("head", weights=160, flops=2 * 160, shape=(10, 16), positions=1)
MOMENTS = (BackwardMoment(6_000, 0, 0, 900, "conv", 58), BackwardMoment(10_000, 0, 0, 300, "wide"), BackwardMoment(10_000, 0, 0, 0, "head"))
SMALL = ModelProfile((CONV, WIDE, HEAD), free=58, buffers=48, activations=10_000, vectors=200, moments=MOMENTS)
KEPT = {"wide": 100, "head": 16}


@pytest.fixture(scope="module")
def resnet18() -> ModelProfile:
    return profiler.profile(build(ModelSettings("resnet18"), (3, 32, 32), 10, 0), (3, 32, 32))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def kept_counts() -> st.SearchStrategy[dict[str, int]]:
    return st.fixed_dictionaries({}, optional={layer.name: st.integers(0, layer.weights) for layer in SMALL.layers})


# ---- FLOPs by density


@given(kept_counts(), st.sampled_from(["train", "forward", "inputs"]), st.integers(0, 20), st.integers(0, 20))
def test_dense_flops_times_densities_are_the_flops_of_the_feed(kept, cost, images, probed) -> None:
    probed = min(probed, images) if cost == "train" else 0
    parts = list(flops.by_density(SMALL, images, kept, cost=cost, dense=("wide", "head"), dense_images=probed))
    whole = flops.feed_flops(SMALL, images, kept, cost, ("wide", "head"), probed)
    assert sum(density * number for density, number in parts) == pytest.approx(whole.total, rel=1e-12)


def test_flops_by_density_by_hand() -> None:
    parts = flops.by_density(SMALL, 4, {"wide": 288, "head": 80}, {"wide": 576}, dense=("head",), dense_images=1)
    conv, wide = 4 * 3 * CONV.flops, 4 * 3 * WIDE.flops // 2  # half of wide is cut, and half of what is left masked
    assert list(parts) == [(1.0, conv), (0.5, wide), (0.5, 4 * 3 * HEAD.flops - HEAD.flops), (1.0, HEAD.flops)]


# ---- density


def test_densities_by_hand() -> None:
    assert flops.density(SMALL, KEPT) == (216 + 100 + 16) / 1528
    assert flops.density_all(SMALL, KEPT) == (216 + 100 + 16 + 58) / (1528 + 58)
    assert flops.density_maskable(SMALL, KEPT) == 116 / (1152 + 160)
    assert flops.density_maskable(SMALL, {}) == 1
    assert flops.densities(SMALL, KEPT) == {"conv": 1.0, "wide": 100 / 1152, "head": 0.1}


def test_a_layer_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match=r"no layer 'wide\.weight' to count; the model has conv, wide, head"):
        flops.density(SMALL, {"wide.weight": 3})
    with pytest.raises(ValueError, match="layer 'head' keeps 161 weights; it has 160"):
        flops.forward_flops(SMALL, {"head": 161})
    with pytest.raises(ValueError, match="no layer 'tail'; the model has conv, wide, head"):
        flops.training_flops(SMALL, dense=("tail",))


# ---- FLOPs


def test_training_by_hand() -> None:
    f_sparse = CONV.flops + 2 * 100 * 16 + 2 * 16
    assert flops.forward_flops(SMALL, KEPT) == f_sparse
    assert flops.training_flops(SMALL, KEPT) == 3 * f_sparse
    f_dense = CONV.flops + WIDE.flops + HEAD.flops
    assert flops.training_flops(SMALL, KEPT, ("*",)) == 2 * f_sparse + f_dense
    assert flops.training_flops(SMALL, KEPT, ("wide",)) == 2 * f_sparse + (CONV.flops + 2 * 16) + WIDE.flops


def test_a_round_is_the_sum_of_its_feeds() -> None:
    train = flops.feed_flops(SMALL, 50, KEPT)
    probe = flops.feed_flops(SMALL, 8, KEPT, dense=("*",))
    score = flops.feed_flops(SMALL, 5, KEPT, cost="forward")
    both = train + probe + score
    f_sparse, f_dense = flops.forward_flops(SMALL, KEPT), flops.forward_flops(SMALL)
    assert both.total == 50 * 3 * f_sparse + 8 * (2 * f_sparse + f_dense) + 5 * f_sparse
    assert both["dense_gradient"] == 8 * (f_dense - f_sparse)
    with pytest.raises(ValueError, match=r"'backward' is not known. There are: train, forward, inputs"):
        flops.feed_flops(SMALL, 5, cost="backward")


def test_resnet18_a_dense_round(resnet18: ModelProfile) -> None:
    assert flops.feed_flops(resnet18, 25_000).total == pytest.approx(8.3313e13, rel=1e-5)


def test_resnet18_at_a_hundredth(resnet18: ModelProfile) -> None:
    f_dense, stem = flops.forward_flops(resnet18), resnet18.layers[0]
    exact = (stem.flops + 0.01 * (f_dense - stem.flops)) / f_dense
    kept = {layer.name: round(0.01 * layer.weights) for layer in resnet18.layers[1:]}
    assert flops.forward_flops(resnet18, kept) / f_dense == pytest.approx(exact, rel=1e-3)
    assert exact == pytest.approx(0.013154, abs=1e-6)
    assert flops.training_flops(resnet18, kept, ("*",)) / (3 * f_dense) == pytest.approx(0.342, abs=5e-4)


def test_sparse_flops_are_the_measured_dense_ones_times_the_density_of_the_real_masks() -> None:
    net = build(ModelSettings("resnet8"), (3, 16, 16), 10, 0)
    found = profiler.profile(net, (3, 16, 16))
    masks = {layer.name: torch.rand(layer.shape) < 0.3 for layer in found.layers[1:]}
    with FlopCounterMode(display=False, depth=5) as counter:
        net(torch.zeros(1, 3, 16, 16))
    counts = counter.get_flop_counts()
    root = type(net).__name__
    measured = sum(
        sum(counts[f"{root}.{layer.name}"].values()) * float(masks[layer.name].double().mean() if layer.name in masks else 1)
        for layer in found.layers
    )
    assert flops.forward_flops(found, {name: int(mask.sum()) for name, mask in masks.items()}) == pytest.approx(measured, rel=1e-12)


def test_micronet_example() -> None:
    conv = LayerProfile("conv", 32 * 16 * 9, 2 * 32 * 16 * 9 * 1024, (32, 16, 3, 3), 1024)
    assert model_size.micronet(conv, conv.weights) == (4_751_360, 4_718_592)
    assert [int(count) for count in model_size.micronet(conv, 0.1 * conv.weights)] == [504_627, 471_859]
    assert encoded_bits("bitmask", 4608, 460.8) + 32 * 32 == pytest.approx(20_377.6)


# ---- model size


@pytest.mark.parametrize(
    ("encoding", "tenth", "hundredth"),
    [("dense", 9.44, 9.44), ("bitmask", 1.24, 0.389), ("csr32", 1.89, 0.191), ("csr16", 1.42, 0.144)],
)
def test_encodings_of_one_large_layer(encoding: str, tenth: float, hundredth: float) -> None:
    n = 512 * 4608
    assert encoded_bits(encoding, n, 0.1 * n, 512) / 8e6 == pytest.approx(tenth, abs=5e-3)
    assert encoded_bits(encoding, n, 0.01 * n, 512) / 8e6 == pytest.approx(hundredth, abs=5e-4 if hundredth < 1 else 5e-3)


@given(n=st.integers(1, 10**6), share=st.floats(0, 1))
def test_bitmask_over_dense_is_the_density_and_a_32nd(n: int, share: float) -> None:
    nnz = int(share * n)
    assert encoded_bits("bitmask", n, nnz) / encoded_bits("dense", n, nnz) == pytest.approx(nnz / n + 1 / 32)
    assert (encoded_bits("bitmask", n, nnz) < encoded_bits("coordinate", n, nnz)) == (nnz / n > 1 / 32)
    assert (encoded_bits("coordinate", n, nnz) < encoded_bits("dense", n, nnz)) == (nnz / n < 0.5)
    assert encoded_bits("entropy", n, nnz) <= encoded_bits("bitmask", n, nnz) + 1e-6


def test_entropy_and_affine_by_hand() -> None:
    assert encoded_bits("entropy", 8, 2) == pytest.approx(64 + 8 * (0.25 * 2 + 0.75 * log2(4 / 3)))
    assert encoded_bits("entropy", 8, 8) == 256
    assert encoded_bits("affine8", 100, 30) == 8 * 30 + 64


def test_indices_that_are_too_narrow_are_refused() -> None:
    with pytest.raises(ValueError, match=r"csr16 takes rows of at most 65,535 weights; this tensor has rows of 65,536"):
        encoded_bits("csr16", 10 * 2**16, 5, rows=10)
    with pytest.raises(ValueError, match=r"coordinate stores positions below 2\^31; this tensor has 2,147,483,648"):
        encoded_bits("coordinate", 2**31, 5)
    with pytest.raises(ValueError, match="no encoding 'zip'; there are dense, bitmask"):
        encoded_bits("zip", 10, 5)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_size_of_a_model_by_its_terms(encoding: str) -> None:
    size = model_size.size_bits(SMALL, KEPT, encoding)
    assert size["masked"] == encoded_bits(encoding, 1152, 100, 16) + encoded_bits(encoding, 160, 16, 10)
    assert size["dense"] == 32 * 216
    assert size["free"] == 32 * (58 + 48)
    assert size["total"] == size["masked"] + size["dense"] + size["free"]


def test_positions_take_the_cheaper_list() -> None:
    assert memory.position_bytes(SMALL, {"wide": 36}) == 144  # both cost the same at a 32nd
    assert memory.position_bytes(SMALL, {"wide": 35}) == 140
    assert memory.position_bytes(SMALL, {"wide": 1152, "head": 3}) == 144 + 12
    assert memory.position_bytes(SMALL, {}) == 0


def test_resnet18_travels_as_the_specification_has_it(resnet18: ModelProfile) -> None:
    assert resnet18.free + resnet18.buffers == 19_210
    assert model_size.size_bits(resnet18)["total"] / 8 == 44_734_248


# ---- memory


def test_memory_by_hand() -> None:
    nnz = 216 + 100 + 16
    found = memory.client_memory(SMALL, KEPT, batch=4, slots=1, dense=("wide", "head"), top=12, personal=7, beside=9)
    assert found == {
        "weights": 4 * (nnz + 58 + 48),
        "positions": 144 + 20,
        "gradients": 4 * (nnz + 58),
        "dense_gradient": 4 * 1152,
        "optimiser": 4 * (nnz + 58),
        "top": 8 * 12,
        "personal": 7,
        "beside": 9,
        "activations": 4 * 10_000 + 200,
        "signs": 0,
    }
    assert tuple(found) == memory.TERMS
    assert found.total == sum(found.values())
    assert found.without("activations").total == found.total - 40_200
    assert memory.client_memory(SMALL, KEPT, dense=("*",), at_once=True)["dense_gradient"] == 4 * 1528


@given(kept=kept_counts(), more=st.integers(0, 200))
def test_fewer_kept_weights_never_cost_more(kept: dict[str, int], more: int) -> None:
    wider = {name: min(count + more, next(a.weights for a in SMALL.layers if a.name == name)) for name, count in kept.items()}
    assert flops.training_flops(SMALL, kept) <= flops.training_flops(SMALL, wider)
    less, greater = memory.client_memory(SMALL, kept, 4, 1), memory.client_memory(SMALL, wider, 4, 1)
    assert all(less[name] <= greater[name] for name in less)


def test_all_ones_differ_from_dense_in_the_positions_only() -> None:
    full = {layer.name: layer.weights for layer in SMALL.layers}
    assert flops.training_flops(SMALL, full, ("*",)) == flops.training_flops(SMALL)
    assert memory.client_memory(SMALL, full, 4, 2).without("positions") == memory.client_memory(SMALL, {}, 4, 2).without("positions")
    assert model_size.size_bits(SMALL, full)["total"] == model_size.size_bits(SMALL)["total"] + SMALL.weights


def test_terms_add_by_name() -> None:
    assert Breakdown(a=1, b=2) + Breakdown(b=3, c=4) == Breakdown(a=1, b=5, c=4)
    assert (Breakdown(a=1) + Breakdown()).total == 1


def test_what_a_pack_holds_is_what_its_clients_hold() -> None:
    one = memory.executed_memory(SMALL, 4, ("wide",), slots=1)
    assert one == {
        "weights": 4 * (1528 + 58 + 48),
        "gradients": 4 * (160 + 1152),  # where most is held: the first layer's is not formed yet
        "optimiser": 4 * 1586,
        "masks": 1152,
        "effective": 4 * 1152,
        "activations": 40_200,
        "transient": 1200 + 4 * 1152,  # and a copy of the convolution's weight
    }
    assert memory.executed_memory(SMALL, 4, ("wide",), slots=1, pack=7) == {name: 7 * value for name, value in one.items()}


def test_the_end_of_a_step_holds_every_gradient_twice_where_it_masks_them() -> None:
    end = memory.executed_memory(SMALL, 0, ("wide", "head"))
    assert end["gradients"] == 4 * (1528 + 58)
    assert end["transient"] == 4 * (1152 + 160) + 4 * 1152  # the masked gradients, and one mask as numbers
    kept = memory.executed_memory(replace(SMALL, keep=ActivationPruning(0.5)), 0, {"wide": 1152, "head": 160})
    assert kept["gradients"] == end["gradients"]
    assert kept["transient"] == 4 * (1152 + 160) + 8 * 1152  # gradients of kept values, and the positions of one layer


def highest(step: Callable[[], None]) -> int:
    """The most bytes that a step holds beside its state.

    Where inputs are pruned, Net finds the positions of the kept weights in the first step and holds them from then on: later steps have
    them in memory too, but not what it took to find them. So the first step is recorded as well, and the highest level is the second's.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
        with record_function("second step"):
            step()
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    began = next(event.start_ns() for event in events if event.name() == "second step")
    level = top = 0
    for when, change in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        level += change
        top = max(top, level) if when >= began else 0
    return top


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("name", "norm", "side", "batch"),
    [
        ("cnn", "none", 8, 10),
        ("cnn", "batch", 32, 10),
        ("cnn", "batch", 32, 64),
        ("cnn", "nsconv", 32, 64),
        ("resnet18", "nsconv", 32, 8),
        ("resnet20", "group", 32, 16),
        ("resnet20", "nsconv", 32, 16),
        ("vgg11", "batch", 32, 8),
        ("vgg11", "batch", 32, 32),
        ("resnet18", "batch", 32, 8),
        ("mobilenet_v2", "nsconv", 32, 8),
    ],
)
@pytest.mark.parametrize("keep", [None, ActivationPruning(0.3)], ids=["whole", "pruned"])
def test_executed_memory_is_within_a_tenth_of_the_measured_peak(
    name: str, norm: str, side: int, batch: int, masked: bool, keep: ActivationPruning | None
) -> None:
    shape = (3, side, side)
    module = build(ModelSettings(name, norm=norm), shape, 10, 0)
    found = profiler.profile(module, shape, keep)
    net = Net(module)
    net.set_activation_pruning(keep)
    state = {key: value.clone() for key, value in net.initial.items()}
    state |= {"opt/momentum/" + key[2:]: torch.zeros_like(state[key]) for key in net.weights}
    masks = {f"mask/{layer.name}.weight": torch.rand(layer.shape) < 0.5 for layer in found.layers} if masked else {}
    images = Batch(torch.randn(batch, *shape), torch.zeros(batch, dtype=torch.int64), None, torch.tensor(0), torch.tensor(1))

    def step() -> None:
        _, gradient, _, _ = net.gradient({**state, **masks}, images)
        net.descend(state, gradient, 0.01, 0.9)

    before = sum(value.numel() * value.element_size() for value in [*state.values(), *masks.values(), images.x])
    kept = {key.removeprefix("mask/").removesuffix(".weight"): int(mask.sum()) for key, mask in masks.items()}
    analytic, measured = memory.executed_memory(found, batch, kept, slots=1).total, before + highest(step)
    # oneDNN copies the weights of a convolution into an order of its own and back, or not: it depends on the processor and its version.
    reordered = 2 * 4 * max(layer.weights for layer in found.layers)
    copied = memory.COPIED * 4 * max(layer.weights for layer in found.layers)  # the ledger counts it; not every processor makes it
    assert 0.9 * (measured - reordered) <= analytic <= 1.1 * (measured + copied)


def test_the_gradient_of_a_dense_linear_map_by_the_counter() -> None:
    net = nn.Sequential(nn.Linear(12, 7), nn.Linear(7, 5))
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(net(torch.randn(1, 12)), torch.tensor([0])).backward()
    found = profiler.profile(net, (12,))
    assert counter.get_total_flops() == flops.training_flops(found) - found.layers[0].flops
    assert flops.training_flops(found) == 6 * (12 * 7 + 7 * 5)
