"""One client stands for all that are alike, and for none that is not."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from small_federation import stored, world
from torch import Tensor

from fedsim.core.keys import COUNT, SELECTED
from fedsim.federated.client_work import Train
from fedsim.federated.protocol import Report
from fedsim.simulation.planning.idle_fleet import IdleFleet, OneForAllFleet

SIZES = (5, 9, 12, 7)


@dataclass(frozen=True)
class Uploads(Train):
    """Only clients with many images send what they trained."""

    def finish(self, net, sent, state) -> Report:
        return replace(super().finish(net, sent, state), each={SELECTED: sent.n > 8})


def made(kind: type, work: type[Train]) -> tuple[dict[int, int], dict[str, Tensor]]:
    """Bytes up of each client, and the totals."""
    n, owners = sum(SIZES), torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(SIZES))
    one = world(stored(torch.zeros(n, 1, 4, 4, dtype=torch.uint8), torch.arange(n) % 3, owners), kind=kind)
    one.fleet.open(1)
    reply = one.fleet.run(work.at(one.setting, 1), list(range(len(SIZES))), one.setting.net.initial)
    bills = {client: bill.bytes_up for client, bill in one.fleet.account.bills.items()}
    return bills, reply.total


@pytest.mark.parametrize("work", [Train, Uploads])
def test_one_for_all_sends_what_each_would(work: type[Train]) -> None:
    alone, whole = made(IdleFleet, work), made(OneForAllFleet, work)
    assert whole[0] == alone[0]
    assert len(set(whole[0].values())) == (1 if work is Train else 2)
    for key, value in alone[1].items():
        assert torch.allclose(whole[1][key] / whole[1][COUNT], value / alone[1][COUNT])


def test_a_total_is_as_many_times_what_the_first_of_a_pack_adds() -> None:
    assert made(OneForAllFleet, Train)[1][COUNT] == 2 * SIZES[0] + 2 * SIZES[2]
    assert made(IdleFleet, Train)[1][COUNT] == sum(SIZES)
