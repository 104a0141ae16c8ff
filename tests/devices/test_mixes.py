"""Mixes of devices: which kind a client is, how it deviates, and what a wrong file is answered with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedsim.devices.kind import FIELDS
from fedsim.devices.mix import DeviceMix
from fedsim.devices.reading import built_in, read, read_mix
from fedsim.devices.settings import DeviceSettings
from fedsim.errors import BadInput

MANY = np.arange(100_000)
PHONE = "share = 1.0\nflops = 1e9\nmemory = 1e8\ndown = 8e6\nup = 4e6\n"


def written(folder: Path, text: str, name: str = "mine.toml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def refused(call, *parts: str) -> None:
    with pytest.raises(BadInput) as error:
        call()
    for part in parts:
        assert part in str(error.value), str(error.value)


@pytest.mark.parametrize("name", built_in())
def test_every_built_in_mix_has_figures_and_a_source_for_each_kind(name) -> None:
    mix = read_mix(name)
    assert mix.about
    assert sum(kind.share for kind in mix.kinds) == pytest.approx(1)
    for kind in mix.kinds:
        assert kind.source, kind.name
        assert kind.power_idle < kind.power, kind.name


def test_four_kinds_are_a_board_that_holds_a_megabyte_and_three_faster_ones() -> None:
    mix = read_mix("four_kinds")
    assert [kind.memory for kind in mix.kinds] == [1e6, 1e9, 0.5e9, 1e9]
    assert sorted(mix.kinds, key=lambda kind: kind.flops) == list(mix.kinds)


def test_clients_are_of_a_kind_in_proportion_to_its_share() -> None:
    mix = read_mix("phones")
    found = np.bincount(mix.kind_of(7, MANY), minlength=3) / len(MANY)
    sigma = np.sqrt(0.25 / len(MANY))
    assert np.abs(found - [0.3, 0.5, 0.2]).max() < 3 * sigma


def test_a_client_has_the_same_device_alone_and_among_others_and_another_seed_gives_another() -> None:
    mix = read_mix("phones")
    among, alone = mix.of(3, MANY[:50]), mix.of(3, [17])
    assert {name: values[17] for name, values in vars(among).items()} == {name: values[0] for name, values in vars(alone).items()}
    assert (mix.of(4, MANY[:50]).flops != among.flops).any()


def test_spread_is_the_deviation_of_the_logarithm_around_the_kinds_figure() -> None:
    mix = read_mix("phones")
    devices, found = mix.of(0, MANY), []
    for field in ("flops", "down", "up"):
        logarithms = np.log(getattr(devices, field) / np.array([getattr(kind, field) for kind in mix.kinds])[devices.kind])
        found.append(logarithms)
        assert logarithms.mean() == pytest.approx(0, abs=3 * 0.3 / np.sqrt(len(MANY)))
        assert logarithms.std() == pytest.approx(0.3, rel=0.02)
    assert set(np.unique(devices.memory)) == {0.25e9, 0.5e9, 1e9}
    assert np.abs(np.corrcoef(found) - np.eye(3)).max() < 4 / np.sqrt(len(MANY))  # a fast client may have a slow link


def test_without_spread_every_client_of_a_kind_has_its_figures_exactly() -> None:
    mix = read_mix("four_kinds")
    devices = mix.of(0, MANY[:200])
    for number, kind in enumerate(mix.kinds):
        assert set(devices.flops[devices.kind == number]) == {kind.flops}


def test_a_file_of_clients_fixes_kinds_and_figures(tmp_path) -> None:
    clients = written(tmp_path, "client,kind,flops\n1,board,5e7\n0,fast_phone,3e9\n", "clients.csv")
    mix = read(DeviceSettings("four_kinds", clients=clients))
    devices = mix.of(0, [0, 1])
    assert [mix.kinds[number].name for number in devices.kind] == ["fast_phone", "board"]
    assert devices.flops.tolist() == [3e9, 5e7]
    assert devices.memory.tolist() == [1e9, 1e6]
    refused(lambda: mix.check(3), "2 clients", "the job has 3")
    mix.check(2)


def test_a_file_with_all_figures_of_each_client_is_a_mix_of_its_own(tmp_path) -> None:
    text = "client,kind,flops,memory,down,up,power\n1,b,3e9,2e6,1e6,1e6,2\n0,a,1e9,1e6,4e6,2e6,1\n2,b,5e9,2e6,3e6,1e6,4\n"
    mix = read_mix(written(tmp_path, text, "fleet.csv"))
    assert [(kind.name, kind.flops, kind.share) for kind in mix.kinds] == [("a", 1e9, 1 / 3), ("b", 4e9, 2 / 3)]
    devices = mix.of(5, [2, 0])
    assert devices.flops.tolist() == [5e9, 1e9]
    assert devices.power.tolist() == [4, 1]
    assert devices.kind.tolist() == [1, 0]
    refused(lambda: mix.check(4), "3 clients")
    few = written(tmp_path, "client,flops\n0,1e9\n", "few.csv")
    refused(lambda: read_mix(few), "few.csv has no column 'memory'", "flops, memory, down, up")
    assert read_mix(written(tmp_path, "client,flops,memory,down,up\n0,1,1,1,1\n", "one.csv")).names == ["device"]


def test_a_file_of_clients_may_leave_the_kind_to_the_draw(tmp_path) -> None:
    clients = written(tmp_path, "client,memory\n0,5e5\n1,2e6\n", "clients.csv")
    mix = read(DeviceSettings("four_kinds", clients=clients))
    assert mix.of(0, [1, 0]).memory.tolist() == [2e6, 5e5]
    assert mix.kind_of(0, [0, 1]).tolist() == read_mix("four_kinds").kind_of(0, [0, 1]).tolist()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.csv", "computation,communication\n100,2000\n"),
        ("rows.json", '[{"computation": 100, "communication": 2000}]'),
        ("rows.json", '{"device1": {"computation": 100.0, "communication": 2000.0}}'),
    ],
)
def test_capacity_rows_of_fedscale_become_speeds(tmp_path, name, text) -> None:
    settings = DeviceSettings("phones", capacity=written(tmp_path, text, name), reference_flops=6e8)
    devices = read(settings).of(0, [0, 5])
    assert devices.flops.tolist() == [3 * 6e8 / 0.1] * 2
    assert devices.down.tolist() == devices.up.tolist() == [2e6] * 2


def test_clients_are_drawn_from_all_capacity_rows(tmp_path) -> None:
    rows = "\n".join(f"{number},{number}" for number in range(1, 11))
    settings = DeviceSettings("phones", capacity=written(tmp_path, f"computation,communication\n{rows}\n", "c.csv"), reference_flops=1e6)
    found = np.bincount((read(settings).of(0, MANY).up / 1000).round().astype(int), minlength=11)[1:]
    assert np.abs(found / len(MANY) - 0.1).max() < 4 * np.sqrt(0.09 / len(MANY))


def test_a_mix_of_ones_own(tmp_path) -> None:
    path = written(tmp_path, f'[kinds.phone]\n{PHONE}sparse = {{"0.1" = 0.5}}\navailable = 0.5\n')
    kind = read_mix(path).kinds[0]
    assert kind.sparse_time.share(np.array([0.1, 1.0])).tolist() == [0.5, 1.0]
    assert 0.4 < read_mix(path).available(0, MANY[:1000], 1, 0.0).mean() < 0.6


WRONG = {
    "shares": (f"[kinds.a]\n{PHONE}[kinds.b]\n{PHONE}", ("shares of its kinds sum to 2 (a 1, b 1)", "must sum to 1")),
    "negative speed": (f"[kinds.a]\n{PHONE.replace('1e9', '-1e9')}", ("kind 'a': flops = -1000000000.0 must be above 0",)),
    "no link": (f"[kinds.a]\n{PHONE.replace('8e6', '0')}", ("kind 'a': down = 0 must be above 0 (bit/s)",)),
    "not a number": (f"[kinds.a]\n{PHONE}power = nan\n", ("power = nan must be at least 0",)),
    "text for a number": (f"[kinds.a]\n{PHONE}power = '3 W'\n", ("power = '3 W' must be a number",)),
    "unknown field": (f"[kinds.a]\n{PHONE}watts = 3\n", ("kind 'a' has no field 'watts'", *FIELDS)),
    "missing field": ("[kinds.a]\nshare = 1.0\n", ("kind 'a' needs flops, memory, down, up",)),
    "no kind": ("about = 'mine'\n", ("it has no kind",)),
    "unknown section": (f"[kinds.a]\n{PHONE}[fleet]\n", ("there is no 'fleet' in a mix",)),
    "unknown sparse": (f"[kinds.a]\n{PHONE}sparse = 'fast'\n", ("sparse = 'fast' is not known", "none, ideal, measured")),
    "density above 1": (f'[kinds.a]\n{PHONE}sparse = {{"2" = 0.5}}\n', ("the density '2'",)),
    "share of 0": (f'[kinds.a]\n{PHONE}sparse = {{"0.1" = 0.0}}\n', ("sparse at density 0.1 = 0.0",)),
    "never available": (f"[kinds.a]\n{PHONE}available = 0.0\n", ("available = 0.0", "above 0 and at most 1")),
    "day of nothing": (f"[kinds.a]\n{PHONE}available = {{period = 10}}\n", ("available needs a share",)),
    "unknown part of a day": (f"[kinds.a]\n{PHONE}available = {{share = 0.5, hours = 3}}\n", ("no field 'hours'",)),
    "always fails": (f"[kinds.a]\n{PHONE}fails = 1.0\n", ("fails = 1.0 must be at least 0 and below 1",)),
    "no TOML": ("[kinds.a\n", ("is no TOML file",)),
    "no such trace": (f"[kinds.a]\n{PHONE}available = 'night.csv'\n", ("available = 'night.csv'", "No such file")),
}


@pytest.mark.parametrize(("text", "parts"), WRONG.values(), ids=WRONG)
def test_a_wrong_mix_is_refused_with_its_file_and_its_kind(tmp_path, text, parts) -> None:
    refused(lambda: read_mix(written(tmp_path, text)), "mine.toml", *parts)


def test_unknown_names_are_answered_with_those_there_are(tmp_path) -> None:
    refused(lambda: read_mix("four"), "'four' are not known", "four_kinds, phones")
    refused(lambda: read_mix(str(tmp_path / "absent.toml")), "absent.toml: No such file", "four_kinds, phones")
    refused(lambda: read_mix("four_kinds").number("phone"), "no kind 'phone'", "board, single_board_computer, mid_phone, fast_phone")


WRONG_CLIENTS = {
    "unknown kind": ("client,kind\n0,tablet\n", ("line 2", "no kind 'tablet'", "low, mid, high")),
    "unknown column": ("client,kind,colour\n0,low,red\n", ("column 'colour'", "flops")),
    "no client column": ("kind\nlow\n", ("first line must be client,kind",)),
    "two rows": ("client,kind\n0,low\n0,mid\n1,low\n", ("client 0 has two rows",)),
    "a gap": ("client,kind\n0,low\n2,mid\n", ("client 1 has no row",)),
    "a negative client": ("client,kind\n-1,low\n", ("line 2", "client '-1'")),
    "a negative speed": ("client,flops\n0,-5\n", ("line 2", "flops = '-5' must be a number above 0")),
    "a word": ("client,flops\n0,fast\n", ("flops = 'fast'",)),
    "a short row": ("client,kind,flops\n0,low\n", ("line 2 has 2 values", "3 columns")),
    "nothing": ("", ("is empty",)),
}


@pytest.mark.parametrize(("text", "parts"), WRONG_CLIENTS.values(), ids=WRONG_CLIENTS)
def test_a_wrong_file_of_clients_is_refused_with_its_line(tmp_path, text, parts) -> None:
    settings = DeviceSettings("phones", clients=written(tmp_path, text, "clients.csv"))
    refused(lambda: read(settings), "clients.csv", *parts)


WRONG_CAPACITY = {
    "missing": ("rows.csv", "computation\n3\n", ("communication (kbit/s)",)),
    "zero": ("rows.csv", "computation,communication\n0,3\n", ("computation = 0 must be above 0",)),
    "no JSON": ("rows.json", "{", ("is no JSON file",)),
    "no rows": ("rows.json", "[]", ("has no row",)),
    "rows of numbers": ("rows.json", "[1]", ("row 0: 1 must have the numbers",)),
}


@pytest.mark.parametrize(("name", "text", "parts"), WRONG_CAPACITY.values(), ids=WRONG_CAPACITY)
def test_wrong_capacity_rows_are_refused(tmp_path, name, text, parts) -> None:
    settings = DeviceSettings("phones", capacity=written(tmp_path, text, name), reference_flops=1e9)
    refused(lambda: read(settings), name, *parts)


def test_settings_that_do_not_fit_together_are_refused() -> None:
    refused(lambda: DeviceSettings("phones", unfit="drop"), "unfit = 'drop'", "skip, error, fit")
    refused(lambda: DeviceSettings(clients="clients.csv"), "clients needs a name")
    refused(lambda: DeviceSettings("phones", capacity="rows.csv"), "reference_flops")


def test_a_job_may_say_for_all_kinds_how_time_falls_with_density() -> None:
    assert {kind.sparse for kind in read(DeviceSettings("phones", sparse="ideal")).kinds} == {"ideal"}
    refused(lambda: DeviceSettings("phones", sparse="fast"), "sparse = 'fast'", "none, ideal, measured")
    refused(lambda: DeviceSettings(sparse="ideal"), "sparse needs a name")


def test_shares_that_miss_1_by_rounding_are_taken() -> None:
    kinds = read_mix("phones").kinds
    thirds = tuple(replace(kind, share=0.3333333) for kind in kinds)
    assert DeviceMix("thirds", thirds).names == ["low", "mid", "high"]
