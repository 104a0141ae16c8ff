"""fedsim_analysis: run files as tables, seeds as mean and interval; and it needs neither torch nor fedsim."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import fedsim_analysis
import numpy as np
import pytest
import tomli_w
import torch
from fedsim_analysis import compare, load
from fedsim_analysis.comparison import half_interval, readable, tell
from fedsim_analysis.comparison.overview import _share
from scipy import stats

from fedsim.storage.writer import RunWriter


def write(path: Path, seed: int = 0, density: float = 0.1, accuracies: Any = (0.1, np.nan, 0.3), pack: int = 4, **more: Any) -> Path:
    """A run of three clients; round r sends r bytes up, 10 r down and takes 2 s."""
    job = f'name = "run{seed}"\nseed = {seed}\n[method]\nname = "fedtiny"\ndensity = {density}\n[execution]\npack = {pack}\n'
    attributes = {"job": job, "seed": seed, "method": "fedtiny", "rounds_planned": len(accuracies) - 1, **more}
    with RunWriter.create(path, attributes=attributes, layers=["conv1", "fc"], clients=3) as record:
        for r, accuracy in enumerate(accuracies):
            values = {"accuracy": accuracy, "density": density, "bytes_up": r, "bytes_down": 10 * r, "seconds": 2.0}
            values |= {"max_client_flops": 1e9 + r, "max_client_memory": 5e6 - r}
            record.row(r, values, {"loss": (np.array([2]), np.array([r]))}, {"grown": np.array([r, 0])}, timing={"compute": 1.0})
    return path


def test_load_gives_tables(tmp_path: Path) -> None:
    run = load(write(tmp_path / "a.h5"))
    assert run.rounds.index.tolist() == [0, 1, 2]
    assert run.rounds.bytes_down.tolist() == [0, 10, 20]
    assert run.clients("loss").to_dict() == {2: {0: 0.0, 1: 1.0, 2: 2.0}}
    assert run.layers("grown")["conv1"].tolist() == [0, 1, 2]
    assert run.timing()["compute"].tolist() == [1, 1, 1]
    assert run.units()["bytes_up"] == "B"
    assert run.job["method"]["density"] == 0.1
    with pytest.raises(KeyError, match=r"no clients/los; it has .*loss"):
        run.clients("los")


def test_rows_beyond_the_counter_are_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5")
    import h5py

    with h5py.File(path, "r+") as file:
        file.attrs["rounds"] = 1
    assert len(load(path).rounds) == 2
    assert len(load(path).timing()) == 2


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.h5")
    with pytest.raises(ValueError, match="newer format"):
        load(write(tmp_path / "a.h5", format_version=99))


def test_runs_that_differ_in_seed_only_are_one_row(tmp_path: Path) -> None:
    finals = (0.3, 0.4, 0.8)
    paths = [write(tmp_path / f"{seed}.h5", seed, accuracies=(0.1, np.nan, final), pack=seed + 1) for seed, final in enumerate(finals)]
    table = compare([*paths, write(tmp_path / "other.h5", density=0.01)])
    assert table["method.density"].tolist() == [0.1, 0.01]
    assert table.seeds.tolist() == [3, 1]
    first = table.iloc[0]
    low, high = stats.t.interval(0.95, 2, np.mean(finals), stats.sem(finals))
    assert first.accuracy == pytest.approx(0.5)
    assert first.accuracy_95 == pytest.approx((high - low) / 2, rel=1e-3)
    assert first.accuracy_last_10 == pytest.approx(np.mean(finals))  # row 0 precedes training, round 1 was not evaluated
    assert (first.bytes, first.max_client_flops, first.max_client_memory, first.seconds) == (33, 1e9 + 2, 5e6, 6)
    assert (first.density, first.density_95, first.unfinished) == (pytest.approx(0.1), pytest.approx(0), 3)
    assert np.isnan(table.iloc[1].accuracy_95)
    assert np.isnan(first.max_client_flops_share)  # not in these files


def test_groups_may_be_chosen(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{i}.h5", seed=i, density=density) for i, density in enumerate((0.1, 0.2))]
    assert compare(paths, by=["method.name"]).seeds.tolist() == [2]
    assert compare(paths)["method.density"].tolist() == [0.1, 0.2]


def run_of(path: Path, method: dict[str, Any], accuracy: float, shares: Any, seed: int = 0, **top: Any) -> Path:
    """A run whose clients compute `shares` of dense training, round by round from 0, and send 1.5 MB each way in each."""
    job = {"name": path.stem, "seed": seed, **top, "method": method}
    with RunWriter.create(path, attributes={"job": tomli_w.dumps(job), "seed": seed}, layers=["fc"], clients=2) as record:
        for r, share in enumerate(shares):
            values = {"accuracy": accuracy, "density": 0.0995, "bytes_up": 1.5e6, "bytes_down": 1.5e6, "seconds": 2.0}
            values |= {
                "max_client_flops": share * 1e9,
                "max_client_flops_share": share,
                "max_client_memory": 193_160,
                "max_client_model_memory": 4_000,
            }
            record.row(r, values)
        record.finish({"w/fc": torch.ones(1)}, "0" * 64)
    return path


def test_the_table_for_people(tmp_path: Path) -> None:
    tiny = {"name": "fedtiny", "density": 0.1, "adjust_fraction": 0.15, "stop_round": 100}
    paths = [run_of(tmp_path / f"tiny{seed}.h5", tiny, 0.5 + seed / 10, [0.3, 0.2, 0.1], seed) for seed in (0, 1)]
    paths.append(run_of(tmp_path / "none.h5", tiny | {"stop_round": 0, "pool": 1}, 0.4, [0.0, 0.25]))
    paths.append(run_of(tmp_path / "dense.h5", {"name": "fedavg"}, 0.9, [0.0, 1.0], train={"lr": 0.2}))
    rows = readable(compare(paths)).to_dict("records")
    same = {"density": "0.0995", "memory": "193 kB", "model memory": "4.00 kB"}
    assert rows == [
        same
        | {"method": "fedtiny", "stop_round": "100", "pool": "-", "lr": "-", "seeds": 2, "rounds": 2, "accuracy": "55.0 ± 63.5 %"}
        | {"training FLOPs": "20 %", "with round 0": "30 %", "sent": "9.00 MB", "time": "6.0 s"},
        same
        | {"method": "fedtiny", "stop_round": "0", "pool": "1", "lr": "-", "seeds": 1, "rounds": 1, "accuracy": "40.0 %"}
        | {"training FLOPs": "25 %", "with round 0": "25 %", "sent": "6.00 MB", "time": "4.0 s"},
        same
        | {"method": "fedavg", "stop_round": "-", "pool": "-", "lr": "0.2", "seeds": 1, "rounds": 1, "accuracy": "90.0 %"}
        | {"training FLOPs": "100 %", "with round 0": "100 %", "sent": "6.00 MB", "time": "4.0 s"},
    ]


def test_the_table_shows_what_differs_and_no_more(tmp_path: Path) -> None:
    tiny = {"name": "fedtiny", "density": 0.1, "blocks": 5}
    one, other = (run_of(tmp_path / f"{d}.h5", tiny | {"density": d}, 0.5, [0.0, 0.1]) for d in (0.1, 0.01))
    measures = ["accuracy", "density", "training FLOPs", "sent", "memory", "model memory", "time"]
    assert list(readable(compare([one]))) == ["method", "seeds", *measures]
    assert list(readable(compare([one, other]))) == ["method", "method.density", "seeds", *measures]  # density is a measure's name too
    assert list(readable(compare([write(tmp_path / "half.h5")]))) == ["method", "seeds", "unfinished", *measures]


def test_a_measure_that_a_file_lacks_is_reported_as_such(tmp_path: Path) -> None:
    row = readable(compare([write(tmp_path / "old.h5", accuracies=(np.nan,))])).iloc[0]
    assert (row.accuracy, row["training FLOPs"], row.sent) == ("-", "-", "0 B")


def test_the_text_says_what_its_columns_mean(tmp_path: Path) -> None:
    head, row, _, *legend = tell(compare([run_of(tmp_path / "a.h5", {"name": "fedavg"}, 0.9, [0.0, 1.0])])).splitlines()
    assert head.split() == ["method", "seeds", "accuracy", "density", "training", "FLOPs", "sent", "memory", "model", "memory", "time"]
    assert row.split()[0] == "fedavg"
    assert all(f"{name}: " in "\n".join(legend) for name in ("accuracy", "training FLOPs", "sent", "memory", "model memory"))


def test_the_same_seed_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one job with one seed, 0"):
        compare([write(tmp_path / "a.h5"), write(tmp_path / "b.h5")])


@pytest.mark.parametrize("n", [2, 3, 10, 31, 32, 100])
def test_interval_is_student_s(n: int) -> None:
    values = np.random.default_rng(n).normal(size=n)
    low, high = stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values))
    assert half_interval(list(values)) == pytest.approx((high - low) / 2, rel=2e-3)


@pytest.mark.processes
def test_neither_torch_nor_fedsim_is_imported(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5")
    code = "import sys, fedsim_analysis.__main__ as m; m.compare(sys.argv[1:]); assert not {'torch', 'fedsim'} & sys.modules.keys()"
    folder = Path(fedsim_analysis.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code, path], cwd=folder, check=True)
    told = subprocess.run(
        [sys.executable, "-m", "fedsim_analysis", "compare", tmp_path], cwd=folder, check=True, capture_output=True, text=True
    )
    assert "fedtiny" in told.stdout


@pytest.mark.processes
def test_the_module_says_in_one_line_what_cannot_be_read(tmp_path: Path) -> None:
    folder, path = Path(fedsim_analysis.__file__).parents[1], tmp_path / "none.h5"
    ended = subprocess.run(
        [sys.executable, "-m", "fedsim_analysis", "compare", path], cwd=folder, check=False, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr) == (2, f"there is no run file {path}\n")


@pytest.mark.parametrize(("value", "said"), [(float("nan"), "-"), (0.2, "20 %"), (1.034, "103 %"), (9.99, "999 %"), (45.31, "4,531 %")])
def test_a_share_is_written_without_powers_of_ten(value: float, said: str) -> None:
    assert _share(value) == said
