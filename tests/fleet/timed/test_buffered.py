"""FedBuff: equal devices give federated averaging, weight for weight; stale answers count by hand; flights survive."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

import numpy as np
import pytest
import torch
from device_federation import PLAIN, emulated, initial, kind, mix, trained
from small_federation import drawn, stored, world

from fedsim.core.serialization import dump, load
from fedsim.errors import TooFewAnswers
from fedsim.federated.averaged_round import AveragedState
from fedsim.federated.client_work import Train
from fedsim.fleet.timed.buffered import weight_of
from fedsim.fleet.timed.state import ANSWERED, LATE, ClockState
from fedsim.methods.fedavg import FedAvg

EVERY = [8] * 12
IMAGE = 3 * 2 * (36 * 16 + 216 * 4 + 240 + 30)  # FLOPs of training on one image


def played(made, rounds: int):  # type: ignore[no-untyped-def]
    """The state after some rounds of federated averaging."""
    state = AveragedState.begin(made.setting, initial(made))
    for r in range(rounds + 1):
        made.fleet.open(r)
        if made.fleet.emulation is None:
            state, _ = FedAvg().round(made.setting, state, made.fleet, r)
        else:
            with made.fleet.emulation.playing(r, 0):
                state, _ = FedAvg().round(made.setting, state, made.fleet, r)
    return state


def test_equal_devices_with_full_buffers_are_federated_averaging_weight_for_weight() -> None:
    made = emulated(mix(kind()), EVERY, mode="buffered", concurrency=4, buffer=4, max_staleness=10)
    made.setting = replace(made.setting, cohort=4)
    plain = world(stored(*drawn(EVERY)), training=PLAIN, cohort=4)
    one, other = played(made, 3), played(plain, 3)
    for key, value in other.shared.items():
        assert torch.equal(one.shared[key], value), key
    assert made.fleet.emulation.log.staleness == [0] * 4
    assert made.fleet.emulation.state.flights == []


def test_answers_of_staleness_one_by_hand() -> None:
    """Two clients train at once and each answer is a step: from round 2 on each answers to the model before the newest."""
    fast, slow = kind("fast"), kind("slow", flops=0.6e7)
    made = emulated(mix(fast, slow, rows=[0, 1]), [8, 8], mode="buffered", concurrency=2, buffer=1, max_staleness=10)
    first = initial(made)
    one = trained(made, 1)
    assert one.clients == (0,)
    assert made.fleet.emulation.log.staleness == [0]
    second = {key: (one.total[key] / 8).to(value.dtype) if key in one.total else value for key, value in first.items()}
    two = trained(made, 2, shared=second)
    assert two.clients == (1,)
    assert made.fleet.emulation.log.staleness == [1]
    alone = world(stored(*drawn([8, 8])), training=PLAIN)
    alone.fleet.open(2)
    of_first = alone.fleet.run(Train.at(alone.setting, 2), [1], first)
    for key, value in two.total.items():
        if key.startswith("buf/"):  # of one answer, whatever its weight
            torch.testing.assert_close(value, of_first.total[key], rtol=1e-12, atol=1e-12)
        elif key in second:
            by_hand = 8 * second[key] + (of_first.total[key] - 8 * first[key]) / sqrt(2)
            torch.testing.assert_close(value, by_hand.double(), rtol=1e-12, atol=1e-12)
    assert two.total["n/images"] == 8


def test_variances_of_norms_never_fall_below_0() -> None:
    kinds = [kind(str(k), flops=1e7 / (k + 1)) for k in range(4)]
    made = emulated(mix(*kinds, rows=[k % 4 for k in range(12)]), EVERY, mode="buffered", concurrency=8, buffer=2, max_staleness=10)
    state = played(made, 12)
    assert made.fleet.emulation.log.staleness != [0, 0]
    assert all((value >= 0).all() for key, value in state.shared.items() if key.endswith("running_var"))


def test_the_weight_of_staleness() -> None:
    assert [weight_of(tau) for tau in (0, 3, 8)] == [1, 0.5, 1 / 3]


def test_answers_come_in_the_order_of_time_and_the_clock_never_goes_back() -> None:
    kinds = [kind(str(k), flops=1e7 / (k + 1)) for k in range(4)]
    made = emulated(mix(*kinds, rows=[k % 4 for k in range(12)]), EVERY, mode="buffered", concurrency=6, buffer=2, max_staleness=10)
    before, seen = 0.0, []
    for r in range(1, 8):
        reply = trained(made, r)
        state, log = made.fleet.emulation.state, made.fleet.emulation.log
        assert len(reply.clients) == len(log.staleness) == 2
        assert state.seconds >= before
        assert len(state.flights) <= 6
        assert all(flight.ends >= state.seconds for flight in state.flights)
        assert set(state.versions) == {flight.version for flight in state.flights}
        assert len(state.versions) <= 11
        before = state.seconds
        seen += log.staleness
    assert max(seen) >= 1


def test_who_is_too_stale_is_dropped_and_paid() -> None:
    fast, slow = kind("fast"), kind("slow", flops=1e5)
    rows = [1, 1, *[0] * 10]
    made = emulated(mix(fast, slow, rows=rows), EVERY, mode="buffered", concurrency=12, buffer=2, max_staleness=1)
    late, seen = 0, []
    for r in range(1, 90):
        trained(made, r)
        seen += made.fleet.emulation.log.staleness
        late += made.fleet.emulation.log.values(0.0)["late"]
        bills = made.fleet.account.bills
        for client, status in made.fleet.emulation.log.status.items():
            if status == LATE:  # it trained and sent, all for nothing
                assert bills[client].train_flops == 8 * IMAGE
                assert bills[client].bytes_up == bills[client].bytes_down > 0
                assert bills[client].memory > 0
        assert len(made.fleet.emulation.state.versions) <= 1  # no model is kept for answers that will be dropped
    assert late >= 2
    assert max(seen) <= 1


def test_a_clock_in_flight_goes_through_a_checkpoint() -> None:
    def half(made, rounds):  # type: ignore[no-untyped-def]
        return [trained(made, r) for r in rounds][-1]

    def new():  # type: ignore[no-untyped-def]
        kinds = [kind(str(k), flops=1e7 / (k + 1), fails=0.1) for k in range(3)]
        return emulated(mix(*kinds, rows=[k % 3 for k in range(12)]), EVERY, mode="buffered", concurrency=5, buffer=2, max_staleness=10)

    whole, cut = new(), new()
    expected = half(whole, range(1, 7))
    half(cut, range(1, 4))
    held = load(*dump(cut.fleet.emulation.state.copy()))
    assert isinstance(held, ClockState)
    assert held.flights
    on = new()
    on.fleet.emulation.state = held
    found = half(on, range(4, 7))
    assert found.clients == expected.clients
    for key, value in expected.total.items():
        assert torch.equal(found.total[key], value), key
    assert on.fleet.emulation.state.seconds == whole.fleet.emulation.state.seconds


def test_clients_that_fail_are_replaced_and_answers_still_fill_the_buffer() -> None:
    made = emulated(mix(kind(fails=0.4)), [8] * 30, mode="buffered", concurrency=6, buffer=4, max_staleness=10)
    failed = 0
    for r in range(1, 8):
        assert len(trained(made, r).clients) == 4
        failed += made.fleet.emulation.log.values(0.0)["failed"]
    assert failed > 0


def test_where_fewer_can_train_than_the_buffer_holds_the_round_takes_what_there_is() -> None:
    small = kind("small", memory=1.0)
    made = emulated(mix(small, kind("enough"), rows=[0, 1, 1, 1]), [8] * 4, mode="buffered", concurrency=4, buffer=4, max_staleness=2)
    for r in (1, 2):
        assert trained(made, r).clients == (1, 2, 3)
        assert set(made.fleet.account.bills) == {1, 2, 3}


def test_the_status_of_a_client_is_what_came_of_it_last() -> None:
    made = emulated(mix(kind(available=0.5)), [8] * 24, mode="buffered", concurrency=4, buffer=4, max_staleness=5)
    for r in range(1, 6):
        reply = trained(made, r)
        assert all(made.fleet.emulation.log.status[client] == ANSWERED for client in reply.clients)


def test_with_nobody_to_train_a_round_is_tried_again_later() -> None:
    made = emulated(mix(kind(memory=1.0)), mode="buffered", concurrency=2, buffer=1, max_staleness=1)
    with pytest.raises(TooFewAnswers, match="no client could be asked"):
        trained(made)
    assert made.fleet.emulation.state.seconds == 60
    assert np.isfinite(made.fleet.emulation.state.seconds)
