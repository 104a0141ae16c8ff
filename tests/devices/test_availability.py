"""Who can be asked, over many rounds and hours, and what a trace must be."""

from __future__ import annotations

import numpy as np
import pytest

from fedsim.devices.availability import Chance, Diurnal
from fedsim.devices.kind import DeviceKind
from fedsim.devices.mix import DeviceMix
from fedsim.devices.trace import read_trace
from fedsim.errors import BadInput

ROUNDS = 10_000


def test_a_chance_holds_over_ten_thousand_rounds_of_one_client() -> None:
    found = [bool(Chance(0.3).at(1, np.array([5]), r, 0.0)[0]) for r in range(ROUNDS)]
    assert abs(np.mean(found) - 0.3) < 3 * np.sqrt(0.21 / ROUNDS)


def test_a_chance_is_drawn_for_each_client_and_round_alone() -> None:
    clients = np.arange(ROUNDS)
    one, next = Chance(0.5).at(1, clients, 1, 0.0), Chance(0.5).at(1, clients, 2, 0.0)
    assert abs((one & next).mean() - 0.25) < 3 * np.sqrt(0.1875 / ROUNDS)
    assert Chance(0.5).at(1, clients[77:78], 1, 0.0)[0] == one[77]


def test_a_daily_pattern_holds_its_share_of_the_day_for_each_client_in_one_stretch() -> None:
    day, clients = Diurnal(share=0.25, period=1000.0), np.arange(50)
    hours = np.array([day.at(3, clients, 0, float(second)) for second in range(1000)])  # (1000, 50)
    assert np.abs(hours.mean(0) - 0.25).max() <= 1.5 / 1000
    begins = (hours & ~np.roll(hours, 1, axis=0)).sum(0)
    assert (begins == 1).all()
    assert np.array_equal(hours[0], day.at(3, clients, 9, 2000.0))
    assert len(np.unique(hours.argmax(0))) > 25  # each at hours of its own


def test_kinds_are_available_each_by_its_own_rule() -> None:
    kinds = tuple(DeviceKind(name, 0.5, 1.0, 1.0, 1.0, 1.0, available=rule) for name, rule in {"rare": 0.01, "there": "always"}.items())
    mix = DeviceMix("two", kinds)
    clients = np.arange(2000)
    found, kind = mix.available(0, clients, 4, 0.0), mix.kind_of(0, clients)
    assert found[kind == 1].all()
    assert 0 < found[kind == 0].mean() < 0.05


def test_a_trace_says_who_is_there_and_begins_again_at_its_end(tmp_path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("client,from,until\n1,20,30\n0,0,10\n1,0,5\n")
    trace = read_trace(path, "phone")
    clients = np.arange(4)  # 2 and 3 are as 0 and 1

    def there(second: float) -> list[bool]:
        return trace.at(0, clients, 0, second).tolist()

    assert there(0) == [True, True, True, True]
    assert there(5) == [True, False, True, False]
    assert there(10) == [False] * 4
    assert there(20) == [False, True, False, True]
    assert there(30) == there(0)


WRONG = {
    "gap": ("client,from,until\n0,0,1\n2,0,1\n", ("has gaps", "no row for client 1")),
    "overlap": ("client,from,until\n0,0,5\n0,4,8\n", ("spans of client 0 overlap", "0 to 5 and 4 to 8")),
    "backwards": ("client,from,until\n0,5,5\n", ("line 2", "from 5 until 5")),
    "negative": ("client,from,until\n0,-1,5\n", ("line 2", "begin at 0")),
    "words": ("client,from,until\n0,night,5\n", ("line 2", "'0,night,5'")),
    "no header": ("0,0,5\n", ("first line must be client,from,until",)),
    "no span": ("client,from,until\n", ("has no span",)),
    "empty": ("", ("first line must be",)),
    "for ever": ("client,from,until\n0,0,inf\n", ("line 2",)),
}


@pytest.mark.parametrize(("text", "parts"), WRONG.values(), ids=WRONG)
def test_a_wrong_trace_is_refused(tmp_path, text, parts) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(BadInput) as error:
        read_trace(path, "phone")
    for part in ("trace.csv", *parts):
        assert part in str(error.value)
