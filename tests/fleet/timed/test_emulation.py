"""Devices between a method and its fleet: clocks by hand, limits of memory, deadlines, failures and who is asked."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from device_federation import PLAIN, SIZES, emulated, initial, kind, mix, trained
from small_federation import drawn, masked, stored, world

from fedsim.core.keys import GATE
from fedsim.core.types import Feed
from fedsim.costs import flops
from fedsim.devices.sparse_time import MEASURED
from fedsim.errors import BadInput, TooFewAnswers
from fedsim.federated.client_work import Train
from fedsim.fleet.accounting import ClientCosts
from fedsim.fleet.messages import Call, PackResult
from fedsim.fleet.packed import PackedFleet
from fedsim.fleet.serial import SerialFleet
from fedsim.fleet.timed.preview import preview
from fedsim.fleet.timed.state import ANSWERED, FAILED, LATE, UNAVAILABLE, UNFIT

IMAGE = 3 * 2 * (36 * 16 + 216 * 4 + 240 + 30)  # FLOPs of training on one image


def same(one, other) -> None:  # type: ignore[no-untyped-def]
    assert one.total.keys() == other.total.keys()
    for key, value in one.total.items():
        assert torch.equal(value, other.total[key]), key


def without_devices(clients: list[int], training=PLAIN):  # type: ignore[no-untyped-def]
    """What the same clients send where nobody has a device."""
    made = world(stored(*drawn(SIZES)), training=training)
    made.fleet.open(1)
    return made.fleet.run(Train.at(made.setting, 1), clients, initial(made))


# ---- the clock


def test_the_clock_of_two_clients_by_hand() -> None:
    slow = kind("slow", flops=1e4, down=1e4, up=2e4, latency=0.5, overhead=0.25, power=2.0, power_radio=3.0, power_idle=0.5)
    fast = kind("fast", flops=1e6, down=1e6, up=1e6, power=5.0, power_idle=0.125)
    made = emulated(mix(slow, fast, rows=[0, 1]), sizes=[7, 9])
    trained(made, clients=[0, 1])
    bills, log = made.fleet.account.bills, made.fleet.emulation.log
    sent = bills[0].bytes_down
    assert sent == bills[0].bytes_up == bills[1].bytes_down
    by_hand = [
        (0.5 + 8 * sent / 1e4) + (7 * IMAGE / 1e4 + 2 * 0.25) + (0.5 + 8 * sent / 2e4),
        8 * sent / 1e6 + 9 * IMAGE / 1e6 + 8 * sent / 1e6,
    ]
    assert [log.seconds[k] for k in (0, 1)] == pytest.approx(by_hand, rel=1e-14)
    assert log.values(made.fleet.emulation.state.seconds)["clock"] == by_hand[0]
    radio = 3.0 * (1.0 + 8 * sent / 1e4 + 8 * sent / 2e4)
    assert log.joules[0] == pytest.approx(2.0 * (7 * IMAGE / 1e4 + 0.5) + radio, rel=1e-14)
    assert log.joules[1] == pytest.approx(5.0 * 9 * IMAGE / 1e6 + 0.125 * (by_hand[0] - by_hand[1]), rel=1e-14)


@pytest.mark.parametrize(("sparse", "share"), [("none", lambda d: 1.0), ("ideal", lambda d: d), ("measured", None)])
def test_time_of_a_masked_model_by_its_layers(sparse, share) -> None:
    made = emulated(mix(kind(sparse=sparse)))
    shared = masked(made.setting, 0.3).shared
    trained(made, clients=[0], shared=shared)
    layers, total = {"conv1": (36, 16), "conv2": (216, 4), "fc1": (240, 1), "fc2": (30, 1)}, 0.0
    for name, (weights, positions) in layers.items():
        mask = shared.get(f"mask/{name}.weight")
        density = 1.0 if mask is None else float(mask.sum()) / weights
        known = sorted(MEASURED)
        curve = np.interp(np.log(density), np.log(known), [MEASURED[each] for each in known])
        total += 8 * 3 * 2 * weights * positions * (share(density) if share else curve)
    received, sent = made.fleet.account.bills[0].bytes_down, made.fleet.account.bills[0].bytes_up
    assert made.fleet.emulation.log.seconds[0] == pytest.approx(total / 1e7 + 8 * (received + sent) / 1e12, rel=1e-12)


def test_growth_probes_are_dense_work_and_two_exchanges_of_a_round_add_up() -> None:
    made = emulated(mix(kind(sparse="ideal")))
    shared, feed = masked(made.setting, 0.3).shared, Feed("train", steps=1, batch=4, dense_gradient_layers=("fc1",))
    kept = int(shared["mask/fc1.weight"].sum())
    made.fleet.open(1)
    with made.fleet.emulation.playing(1, 0):
        for _ in range(2):
            made.fleet.run(Train((feed,), lr=0.1), [0], shared)
    cost = flops.feed_flops(made.setting.model_profile, 4, _kept(shared), "train", ("fc1",)).total
    assert cost > flops.feed_flops(made.setting.model_profile, 4, _kept(shared)).total
    assert kept < 240
    assert made.fleet.emulation.log.seconds[0] == pytest.approx(2 * cost / 1e7, rel=1e-4)
    assert made.fleet.emulation.state.seconds == made.fleet.emulation.log.seconds[0]


def _kept(shared) -> dict[str, int]:  # type: ignore[no-untyped-def]
    return {key[5:].removesuffix(".weight"): int(value.sum()) for key, value in shared.items() if key.startswith("mask/")}


def test_a_preview_is_what_clients_are_charged_in_the_end() -> None:
    made = emulated(mix(kind()), sizes=[3, 8, 5, 8, 2, 8])
    shared, foreseen = masked(made.setting, 0.3).shared, {}
    for r in (1, 2):
        made.fleet.open(r)
        call = Call(Train.at(made.setting, r), list(range(6)), shared, {}, made.setting.net)
        for client, cost, up in zip(range(6), *(lambda found: (found.costs, found.up))(preview(made.fleet, call)), strict=True):
            foreseen[client] = (cost.train_flops, cost.memory, cost.samples, cost.steps, up)
        with made.fleet.emulation.playing(r, 0):
            made.fleet.run(call.work, call.clients, shared)
        charged = {client: (bill.train_flops, bill.memory, bill.samples) for client, bill in made.fleet.account.bills.items()}
        assert charged == {client: found[:3] for client, found in foreseen.items()}
        assert [made.fleet.account.bills[client].bytes_up for client in range(6)] == [found[4] for found in foreseen.values()]
        assert [found[3] for found in foreseen.values()] == [1, 2, 2, 2, 1, 2]


@dataclass(frozen=True)
class Divides(Train):
    """A work that divides by what it counted itself, which without steps is nothing."""

    def init_state(self, net, sent):  # type: ignore[no-untyped-def]
        return super().init_state(net, sent) | {"n/seen": torch.zeros((), dtype=torch.float64)}

    def step(self, net, sent, state, batch):  # type: ignore[no-untyped-def]
        trained = {key: value for key, value in state.items() if key != "n/seen"}
        state, loss = super().step(net, sent, trained, batch)
        return state | {"n/seen": torch.ones((), dtype=torch.float64)}, loss

    def finish(self, net, sent, state):  # type: ignore[no-untyped-def]
        report = super().finish(net, sent, {key: value for key, value in state.items() if key != "n/seen"})
        return replace(report, total=report.total | {"n/mean": 1 / state["n/seen"] - 1 / state["n/seen"] + 1})


def test_a_work_that_cannot_be_summed_without_steps_is_previewed_all_the_same() -> None:
    made = emulated(mix(kind()))
    made.fleet.open(1)
    with made.fleet.emulation.playing(1, 0):
        reply = made.fleet.run(Divides.at(made.setting, 1), [0, 1], initial(made))
    assert reply.total["n/mean"] == 2


@pytest.mark.parametrize("fleet", [SerialFleet, PackedFleet])
def test_devices_change_nothing_that_is_computed_where_all_answer(fleet) -> None:
    made = emulated(mix(kind()))
    same(trained(made), without_devices(list(range(len(SIZES)))))
    assert made.fleet.emulation.log.count(ANSWERED) == len(SIZES)


@dataclass(frozen=True)
class Spends(Train):
    """Training, and as much again beside the model."""

    extra_flops: int = 5_000_000


def test_what_a_work_spends_beside_the_model_is_dense_work() -> None:
    made = emulated(mix(kind(sparse="ideal")))
    for r, (work, spent) in enumerate([(Spends, 5_000_000), (Train, 0)], 1):
        made.fleet.open(r)
        with made.fleet.emulation.playing(r, 0):
            made.fleet.run(work.at(made.setting, r), [0], initial(made))
        assert made.fleet.emulation.log.seconds[0] == pytest.approx((8 * IMAGE + spent) / 1e7, rel=1e-4)


def test_channels_that_are_closed_save_time_on_every_device() -> None:
    made = emulated(mix(kind(sparse="none")))
    gates = torch.ones(sum(made.setting.net.channels.widths), dtype=torch.bool)
    gates[1:3] = False
    made.fleet.open(1)
    call = Call(Train.at(made.setting, 1), [0], initial(made) | {GATE: gates}, {}, made.setting.net)
    (cost,) = preview(made.fleet, call).costs
    assert cost.train_flops < 8 * IMAGE
    assert sum(cost.dense_equivalent.values()) == cost.train_flops
    assert set(cost.dense_equivalent) == {1.0}


def test_costs_that_were_foreseen_do_not_stand_where_masks_are_a_clients_own() -> None:
    made = emulated(mix(kind()))
    made.fleet.open(1)
    call = Call(Train.at(made.setting, 1), [0], masked(made.setting, 0.3).shared, {}, made.setting.net)
    order, found = made.fleet.order(call), preview(made.fleet, call)
    wrong = {0: (ClientCosts(train_flops=1), found.up[0])}
    answer = PackResult(order.sum(), [0], loss={0: 1.0}, up={0: found.up[0]})
    assert made.fleet.account.charge(order, [0], {}, answer, np.zeros(1, int), wrong).each()[0].train_flops == 1
    answer.ones = {0: {"fc1.weight": 7}}
    assert made.fleet.account.charge(order, [0], {}, answer, np.zeros(1, int), wrong).each()[0].train_flops > 1


def test_a_report_without_a_price_is_refused() -> None:
    made = emulated(mix(kind()))
    made.fleet.open(1)
    order = made.fleet.order(Call(Train.at(made.setting, 1), [0, 1], made.setting.net.initial, {}, made.setting.net))
    answer = PackResult(order.sum(), [0, 1], loss={0: 1.0, 1: 1.0}, up={0: 8})
    with pytest.raises(ValueError, match="the report of client 1 has no price"):
        made.fleet.account.charge(order, [0, 1], {}, answer)


# ---- memory


def test_memory_of_one_byte_less_than_needed_is_unfit_and_as_much_is_fit() -> None:
    probe = emulated(mix(kind()))
    trained(probe, clients=[0])
    needed = probe.fleet.account.bills[0].memory
    made = emulated(mix(kind("small", memory=needed - 1), kind("enough", memory=needed), rows=[0, 1, 0, 1, 1, 0]))
    reply = trained(made, clients=[0, 1, 2, 3, 4, 5])
    assert reply.clients == (1, 3, 4)
    assert made.fleet.emulation.log.count(UNFIT) == 3
    assert set(made.fleet.account.bills) == {1, 3, 4}
    same(reply, without_devices([1, 3, 4]))


def test_places_of_unfit_clients_go_to_others() -> None:
    small = kind("small", memory=1.0)
    made = emulated(mix(small, kind("enough"), rows=[0, 0, 0, 1, 1, 1]))
    made.setting = replace(made.setting, cohort=3)
    assert trained(made).clients == (3, 4, 5)


def test_places_go_on_until_enough_fit_and_none_is_passed_over() -> None:
    rows = [0] * 9 + [1] + [0] * 9 + [1]  # two of twenty clients fit
    made = emulated(mix(kind("small", memory=1.0), kind("enough"), rows=rows), [8] * 20)
    made.setting = replace(made.setting, cohort=2)
    for r in range(1, 6):
        assert trained(made, r).clients == (9, 19)


def test_an_unfit_client_can_be_an_error_that_says_how_much_is_missing() -> None:
    made = emulated(mix(kind("small", memory=1000.0)), unfit="error")
    with pytest.raises(BadInput, match=r"client 0 \(small\) has 1,000 bytes for Train, which needs [\d,]+: [\d,]+ bytes are missing"):
        trained(made)


def test_batches_are_halved_until_they_fit_and_the_others_are_as_before() -> None:
    probes = {}
    for batch in (1, 2, 4):
        probe = emulated(mix(kind()), training=replace(PLAIN, batch=batch))
        trained(probe, clients=[0])
        probes[batch] = probe.fleet.account.bills[0].memory
    made = emulated(mix(kind(), kind("half", memory=probes[2]), kind("one", memory=probes[1]), rows=[0, 1, 2, 0, 1, 2]), unfit="fit")
    reply = trained(made)
    assert reply.clients == (0, 1, 2, 3, 4, 5)
    assert made.fleet.emulation.log.batches == {1: 1, 2: 2, 4: 1, 5: 2}
    whole = {key: torch.zeros_like(value) for key, value in reply.total.items()}
    for batch, clients in {4: [0, 3], 2: [1, 4], 1: [2, 5]}.items():
        for key, value in without_devices(clients, replace(PLAIN, batch=batch)).total.items():
            whole[key] += value
    for key, value in reply.total.items():
        torch.testing.assert_close(value, whole[key], rtol=1e-9, atol=1e-9)
    assert [made.fleet.account.bills[k].memory for k in (0, 1, 2)] == [probes[4], probes[2], probes[1]]


def test_a_client_whose_memory_holds_no_image_is_unfit_whatever_the_batch() -> None:
    made = emulated(mix(kind(), kind("none", memory=10.0), rows=[0, 1]), sizes=[8, 8], unfit="fit")
    assert trained(made).clients == (0,)


def test_who_took_the_place_of_an_unfit_client_has_it_for_the_round() -> None:
    small = kind("small", memory=1.0)
    made = emulated(mix(small, kind("enough"), rows=[0, 0, 0, 1, 1, 1]))
    work = Train.at(made.setting, 1)
    made.fleet.open(1)
    with made.fleet.emulation.playing(1, 0):
        asked = made.fleet.pick(3, 1)
        first = made.fleet.run(work, asked, initial(made)).clients
        assert made.fleet.run(work, asked, initial(made)).clients == first == (3, 4, 5)


def test_after_a_round_with_rows_for_each_client_those_that_were_too_small_are_not_asked() -> None:
    small = kind("small", memory=1.0)
    made = emulated(mix(small, kind("enough"), rows=[0, 1] * 10), [8] * 20)
    work, emulation = Train.at(made.setting, 1), made.fleet.emulation
    for r in (1, 2):
        made.fleet.open(r)
        with emulation.playing(r, 0):
            asked = made.fleet.pick(8, r)
            own = {"n/own": torch.zeros(len(asked))}
            reply = made.fleet.run(work, asked, initial(made), own)
        assert all(client % 2 for client in reply.clients)
        assert len(reply.clients) < 8 if r == 1 else len(reply.clients) == 8
    assert emulation.log.count(UNFIT) > 0


# ---- who answers in time


def three(**rules):  # type: ignore[no-untyped-def]
    """Clients that take about 1, 2 and 3 times as long."""
    kinds = [kind(name, flops=1e6 / factor) for factor, name in ((1, "a"), (2, "b"), (3, "c"))]
    return emulated(mix(*kinds, rows=[0, 1, 2]), [8] * 3, **rules)


def test_a_deadline_between_two_arrivals_counts_those_before_it() -> None:
    second = 8 * IMAGE / 1e6
    made = three(mode="deadline", deadline=1.5 * second)
    reply = trained(made)
    assert reply.clients == (0,)
    same(reply, without_devices_of([8] * 3, [0]))
    log, bills = made.fleet.emulation.log, made.fleet.account.bills
    assert log.status == {0: ANSWERED, 1: LATE, 2: LATE}
    assert made.fleet.emulation.state.seconds == 1.5 * second
    assert log.seconds[2] == pytest.approx(3 * second, rel=1e-4)  # it goes on to its end
    assert bills[1].bytes_down == bills[0].bytes_down
    assert bills[1].train_flops == bills[0].train_flops
    assert bills[1].samples == 0


def without_devices_of(sizes: list[int], clients: list[int]):  # type: ignore[no-untyped-def]
    made = world(stored(*drawn(sizes)), training=PLAIN)
    made.fleet.open(1)
    return made.fleet.run(Train.at(made.setting, 1), clients, initial(made))


def test_with_all_answers_before_the_deadline_the_round_lasts_as_long_as_the_slowest() -> None:
    made = three(mode="deadline", deadline=1e9)
    assert trained(made).clients == (0, 1, 2)
    assert made.fleet.emulation.state.seconds == made.fleet.emulation.log.seconds[2]


def test_fewer_answers_than_the_least_cost_time_and_are_too_few() -> None:
    second = 8 * IMAGE / 1e6
    made = three(mode="deadline", deadline=1.5 * second, least=2)
    with pytest.raises(TooFewAnswers, match="1 of 3 clients answered; at least 2"):
        trained(made)
    assert made.fleet.emulation.state.seconds == 1.5 * second
    assert made.fleet.emulation.log.joules.keys() == {0, 1, 2}
    bills = made.fleet.account.bills
    assert bills[0].train_flops == bills[1].train_flops == 8 * IMAGE  # the answer that is not used is paid too
    assert bills[0].bytes_up == bills[1].bytes_up > 0


def test_a_repeated_round_may_ask_again_whoever_failed_before() -> None:
    made = emulated(mix(kind(fails=0.6)), [8, 8, 8], least=3)
    made.fleet.open(1)
    emulation = made.fleet.emulation
    for attempt in range(60):
        try:
            with emulation.playing(1, attempt):
                reply = made.fleet.run(Train.at(made.setting, 1), made.fleet.pick(3, 1), initial(made))
            break
        except TooFewAnswers:
            continue
    assert reply.clients == (0, 1, 2)
    assert attempt > 0
    failed = emulation.log.values(0.0)["failed"]
    assert attempt <= failed <= 3 * attempt
    assert emulation.log.columns()["status"][1].tolist() == [ANSWERED] * 3


def test_oversampling_asks_more_and_takes_the_first() -> None:
    rows = [5, 3, 1, 0, 2, 4]  # the client of kind k takes k + 1 times as long
    made = emulated(mix(*(kind(str(k), flops=1e6 / (k + 1), power=1.0) for k in range(6)), rows=rows), mode="oversample", extra=1.0)
    made.setting = replace(made.setting, cohort=3)
    reply = trained(made)
    assert reply.clients == (2, 3, 4)
    same(reply, without_devices([2, 3, 4]))
    log, second = made.fleet.emulation.log, 8 * IMAGE / 1e6
    assert made.fleet.emulation.state.seconds == pytest.approx(3 * second, rel=1e-4)
    assert [log.status[k] for k in range(6)] == [LATE, LATE, ANSWERED, ANSWERED, ANSWERED, LATE]
    assert log.joules[0] == pytest.approx(3 * second, rel=1e-3)  # told to end when the third answer was there
    assert made.fleet.account.bills[0].train_flops == pytest.approx(made.fleet.account.bills[3].train_flops * 3 / 6, rel=1e-3)


def test_each_cohort_of_a_round_has_the_size_it_was_picked_with() -> None:
    made = emulated(mix(kind()), [8] * 20, mode="oversample", extra=0.5)
    work = Train.at(made.setting, 1)
    made.fleet.open(1)
    with made.fleet.emulation.playing(1, 0):
        large, small = made.fleet.pick(8, 1), made.fleet.pick(4, 1)
        assert [len(large), len(small)] == [12, 6]
        assert len(made.fleet.run(work, small, initial(made)).clients) == 4
        assert len(made.fleet.run(work, [0, 1, 2, 3, 4, 5, 6], initial(made)).clients) > 4  # not picked: all that are still there


def test_the_least_is_not_asked_of_fewer_clients() -> None:
    made = emulated(mix(kind()), least=3)
    made.fleet.open(1)
    with made.fleet.emulation.playing(1, 0):
        assert len(made.fleet.run(Train.at(made.setting, 1), made.fleet.pick(1, 1), initial(made)).clients) == 1


def test_who_would_have_failed_after_the_deadline_is_late() -> None:
    made = emulated(mix(kind(fails=0.9)), [8] * 40, mode="deadline", deadline=0.5 * 8 * IMAGE / 1e7)
    with pytest.raises(TooFewAnswers):
        trained(made)
    log = made.fleet.emulation.log
    assert log.count(LATE) > 5
    assert all(log.seconds[client] <= 0.5 * 8 * IMAGE / 1e7 for client, status in log.status.items() if status == FAILED)


def test_as_many_are_asked_as_the_share_says() -> None:
    made = emulated(mix(kind()), mode="oversample", extra=0.3, sizes=[8] * 20)
    made.fleet.open(1)
    with made.fleet.emulation.playing(1, 0):
        assert len(made.fleet.pick(10, 1)) == 13
        assert len(made.fleet.pick(20, 1)) == 20


def test_clients_that_fail_are_not_in_the_sum_and_their_part_is_paid() -> None:
    made = emulated(mix(kind(fails=0.5, power=1.0)), sizes=[8] * 40)
    reply = trained(made)
    log = made.fleet.emulation.log
    failed = {client for client, status in log.status.items() if status == FAILED}
    assert 8 < len(failed) < 32
    assert set(reply.clients) == set(range(40)) - failed
    same(reply, without_devices_of([8] * 40, list(reply.clients)))
    second = 8 * IMAGE / 1e7
    assert all(0 <= log.seconds[client] <= second * 1.01 for client in failed)
    assert all(made.fleet.account.bills[client].bytes_up == 0 for client in failed)
    assert np.std([log.seconds[client] for client in failed]) > 0.1 * second
    again = emulated(mix(kind(fails=0.5, power=1.0)), sizes=[8] * 40)
    assert trained(again).clients == reply.clients


def test_the_share_that_fails_is_the_kinds_over_many_rounds() -> None:
    made, rounds = emulated(mix(kind(fails=0.2)), sizes=[2] * 40), 25
    failed = 0
    for r in range(1, rounds + 1):
        trained(made, r)
        failed += made.fleet.emulation.log.count(FAILED)
    assert abs(failed / (40 * rounds) - 0.2) < 3 * np.sqrt(0.16 / (40 * rounds))


def test_who_is_late_takes_no_further_part_in_the_round_and_each_exchange_has_its_own_wait() -> None:
    second = 8 * IMAGE / 1e6
    made = three(mode="deadline", deadline=1.5 * second)
    work = Train.at(made.setting, 1)
    made.fleet.open(1)
    with made.fleet.emulation.playing(1, 0):
        assert made.fleet.run(work, [0, 1, 2], initial(made)).clients == (0,)
        assert made.fleet.run(work, [0, 1, 2], initial(made)).clients == (0,)
    assert made.fleet.emulation.state.seconds == pytest.approx(2.5 * second, rel=1e-4)


# ---- who is asked


def test_the_first_cohort_is_the_one_without_devices() -> None:
    made = emulated(mix(kind()), sizes=[8] * 20)
    made.fleet.open(3)
    with made.fleet.emulation.playing(3, 0):
        assert made.fleet.pick(5, 3) == made.fleet.draw(5, 3)
    assert made.fleet.pick(5, 4) == made.fleet.draw(5, 4)


def test_who_is_away_is_missing_or_replaced() -> None:
    for select in ("uniform", "available"):
        made = emulated(mix(kind(available=0.5)), sizes=[8] * 60, select=select)
        made.fleet.open(1)
        with made.fleet.emulation.playing(1, 0):
            asked = made.fleet.pick(20, 1)
        log = made.fleet.emulation.log
        named, there = made.fleet.draw(20, 1), made.fleet.emulation.rules.mix.available(0, np.arange(60), 1, 0.0)
        assert there[asked].all()
        assert len(asked) == (20 if select == "available" else there[named].sum())
        assert set(named) <= set(asked) | set(log.status)
        assert all(not there[client] for client, status in log.status.items() if status == UNAVAILABLE)


def test_where_nobody_is_there_the_server_asks_again_a_minute_later() -> None:
    made = emulated(mix(kind(available={"share": 1e-9, "period": 1000.0})))
    made.fleet.open(1)
    with pytest.raises(TooFewAnswers, match="no client could be asked"), made.fleet.emulation.playing(1, 0):
        made.fleet.pick(3, 1)
    assert made.fleet.emulation.state.seconds == 60
    for attempt, seconds in ((1, 60 + 120), (2, 60 + 120 + 240)):
        with pytest.raises(TooFewAnswers), made.fleet.emulation.playing(1, attempt):
            made.fleet.pick(3, 1)
        assert made.fleet.emulation.state.seconds == seconds  # it waits longer each time


def test_the_fastest_have_fast_links_too() -> None:
    for field in ("down", "up"):
        made = emulated(mix(kind("slow", **{field: 1e5}), kind("fast"), rows=[0, 0, 1, 0, 1, 0]), select="fastest")
        made.setting = replace(made.setting, cohort=2)
        assert trained(made).clients == (2, 4)


def test_clients_that_were_not_picked_are_asked_whether_they_are_there() -> None:
    made = emulated(mix(kind(available=0.5)), [8] * 40)
    made.fleet.open(1)
    with made.fleet.emulation.playing(1, 0):
        reply = made.fleet.run(Train.at(made.setting, 1), made.fleet.pick(None, 1), initial(made))
    there = made.fleet.emulation.rules.mix.available(0, np.arange(40), 1, 0.0)
    assert reply.clients == tuple(np.flatnonzero(there))
    assert made.fleet.emulation.log.count(UNAVAILABLE) == (~there).sum()


def test_only_those_named_before_the_last_one_that_is_asked_count_as_away() -> None:
    made = emulated(mix(kind(available=0.5)), [8] * 100, select="available")
    made.fleet.open(1)
    with made.fleet.emulation.playing(1, 0):
        made.fleet.pick(10, 1)
    assert made.fleet.emulation.log.count(UNAVAILABLE) < 30


def test_the_fastest_by_steps_are_not_those_with_fewest_images() -> None:
    training = replace(PLAIN, epochs=0, steps=5)
    made = emulated(mix(kind("slow", flops=1e6), kind("fast", flops=1.2e6), rows=[0, 1]), [2, 20], training, select="fastest")
    made.setting = replace(made.setting, cohort=1)
    made.fleet.open(1)
    with made.fleet.emulation.playing(1, 0):
        assert made.fleet.pick(1, 1) == [0]  # five batches of two images, and not of four
    overhead = emulated(mix(kind("slow", overhead=1.0), kind("fast"), rows=[0, 1]), [2, 20], training, select="fastest")
    overhead.fleet.open(1)
    with overhead.fleet.emulation.playing(1, 0):
        assert overhead.fleet.pick(1, 1) == [1]


def test_the_fastest_are_chosen_of_those_that_are_there() -> None:
    kinds = [kind(str(k), flops=1e6 * (k + 1)) for k in range(6)]
    made = emulated(mix(*kinds, rows=[3, 0, 5, 1, 4, 2]), select="fastest")
    made.setting = replace(made.setting, cohort=2)
    assert trained(made).clients == (2, 4)


def test_a_rule_of_the_jobs_own() -> None:
    def richest(clients, wanted, r, devices):  # type: ignore[no-untyped-def]
        return clients[np.argsort(-devices.memory)][:wanted]

    kinds = [kind(str(k), memory=1e8 * (k + 1)) for k in range(6)]
    made = emulated(mix(*kinds, rows=[3, 0, 5, 1, 4, 2]), select="own", own_select=richest)
    made.setting = replace(made.setting, cohort=2)
    assert trained(made).clients == (2, 4)


@pytest.mark.parametrize("answer", [[0], [0, 0], [0, 99], ["a", "b"]])
def test_a_rule_that_returns_something_else_is_refused(answer) -> None:
    made = emulated(mix(kind()), select="own", own_select=lambda *_: answer)
    made.setting = replace(made.setting, cohort=2)
    with pytest.raises(BadInput, match=r"\[cohort\] select: it returned .*; it must return 2 distinct clients of the 6"):
        trained(made)


def test_nothing_is_timed_between_rounds() -> None:
    made = emulated(mix(kind()))
    made.fleet.open(1)
    made.fleet.run(Train.at(made.setting, 1), [0, 1], initial(made))
    assert made.fleet.emulation.state.seconds == 0
    assert not made.fleet.emulation.log.status
