"""Programs of fixed shapes: the same answers as one client after the other, whatever they are run with and wherever images lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from mpi4py import MPI
from small_federation import drawn, small, stored, world
from torch import Tensor, nn

from fedsim.core.tree import Tree
from fedsim.core.types import Batch, Feed
from fedsim.data.population import Skew
from fedsim.errors import ClientFault
from fedsim.federated.client_work import Train
from fedsim.fleet.cuda_graph import device_data, fleet
from fedsim.fleet.cuda_graph.capture import Eager, Run
from fedsim.fleet.cuda_graph.exact_sum import DeviceSum, find_units
from fedsim.fleet.cuda_graph.fleet import CudaGraphFleet
from fedsim.fleet.cuda_graph.program import LONGEST, chunks
from fedsim.fleet.messages import WorkOrder
from fedsim.fleet.mpi.communicator import TOTAL_TAG, Communicator
from fedsim.fleet.mpi.device_transfer import DeviceTransfer, bytes_of, seen_as
from fedsim.fleet.serial import SerialFleet
from fedsim.nn import mixed_precision
from fedsim.nn.net import Net

RAGGED = [7, 10, 1, 23]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    fleet.forget()


def train(epochs: int = 2, **fields: float) -> Train:
    return Train((Feed("train", epochs=epochs, batch=4),), 0.05, 0.9, 1e-3, **fields)  # type: ignore[arg-type]


def total(kind: type, work: Train, sizes: list[int] = RAGGED, augment: tuple[str, ...] = (), skew: bool = False) -> Tree:
    """What the cohort of all clients comes to."""
    made = world(stored(*drawn(sizes)), kind=kind)
    population = replace(made.population, augment=augment, crop_pad=1, cutout=2)
    if skew:
        population = replace(population, skew=Skew(len(sizes), 0, noise_std=0.1))
    made.fleet.site = replace(made.fleet.site, population=population)
    made.fleet.open(1)
    return made.fleet.run(work, range(len(sizes)), made.setting.net.initial).total


def same(one: Tree, other: Tree) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(value, other[key], rtol=1e-9, atol=1e-9) for key, value in one.items())


# ---- the same answer


@pytest.mark.parametrize("augment", [(), ("crop", "flip", "cutout")])
def test_ragged_clients_train_as_if_alone(augment) -> None:
    assert same(total(SerialFleet, train(), augment=augment), total(CudaGraphFleet, train(), augment=augment))


@pytest.mark.parametrize(("epochs", "sizes"), [(40, [4, 4]), (33, [8, 3])])
def test_a_feed_longer_than_its_program_runs_it_again(epochs, sizes) -> None:
    """40 even steps are two runs; 33 and 66 uneven ones three, with void ones."""
    work = replace(train(epochs), lr=0.005)
    assert same(total(SerialFleet, work, sizes), total(CudaGraphFleet, work, sizes))


def test_clients_with_a_transform_of_their_own() -> None:
    assert same(total(SerialFleet, train(), skew=True), total(CudaGraphFleet, train(), skew=True))
    assert not same(total(CudaGraphFleet, train()), total(CudaGraphFleet, train(), skew=True))


def test_a_set_too_large_for_the_device_changes_no_bit(monkeypatch) -> None:
    whole = total(CudaGraphFleet, train(), augment=("crop",))
    fleet.forget()
    monkeypatch.setattr(device_data, "HOST", 0)
    apart = total(CudaGraphFleet, train(), augment=("crop",))
    assert all(value.equal(apart[key]) for key, value in whole.items())


class Warming(Eager):
    """Runs a program before it is its turn, as a capture does."""

    def capture(self, name: str, program: Run, restore: Run) -> Run:
        program()
        program()
        restore()
        return program


def test_running_a_program_to_warm_up_changes_no_bit() -> None:
    cold = total(CudaGraphFleet, train())
    fleet.forget()
    fleet.engine("cpu").capture = Warming()
    warm = total(CudaGraphFleet, train())
    assert all(value.equal(warm[key]) for key, value in cold.items())


# ---- programs


@pytest.mark.parametrize("steps", [1, 5, 32, 33, 40, 41, 64, 97, 1000])
@pytest.mark.parametrize("even", [True, False])
def test_programs_cover_a_feed(steps, even) -> None:
    length, often = chunks(steps, even)
    assert length <= LONGEST
    assert steps <= length * often < steps + max(4 * often, length)
    if even and steps not in (41, 97):  # primes beyond the longest program
        assert length * often == steps


def test_other_rounds_packs_and_rates_need_no_other_program() -> None:
    made = world(stored(*drawn([8, 8, 8, 8])), kind=CudaGraphFleet)
    counts = []
    for r, lr in ((1, 0.1), (2, 0.05), (3, 0.01)):
        made.fleet.open(r)
        made.fleet.run(replace(train(), lr=lr), range(4), made.setting.net.initial)
        counts.append([len(pack.programs) for _, pack in fleet.engine("cpu").graphed.values()])
    assert counts == [[1], [1], [1]]


class Crowded(Eager):
    """A device that has room for one graphed pack."""

    def capture(self, name: str, program: Run, restore: Run) -> Run:
        if len(fleet.engine("cpu").graphed) > 1:
            raise torch.OutOfMemoryError
        return program


def test_a_graphed_pack_without_memory_takes_that_of_others() -> None:
    fleet.engine("cpu").capture = Crowded()
    first, second = (total(CudaGraphFleet, work) for work in (train(), train(epochs=3)))
    assert len(fleet.engine("cpu").graphed) == 1
    assert same(first, total(SerialFleet, train()))
    assert same(second, total(SerialFleet, train(epochs=3)))


def test_memory_that_does_not_suffice_for_one_graphed_pack_is_a_fault(monkeypatch) -> None:
    def full(*_: object) -> Run:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(Eager, "capture", full)
    with pytest.raises(ClientFault, match="no memory"):
        total(CudaGraphFleet, train())


def test_a_loss_that_is_no_number_is_reported_with_its_client_and_step() -> None:
    made = world(stored(*drawn(RAGGED)), kind=CudaGraphFleet)
    made.fleet.open(1)
    with pytest.raises(ClientFault, match=r"client \d+, round 1, Train.step \d+\] FloatingPointError: the loss is (nan|inf)"):
        made.fleet.run(replace(train(), lr=1e200), range(4), made.setting.net.initial)


# ---- sums


def rows(seed: int = 0) -> tuple[Tree, Tree]:
    generator = torch.Generator().manual_seed(seed)
    shared = {"w/a": torch.randn(3, 5, generator=generator), "w/b": torch.zeros(0)}
    sent = {"w/a": torch.randn(4, 3, 5, generator=generator, dtype=torch.float64), "w/b": torch.zeros(4, 0, dtype=torch.float64)}
    return shared, sent | {"loss/c": 1e-9 * torch.randn(4, 7, generator=generator, dtype=torch.float64)}


def order(shared: Tree) -> WorkOrder:
    return WorkOrder(train(), None, shared, 1, 100)  # type: ignore[arg-type]


def test_sums_on_the_device_are_the_exact_sums() -> None:
    shared, sent = rows()
    mine, theirs = order(shared), order(shared)
    find_units(mine)
    tally, exact = DeviceSum(mine), theirs.sum()
    tally.add({key: value[:3] for key, value in sent.items()})
    tally.add({key: value[3:] for key, value in sent.items()})
    exact.add(sent, range(4), [10, 20, 30, 40])
    found = tally.checked(tally.magnitudes(), range(4), [10, 20, 30, 40])
    assert found.clients == exact.clients
    assert found.parts.keys() == exact.parts.keys()
    assert all(value.equal(found.parts[key]) for key, value in exact.parts.items())


@pytest.mark.parametrize(("key", "value"), [("w/a", float("nan")), ("w/a", 1e30), ("loss/c", float("inf")), ("loss/c", 2.0**28)])
def test_a_sum_on_the_device_refuses_what_the_exact_sum_refuses(key, value) -> None:
    shared, sent = rows()
    sent[key][2].view(-1)[1] = value
    tally = DeviceSum(order(shared))
    tally.add(sent)
    with pytest.raises(ValueError, match=f"total '{key}' of client 7 holds"):
        tally.checked(tally.magnitudes(), [5, 6, 7, 8], [10, 20, 30, 40])


def test_a_total_that_is_not_float64_is_refused() -> None:
    with pytest.raises(ValueError, match=r"total 'w/a' is torch\.float32"):
        DeviceSum(order(rows()[0])).add({"w/a": torch.zeros(4, 3, 5)})


# ---- bfloat16


def gradients(low: torch.dtype | None, under: Callable[[Net], Net] = lambda net: net) -> tuple[Tree, Tensor]:
    net = Net(small())
    net.set_compute_dtype(low)
    generator = torch.Generator().manual_seed(2)
    x, t = torch.randn(32, 1, 4, 4, generator=generator), torch.zeros((), dtype=torch.int64)
    loss, found, buffers, _ = under(net).gradient(net.initial, Batch(x, torch.arange(32) % 3, None, t, t))
    return found | buffers, loss


@pytest.mark.parametrize("under", [lambda net: net, Net.under_vmap], ids=["autograd", "func"])
def test_low_arithmetic_rounds_nothing_that_is_kept(under) -> None:
    exact, loss = gradients(None, under)
    low, rounded = gradients(torch.bfloat16, under)
    assert {value.dtype for value in (*low.values(), rounded)} == {torch.float32}
    assert abs(float(loss - rounded)) < 0.01
    largest = max(float(value.abs().max()) for value in exact.values())
    errors = {key: float((value - low[key]).abs().max()) / largest for key, value in exact.items()}
    assert 1e-5 < max(errors.values()) < 0.02


def test_a_net_is_raised_again_and_a_cut_one_is_lowered_too() -> None:
    net = Net(small())
    net.set_compute_dtype(torch.bfloat16)
    assert net.cut(net.channels.kept(torch.ones(net.channels.n, dtype=torch.bool))).compute_dtype == torch.bfloat16
    before, x = net(net.initial, torch.ones(1, 1, 4, 4))[0], torch.ones(1, 1, 4, 4)
    mixed_precision.settle(net, "float32", "cpu")
    after = net(net.initial, x)[0]
    assert after.equal(Net(small())(net.initial, x)[0])
    assert not after.equal(before)


def test_programs_train_in_bfloat16_near_to_float32() -> None:
    """A dozen steps of 2^-9 each, which momentum adds up."""
    found = {}
    for low in (None, torch.bfloat16):
        made = world(stored(*drawn(RAGGED)), kind=CudaGraphFleet)
        net = Net(small())
        net.set_compute_dtype(low)
        made.fleet.site = replace(made.fleet.site, net=net, dtype=torch.float32)
        made.fleet.open(1)
        found[low] = made.fleet.run(train(), range(4), net.initial).total
    moved = {key: value / 41 for key, value in found[None].items() if key.startswith("w/")}
    errors = [float((value - found[torch.bfloat16][key] / 41).abs().max()) for key, value in moved.items()]
    assert 1e-5 < max(errors) < 0.05


# ---- buffers for MPI


@pytest.mark.parametrize("wanted", ["on", "off"])
def test_mpi_is_handed_tensors_or_copies_of_them(wanted) -> None:
    transfer = DeviceTransfer.of("cpu", wanted)
    link = Communicator(MPI.COMM_SELF, lambda: 0.0, lambda seconds: None, transfer=transfer)
    shared, sent = rows()
    exact = order(shared).sum()
    exact.add(sent, range(4), [10, 20, 30, 40])
    buffer = transfer.outgoing_sum(exact)
    assert isinstance(buffer, Tensor) is (wanted == "on")
    link.send({0: buffer}, TOTAL_TAG)
    brought = transfer.incoming(seen_as(link.receive(0, TOTAL_TAG, transfer), "int64"))
    assert brought.equal(torch.cat([exact.parts[key].flatten() for key in sorted(exact.parts)]))
    link.send({0: transfer.outgoing(bytes_of(shared))}, TOTAL_TAG)
    assert transfer.incoming(link.receive(0, TOTAL_TAG, transfer)).equal(shared["w/a"].view(torch.uint8).flatten())


def test_where_there_is_no_cuda_auto_means_copies() -> None:
    assert not DeviceTransfer.of("cpu", "auto").direct


# ---- convolutions of a pack


def stacked_gradients(net: Net, how: str) -> Tree:
    """(K, …) of three clients with weights of their own."""
    generator, t = torch.Generator().manual_seed(3), torch.zeros((), dtype=torch.int64)
    weights = {key: value + 0.1 * torch.randn(3, *value.shape, generator=generator) for key, value in net.initial.items()}
    x, y = torch.randn(3, 5, 1, 8, 8, generator=generator).to(next(iter(weights.values())).dtype), torch.arange(15).view(3, 5) % 3
    net.set_packed_convolution(how)
    pure = net.under_vmap()
    return torch.func.vmap(lambda rows, x, y: pure.gradient(rows, Batch(x, y, None, t, t))[1])(weights, x, y)


@pytest.mark.parametrize("conv", [{}, {"stride": 2, "padding": 0}, {"groups": 2}, {"bias": False, "padding": (0, 1)}])
def test_batched_products_are_grouped_convolutions(conv) -> None:
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3, **{"padding": 1} | conv), nn.GroupNorm(1, 6), nn.ReLU(), nn.Flatten()]
    module = nn.Sequential(*body, nn.Linear(nn.Sequential(*body)(torch.zeros(1, 1, 8, 8)).shape[1], 3))
    exact = Net(module).to("cpu", torch.float64)
    grouped, product = (stacked_gradients(exact, how) for how in ("grouped", "matmul"))
    assert all(torch.allclose(value, product[key], rtol=1e-10, atol=1e-10) for key, value in grouped.items())
    low = Net(module)
    low.set_compute_dtype(torch.bfloat16)
    whole = torch.cat([value.flatten() for value in grouped.values()])
    for found in (stacked_gradients(low, how) for how in ("grouped", "matmul")):
        assert {value.dtype for value in found.values()} == {torch.float32}
        assert 1e-4 < float((torch.cat([found[key].flatten() for key in grouped]) - whole).norm() / whole.norm()) < 0.1
