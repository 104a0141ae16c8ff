"""Runs whose clients have devices: what their files hold, what is refused before the first round, and what a job without them is."""

from __future__ import annotations

import json
import tomllib
from io import StringIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from rich.console import Console
from small_job import small_job

import fedsim
from fedsim.config import own_code
from fedsim.config.job import check, identity, load, resolved
from fedsim.devices.reading import read_mix
from fedsim.errors import BadInput, TooFewAnswers
from fedsim.fleet.serial import SerialFleet
from fedsim.fleet.timed.state import STATUS
from fedsim.reporting.summary import show
from fedsim.simulation.devices import forecast
from fedsim.simulation.devices.clock import add_clock, played
from fedsim.simulation.experiment import build_experiment
from fedsim.simulation.planning.idle_fleet import idle_fleet
from fedsim.storage.columns import OF_DEVICES
from fedsim.storage.columns import STATUS as CODES
from fedsim.storage.reader import RunReader

MIX = """
[kinds.slow]
share = 0.5
flops = 1e8
memory = {memory}
down = 1e6
up = 1e6
power = 1.0

[kinds.fast]
share = 0.5
flops = 1e9
memory = 1e9
down = 1e7
up = 1e7
power = 2.0
"""


EIGHT = {"clients": 8}  # of both kinds with seed 0


@pytest.fixture
def mix(tmp_path: Path) -> str:
    path = tmp_path / "two.toml"
    path.write_text(MIX.format(memory="1e9"))
    return str(path)


def ran(tmp_path: Path, rounds: int = 2, name: str = "run", **sections: Any) -> Any:
    """The run file of a small job with other fields in some sections."""
    job = tmp_path / f"{name}.toml"
    job.write_text(small_job(rounds, **{"partition": EIGHT} | sections))
    fedsim.run(fedsim.load_job(job), out=tmp_path / f"{name}.h5")
    return RunReader(tmp_path / f"{name}.h5")


def test_a_run_file_has_the_clock_the_clients_and_the_kinds(tmp_path, mix) -> None:
    ran(tmp_path, devices={"name": mix})
    with h5py.File(tmp_path / "run.h5") as file:
        clock, lasted = file["rounds/clock"][:], file["rounds/round_time"][:]
        seconds, joules, status = (file[f"clients/{name}"][:] for name in ("seconds", "joules", "status"))
        kinds, table = file["devices/kind"][:], json.loads(file.attrs["devices"])
        assert file["devices/kind"].dims[0][0].name == "/client"
    assert clock.tolist() == np.cumsum(lasted).tolist()
    assert lasted[0] == 0
    assert lasted[1:].tolist() == np.nanmax(seconds[1:], 1).tolist()
    assert (status[1:] == 0).all()
    assert (joules[1:] > 0).all()
    assert kinds.tolist() == read_mix(mix).kind_of(0, range(8)).tolist()
    assert [kind["name"] for kind in table["kinds"]] == ["slow", "fast"]


def test_the_codes_of_a_status_are_described_where_they_stand() -> None:
    assert ", ".join(f"{code} {name}" for code, name in enumerate(STATUS)) == CODES
    assert OF_DEVICES["clients/status"].about == CODES


def test_what_precedes_training_takes_time_too(tmp_path, mix) -> None:
    method = {"name": "fedtiny", "density": 0.3, "pool": 2, "pretrain_epochs": 0}
    ran(tmp_path, devices={"name": mix}, method=method)
    with h5py.File(tmp_path / "run.h5") as file:
        assert file["rounds/clock"][0] > 0
        assert file["rounds/energy"][0] > 0


def test_unfit_clients_train_nothing_and_are_on_record(tmp_path) -> None:
    path = tmp_path / "two.toml"
    path.write_text(MIX.format(memory="5e4"))
    ran(tmp_path, devices={"name": str(path)}, cohort={"size": 8})
    slow = np.flatnonzero(read_mix(str(path)).kind_of(0, range(8)) == 0)
    assert 0 < len(slow) < 8
    with h5py.File(tmp_path / "run.h5") as file:
        assert file["rounds/unfit"][:].tolist() == [0, len(slow), len(slow)]
        assert np.flatnonzero(file["clients/status"][1] == STATUS.index("unfit")).tolist() == slow.tolist()
        assert np.isnan(file["clients/samples"][1][slow]).all()
        counts = file["partition/counts"][:]
    fast = np.setdiff1d(np.arange(8), slow)
    held, of_classes = counts[fast].sum() / counts.sum(), counts[fast].sum(0) / counts.sum(0)
    written = StringIO()
    show(tmp_path / "run.h5", Console(file=written, width=200))
    shown = written.getvalue()
    assert f"{2 * len(slow)} unfit in all rounds" in shown
    assert f"{len(fast)} of 8 clients, who hold {held:.1%} of the training images" in shown
    assert f"of class {of_classes.argmin()} the least, {of_classes.min():.1%}" in shown


def test_a_run_goes_on_with_the_figures_it_began_with_and_no_others(tmp_path, mix) -> None:
    ran(tmp_path, devices={"name": mix})
    Path(mix).write_text(MIX.format(memory="2e9"))
    with pytest.raises(BadInput, match="was made with other figures of devices"):
        fedsim.run(fedsim.load_job(tmp_path / "run.toml"), out=tmp_path / "run.h5")


def test_a_job_without_devices_is_written_as_before_there_were_any(tmp_path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(small_job(2, cohort={"size": 3}))
    text = resolved(load(path))
    assert "[devices]" not in text
    assert "[cohort]\nsize = 3\n\n" in text
    with_devices = check(load(path).given | {"devices": {"name": "phones"}})
    assert identity(with_devices) != identity(load(path))


def test_a_resolved_job_with_devices_is_the_same_job(tmp_path, mix) -> None:
    table = {
        "devices": {"name": mix, "unfit": "fit"},
        "cohort": {"size": 3, "mode": "oversample", "extra": 0.5, "select": "fits", "least": 2},
    }
    path = tmp_path / "job.toml"
    path.write_text(small_job(2, **table))
    job = load(path)
    assert identity(check(tomllib.loads(resolved(job)))) == identity(job)


HOPELESS = {
    "a deadline that nobody meets": (
        {"cohort": {"mode": "deadline", "deadline": 1e-4}},
        r"round 1: Train is done by no client before the deadline of 0\.0001 s: client \d \(fast\) is the fastest and needs 0\.\d+ s",
    ),
    "memory that nobody has": (
        {"devices": {"unfit": "skip"}, "memory": "1e3"},
        r"round 1: Train needs [\d,]+ bytes, and no client has them: client \d \(\w+\) has most, [\d,]+;",
    ),
    "memory for no image": (
        {"devices": {"unfit": "fit"}, "memory": "1e3"},
        r"needs [\d,]+ bytes with batches of one image, and no client has them",
    ),
}


@pytest.mark.parametrize(("change", "message"), HOPELESS.values(), ids=HOPELESS)
def test_what_can_never_work_is_said_before_the_first_round(tmp_path, change, message) -> None:
    path = tmp_path / "two.toml"
    memory = change.get("memory", "1e9")
    path.write_text(MIX.format(memory=memory).replace("memory = 1e9", f"memory = {memory}"))
    devices = {"name": str(path)} | change.get("devices", {})
    with pytest.raises(BadInput, match=message):
        ran(tmp_path, devices=devices, cohort=change.get("cohort", {}))
    assert not (tmp_path / "run.h5").exists()


def test_nothing_is_tried_beforehand_where_clients_are_too_many_to_look_at(tmp_path, mix, monkeypatch) -> None:
    """Each round that is tried costs the start of a large population half a second."""
    path, said = tmp_path / "job.toml", list[str]()
    path.write_text(small_job(2, devices={"name": mix}))
    parts = build_experiment(load(path))
    monkeypatch.setattr(forecast, "LOOKED_AT", 3)
    forecast.refuse_hopeless(parts, "no state of a method", idle_fleet(parts), said.append)
    assert said == []
    monkeypatch.setattr(forecast, "LOOKED_AT", 4)
    forecast.refuse_hopeless(parts, "no state of a method", idle_fleet(parts), said.append)
    assert "what a round asks of devices is not known before it" in said[0]


def test_a_deadline_that_a_client_with_few_images_meets_is_not_refused(tmp_path) -> None:
    """The first cohort is a client with more; the one with fewest images answers in time."""
    mix, path = tmp_path / "one.toml", tmp_path / "job.toml"
    mix.write_text("[kinds.one]\nshare = 1.0\nflops = 1e6\nmemory = 1e9\ndown = 1e9\nup = 1e9\n")
    unequal = {"name": "quantity_dirichlet", "beta": 0.5, "clients": 8, "min_images": 1}
    sections = {"devices": {"name": str(mix)}, "partition": unequal, "cohort": {"size": 1}}
    path.write_text(f"seed = 2\n{small_job(1, **sections)}")
    parts = build_experiment(load(path))
    sizes = parts.population.shards["train"].sizes()
    (first,) = SerialFleet(parts.site, parts.account(), 1, lambda: 0.0).draw(1, 1)
    assert sizes[first] > 1.5 * sizes.min()
    sections["cohort"] = {"size": 1, "mode": "deadline", "deadline": 1.2 * parts.devices.flops * int(sizes.min()) / 1e6}
    path.write_text(f"seed = 2\n{small_job(1, **sections)}")
    fedsim.run(load(path), out=tmp_path / "run.h5")
    assert RunReader(tmp_path / "run.h5").rounds == 1


REFUSED = {
    "devices are needed": ({"cohort": {"mode": "oversample"}}, r"\[cohort\] mode = 'oversample' needs devices"),
    "a deadline is needed": ({"cohort": {"mode": "deadline"}}, r'mode = "deadline" needs a deadline'),
    "a deadline of another mode": ({"cohort": {"deadline": 3.0}}, r'deadline belongs to mode = "deadline"; the job has mode = "sync"'),
    "an unknown selection": ({"cohort": {"select": "best"}}, r"select = 'best' is not known. There are: uniform, available, fastest, fits"),
    "a selection that is not there": (
        {"cohort": {"select": "nowhere:pick"}},
        r"select = 'nowhere:pick': module 'nowhere' cannot be imported: ModuleNotFoundError: .*'nowhere'; it is looked for in the working",
    ),
    "a selection whose module fails": (
        {"cohort": {"select": "failing_selection:pick"}},
        r"\[cohort\] select = 'failing_selection:pick': module 'failing_selection' cannot be imported: ZeroDivisionError: division by zero",
    ),
    "a selection whose module ends Python": (
        {"cohort": {"select": "ending_selection:pick"}},
        r"\[cohort\] select = 'ending_selection:pick': module 'ending_selection' cannot be imported: SystemExit: no licence",
    ),
    "a selection that its module lacks": (
        {"cohort": {"select": "math:pick"}},
        r"\[cohort\] select = 'math:pick': math has no function 'pick'",
    ),
    "a method that needs all answers": (
        {"cohort": {"mode": "buffered"}, "method": {"name": "fedtiny"}},
        r"fedtiny needs all answers of a round together\. Those that do not: at_init, fedavg, fedprox, finetune, grasp, magnitude",
    ),
    "an aggregation that needs all answers": (
        {"cohort": {"mode": "buffered"}, "train": {"aggregate": "scaffold"}},
        r"aggregate = 'scaffold' needs all answers of a round together\. Those that do not: fedavg, fedprox",
    ),
    "a buffer above the concurrency": ({"cohort": {"mode": "buffered", "buffer": 9}}, r"buffer = 9 is more than the 8 clients"),
    "more answers than clients": ({"cohort": {"least": 9}}, r"least = 9 answers cannot come of 8 clients"),
    "an unknown mix": ({"devices": {"name": "tablets"}}, r"devices 'tablets' are not known. There are: four_kinds, phones"),
    "an unknown way": ({"devices": {"unfit": "drop"}}, r"unfit = 'drop' is not known. There are: skip, error, fit"),
    "an unknown field": ({"devices": {"speed": 3}}, r"\[devices\] has no field 'speed'"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_wrong_jobs_are_refused_with_what_would_be_right(tmp_path, mix, change, message, monkeypatch) -> None:
    (tmp_path / "failing_selection.py").write_text("1 / 0\n")
    (tmp_path / "ending_selection.py").write_text("raise SystemExit('no licence')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    sections = change if "needs devices" in message else change | {"devices": {"name": mix} | change.get("devices", {})}
    with pytest.raises(BadInput, match=message):
        ran(tmp_path, **sections)
    assert not (tmp_path / "run.h5").exists()


def test_an_estimate_has_a_line_for_each_kind(tmp_path, mix, capsys) -> None:
    path = tmp_path / "job.toml"
    path.write_text(small_job(2, devices={"name": mix}, cohort={"mode": "deadline", "deadline": 0.05}))
    fedsim.estimate(fedsim.load_job(path))
    shown = capsys.readouterr().out
    lines = {line.split("│")[1].strip(): line for line in shown.splitlines() if line.startswith(("│ slow", "│ fast"))}
    assert "fits" in lines["slow"]
    assert "always" in lines["slow"]
    assert "never" in lines["fast"]


def test_an_estimate_says_by_how_many_bytes_a_kind_is_too_small(tmp_path, capsys) -> None:
    mix, path = tmp_path / "two.toml", tmp_path / "job.toml"
    mix.write_text(MIX.format(memory="5e4"))
    path.write_text(small_job(2, devices={"name": str(mix)}, partition=EIGHT))
    fedsim.estimate(fedsim.load_job(path))
    run = ran(tmp_path, name="dense", devices={"name": str(mix)})
    needed = int(run.column("max_client_memory")[1])
    assert f"{needed - 50_000:,} bytes over" in " ".join(capsys.readouterr().out.split())


BY_KIND = {"name": "heterofl", "rates": {"slow": 0.25, "fast": 1.0}, "mask_classes": False}


def test_clients_have_networks_of_the_size_of_their_kind(tmp_path, mix, capsys) -> None:
    run = ran(tmp_path, devices={"name": mix}, method=BY_KIND)
    kind, memory = read_mix(mix).kind_of(0, range(8)), run.clients("memory", 1)
    asked = np.isfinite(memory)
    small, large = memory[asked & (kind == 0)], memory[asked & (kind == 1)]
    assert len(set(small)) == len(set(large)) == 1
    assert small[0] < 0.5 * large[0]
    path = tmp_path / "run.toml"
    two = Path(mix)
    two.write_text(MIX.format(memory=f"{(small[0] + large[0]) / 2:.0f}"))
    fedsim.estimate(fedsim.load_job(path))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│ slow")]
    assert "fits" in lines[0]


@pytest.mark.parametrize(
    ("method", "devices", "message"),
    [
        (
            {"name": "magnitude", "density": {"slow": 0.1, "fast": 0.3}},
            True,
            r"density is given by kind of device, and magnitude has one for all clients\. By kind: client_flops_share of dwfnp, rates of",
        ),
        (BY_KIND, False, r"rates is given by kind of device, and the clients have none: set \[devices\] name"),
    ],
)
def test_numbers_by_kind_where_they_cannot_be(tmp_path, mix, method, devices, message) -> None:
    with pytest.raises(BadInput, match=message):
        ran(tmp_path, method=method, **({"devices": {"name": mix}} if devices else {}))


def test_a_selection_of_the_jobs_own_is_asked_in_every_round(tmp_path, mix, monkeypatch) -> None:
    (tmp_path / "mine_selecting.py").write_text("def last(clients, wanted, r, devices):\n    return sorted(clients)[-wanted:]\n")
    monkeypatch.syspath_prepend(tmp_path)
    run = ran(tmp_path, devices={"name": mix}, cohort={"size": 2, "select": "mine_selecting:last"})
    assert np.flatnonzero(run.clients("in_cohort", 1) == 1).tolist() == [6, 7]
    assert own_code.names(load(tmp_path / "run.toml")) == ["mine_selecting:last"]


def test_what_clients_put_aside_for_a_cohort_that_was_too_small_is_taken_back(tmp_path, mix) -> None:
    job = tmp_path / "job.toml"
    job.write_text(small_job(2, devices={"name": mix}, train={"aggregate": "scaffold"}))
    parts = build_experiment(load(job))
    fleet = SerialFleet(parts.site, parts.account(), 1, lambda: 0.0)
    add_clock(fleet, parts.devices)
    state, seen = parts.method.init(parts.setting, None), []

    class Once(type(parts.method)):  # type: ignore[misc]
        """Too few answers come after the first training."""

        def round(self, setting, state, fleet, r):  # type: ignore[no-untyped-def]
            seen.append({client: dict(kept) for client, kept in fleet.kept.items()})
            after = super().round(setting, state, fleet, r)
            if r == 2 and len(seen) == 2:
                raise TooFewAnswers("for once")
            return after

    for r in (1, 2):
        fleet.open(r)
        state, _ = played(Once(), parts.setting, state, fleet, r)
        fleet.touched.clear() if r == 1 else None
    assert len(seen) == 3
    assert seen[2].keys() == seen[1].keys()
    for client, kept in seen[1].items():
        for key, value in kept.items():
            assert value.equal(seen[2][client][key]), key
