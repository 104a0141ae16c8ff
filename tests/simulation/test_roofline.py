"""The machine's roof, what a run achieved under it, and the bottleneck that `fedsim show` tells of."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import h5py
import pytest
from rich.console import Console

from fedsim.fleet.charging.bills import Bills
from fedsim.reporting.bottleneck import bottleneck
from fedsim.reporting.formatting import part
from fedsim.reporting.summary import show
from fedsim.simulation import loop
from fedsim.simulation.planning import roofline
from fedsim.simulation.planning.roofline import Peaks
from fedsim.simulation.round_record import speeds
from fedsim.storage.columns import Column
from fedsim.storage.reader import RunReader
from fedsim.storage.writer import RunWriter

PEAKS = {"peak_flops": 100e9, "peak_bytes": 10e9}


def test_peaks_are_measured_once_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(roofline, "SPENT", 0.0)
    monkeypatch.setattr(roofline, "ARRAY", {"cpu": 1 << 20})
    found = roofline.peaks()
    (kept,) = (tmp_path / "fedsim" / "peaks").iterdir()
    assert json.loads(kept.read_text()) == {"flops": found.flops, "bytes": found.bytes}
    assert min(found.flops, found.bytes) > 1e6
    kept.write_text('{"flops": 3.0, "bytes": 2.0}')
    assert roofline.peaks() == Peaks(3.0, 2.0)
    kept.write_text('{"flops": 3')
    assert roofline.peaks().flops > 1e6
    assert json.loads(kept.read_text())["flops"] > 1e6


def test_what_was_written_is_counted(tmp_path: Path) -> None:
    before = loop.bytes_written()
    (tmp_path / "a").write_bytes(bytes(300_000))
    assert 300_000 <= loop.bytes_written() - before < 400_000


def test_speeds_are_amounts_over_the_seconds_of_their_phase() -> None:
    """Client 3 made two and a half steps of 10 images, client 5 one forward pass and no step."""
    bills = Bills()
    for client, figures in {
        3: {"samples": 25, "train_flops": 600, "dense_flops": 800, "memory": 1000},
        7: {"train_flops": 900, "uncomputed_flops": 900},  # of an emulated client that came too late
        5: {"train_flops": 40, "dense_flops": 80, "memory": 700},
    }.items():
        vars(bills.apart(client)).update(figures)
    seconds = {"compute": 0.5, "broadcast": 0.25, "reduce": 0.0, "record": 2.0}
    found = speeds(bills, 10, seconds, {"broadcast": 1000, "reduce": 7, "record": 0})
    assert found == {
        "compute_flops": 640 / 0.5,
        "compute_dense_flops": 800 / 0.5,
        "compute_bytes": 2 * 2.5 * 1000 / 0.5,
        "broadcast_bytes": 4000,
    }


def bottleneck_of(path: Path, timing: dict[str, float], speed: dict[str, float], **attributes: Any) -> str:
    """The bottleneck of a run of three alike rounds."""
    columns = {f"{group}/{name}": Column() for group, names in (("timing", timing), ("speed", speed)) for name in names}
    with RunWriter.create(path / "run.h5", attributes=attributes, layers=["fc"], clients=2, columns=columns) as record:
        for r in range(3):
            record.row(r, {}, timing=timing, speed=speed if r else {})
    text = bottleneck(RunReader(path / "run.h5"))
    (path / "run.h5").unlink()
    return text


def test_the_nearest_roof_of_compute_is_reported(tmp_path: Path) -> None:
    """Round 0 is without speeds, and so counts for the shares of time alone."""
    time = {"compute": 0.75, "server": 0.25}
    text = bottleneck_of(tmp_path, time, {"compute_flops": 38e9, "compute_bytes": 1e9}, **PEAKS)
    assert text == "compute, 75% of the time, at 38% of the arithmetic roof (38 of 100 GFLOP/s a rank): more ranks, or a smaller model"
    text = bottleneck_of(tmp_path, time, {"compute_flops": 38e9, "compute_bytes": 9e9}, **PEAKS)
    assert "at 90% of the memory roof (9 of 10.0 GB/s a rank): ranks on further nodes" in text
    cached = bottleneck_of(tmp_path, time, {"compute_flops": 38e9, "compute_bytes": 11e9}, **PEAKS)
    assert "at 38% of the arithmetic roof" in cached


def test_a_rank_is_measured_by_its_own_peak(tmp_path: Path) -> None:
    """Rank 0 serves, and no more ranks train than there are packs."""
    speed = {"compute_flops": 120e9}
    for ranks, packs, share in ((4, 16, 40), (9, 4, 30), (2, 16, 120)):
        text = bottleneck_of(tmp_path, {"compute": 1.0}, speed, ranks=ranks, plan=json.dumps({"packs": packs}), **PEAKS)
        assert f"at {share}% of the arithmetic roof ({120 // min(ranks - 1, packs)} of 100 GFLOP/s a rank)" in text
        assert ("execution.packs" in text) == (ranks > packs)


def test_far_from_every_roof_it_is_overhead_or_pruned_weights(tmp_path: Path) -> None:
    slow, time = {"compute_flops": 2e9, "compute_dense_flops": 2e9, "compute_bytes": 1e8}, {"compute": 1.0}
    text = bottleneck_of(tmp_path, time, slow, plan=json.dumps({"fleet": "serial", "packs": 16}), **PEAKS)
    assert (
        "at 2% of the arithmetic roof (2 of 100 GFLOP/s a rank): most of it is the overhead of small steps; larger batches, clients stacked"
        in text
    )
    text = bottleneck_of(tmp_path, time, slow, plan=json.dumps({"fleet": "packed", "packs": 16}), **PEAKS)
    assert "overhead of small steps; larger batches would help, or more ranks" in text
    text = bottleneck_of(tmp_path, time, slow | {"compute_dense_flops": 40e9}, **PEAKS)
    assert "at 2% of the arithmetic roof" in text
    assert "at 40% counting pruned weights: sparse or compacted execution would help" in text


@pytest.mark.parametrize(("phase", "advice"), [("evaluate", "evaluate.every"), ("server", "rank 0"), ("reduce", "train.epochs")])
def test_other_phases_are_reported_with_what_helps(phase: str, advice: str, tmp_path: Path) -> None:
    text = bottleneck_of(tmp_path, {"compute": 1.0, phase: 3.0}, {f"{phase}_bytes": 2e6} if phase == "reduce" else {}, **PEAKS)
    assert text.startswith(f"{phase}, 75% of the time")
    assert advice in text
    assert ("(2.00 MB/s)" in text) == (phase == "reduce")


def test_recording_is_beside_the_rest_where_other_ranks_train_meanwhile(tmp_path: Path) -> None:
    time = {"compute": 1.0, "record": 3.0}
    assert bottleneck_of(tmp_path, time, {}, ranks=1).startswith("record, 75% of the time: write checkpoints more seldom")
    assert bottleneck_of(tmp_path, time, {}, ranks=3).startswith("compute, 100% of the time: more ranks")


def test_a_file_of_an_older_fedsim_is_shown_and_gone_on_with(tmp_path: Path) -> None:
    path, console = tmp_path / "run.h5", Console(file=io.StringIO(), width=80)
    with RunWriter.create(path, attributes={}, layers=["fc"], clients=2) as record:
        record.row(0, {}, timing={"compute": 1.0})
    with h5py.File(path, "r+", locking=False) as file:
        del file["speed"], file["checksums"]
    assert RunReader(path).names("speed") == []
    show(path, console)
    assert "next bottleneck  compute, 100% of the time: more ranks\n" in console.file.getvalue()  # type: ignore[attr-defined]
    with RunWriter.resume(path, 0, PEAKS) as record:
        record.row(1, {}, timing={"compute": 1.0}, speed={"compute_flops": 50e9})
    assert RunReader(path).about("speed", "compute_flops").units == "FLOP/s"
    assert "at 50% of the arithmetic roof" in bottleneck(RunReader(path))


def test_a_part_has_the_prefix_of_the_whole() -> None:
    assert [part(0.7716e9, 57.9e9, "B/s"), part(1e12, 2e9, "B"), part(3, 7, "B")] == ["0.772 of 57.9 GB/s", "1e+03 of 2.00 GB", "3 of 7 B"]
