"""A rank reads from its part of an order the packs that it was dealt, and packs are made when they are asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_federation import stored, world

from fedsim.core.exact_sum import Sum
from fedsim.core.types import Feed
from fedsim.federated.client_work import Train
from fedsim.fleet.messages import NO_BYTES, Columns, PackResult
from fedsim.fleet.mpi.parts import parts_of, read_part
from fedsim.fleet.mpi.tree_buffer import layout
from fedsim.fleet.packing import Packs, cut_cohort, cuts_of

CLIENTS = [3, 4, 7, 8, 11, 19, 20]
NOBODY = np.zeros(len(CLIENTS), np.int64)
HANDS = [np.array([2, 0]), np.array([1])]  # of packs [3, 4, 7], [8, 11], [19, 20]


def packs(own: bool = False, kept: bool = False, calls: bool = False) -> Packs:
    rows = {"gate/channels": torch.arange(14.0).view(7, 2)} if own else {}
    known = {8: {"own/a": torch.ones(3)}, 19: {"own/a": torch.zeros(3)}} if kept else {}
    return Packs(CLIENTS, cuts_of(7, 3), rows, known, [NOBODY, np.arange(7) if calls else NOBODY])


def test_parts_of_packs_without_anything_of_their_own() -> None:
    parts = parts_of(packs(), HANDS)
    assert [read_part(part) for part in parts] == [([[19, 20], [3, 4, 7]], [{}, {}]), ([[8, 11]], [{}])]
    assert [part.nbytes for part in parts] == [8 * (1 + 2 + 5), 8 * (1 + 1 + 2)]


@pytest.mark.parametrize("what", ["own", "kept", "calls"])
def test_parts_say_what_clients_have_for_themselves(what: str) -> None:
    made = packs(**{what: True})
    assert not made.plain
    (first, mine), (second, theirs) = [read_part(part) for part in parts_of(made, HANDS)]
    assert (first, second) == ([[19, 20], [3, 4, 7]], [[8, 11]])
    form = [list(each) for each in layout({"own/a": torch.ones(3)})]
    said = {
        "own": ([["gate/channels", "torch.float32", [2, 2]]], [["gate/channels", "torch.float32", [2, 2]]]),
        "kept": ([form, None], [form, None]),
        "calls": ([[0, 0], [5, 6]], [[0, 0], [3, 4]]),
    }[what]
    assert (mine[0][what], theirs[0][what]) == said


def test_a_pack_is_a_part_of_the_cohort() -> None:
    made = packs(own=True, kept=True, calls=True)
    assert (len(made), made.sizes.tolist()) == (3, [3, 2, 2])
    middle = made[1]
    assert (middle.clients, middle.calls) == ([8, 11], [[0, 0], [3, 4]])
    assert middle.own["gate/channels"].tolist() == [[6, 7], [8, 9]]
    assert [kept and sorted(kept) for kept in middle.kept] == [["own/a"], None]
    assert [pack.clients for pack in made] == cut_cohort(CLIENTS, 3) == [pack.clients for pack in made[:]]
    assert made[-1].clients == [19, 20]
    with pytest.raises(IndexError):
        made[3]


@pytest.mark.parametrize(("clients", "count"), [(7, 3), (16, 4), (3, 9), (1, 1)])
def test_packs_differ_by_one_client_at_most(clients: int, count: int) -> None:
    found = [len(part) for part in np.array_split(np.arange(clients), min(count, clients))]
    assert np.diff(cuts_of(clients, count)).tolist() == found


def test_calls_of_a_round_are_counted_for_each_client() -> None:
    fleet = world(stored(torch.zeros(9, 1, 4, 4, dtype=torch.uint8), torch.arange(9) % 3, torch.arange(9) // 3)).fleet
    work = Train((Feed("train", epochs=1), Feed("probe", epochs=1)), lr=0.1)
    fleet.open(1)
    assert [calls.tolist() for calls in fleet._counted(work, [0, 2])] == [[0, 0]] * 3
    assert [calls.tolist() for calls in fleet._counted(work, [1, 2])] == [[0, 1]] * 3
    assert [calls.tolist() for calls in fleet._counted(replace(work, feeds=work.feeds[:1]), [0, 1, 2])] == [[1, 1, 2]] * 2
    fleet.open(2)
    assert [calls.tolist() for calls in fleet._counted(work, [2])] == [[0]] * 3


def test_answers_in_columns_are_merged_and_not_with_others() -> None:
    shared = {"w/a": torch.zeros(1)}
    one, other = (PackResult(Sum(shared, 1), [k], columns=Columns(np.array([k]), np.array([k / 2]), np.array([k]))) for k in (4, 1))
    one.merge(other)
    assert (one.losses(np.array([1, 4])).tolist(), one.sent_back(np.array([4])).tolist()) == ([0.5, 2.0], [4])
    with pytest.raises(ValueError, match="cannot be merged"):
        one.merge(PackResult(Sum(shared, 1), [7], up={7: 1}))


def test_columns_of_answers_join_and_give_the_rows_of_some_clients() -> None:
    one = Columns.of(np.array([9, 2]), np.array([0.9, 0.2]), np.array([90, -1]))
    both = one.joined(Columns.of(np.array([5]), np.array([0.5]), np.array([50])))
    answer = PackResult(None, columns=both)
    assert answer.losses(np.array([2, 5, 9])).tolist() == [0.2, 0.5, 0.9]
    assert answer.sent_back(np.array([2, 9])).tolist() == [NO_BYTES, 90]
