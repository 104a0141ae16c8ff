"""show: the numbers a person reads are the numbers of the run file."""

from __future__ import annotations

import io
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from rich.console import Console

from fedsim.errors import BadInput
from fedsim.reporting.formatting import duration, quantity, share
from fedsim.reporting.summary import show
from fedsim.storage.writer import RunWriter


def shown(path: Path) -> str:
    console = Console(file=io.StringIO(), width=120)
    show(path, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def run_file(path: Path, rounds: int, every: int = 5, finished: bool = True) -> Path:
    ids = np.arange(10)
    attributes = {
        "method": "fedavg",
        "seed": 7,
        "rounds_planned": 60,
        "ranks": 3,
        "hosts": "n1,n2",
        "started_at": "2026-01-02T03:04:05+00:00",
    }
    with RunWriter.create(path, attributes=attributes, layers=["fc"], clients=10) as record:
        for r in range(rounds + 1):
            values = {"train_loss": 2 / (r + 1), "density": 0.1, "bytes_up": 1e6, "bytes_down": 2e6, "seconds": 0.5}
            values |= {"train_flops": 4e9, "max_client_flops": 5e8, "max_client_memory": 3e6}
            if r % every == 0:
                values |= {"accuracy": r / 100, "loss": 1.0, "client_accuracy": 0.5, "client_accuracy_macro": 0.25}
            accuracy = {"accuracy": (ids, ids / 10)} if r % every == 0 else {}
            record.row(r, values, accuracy, timing={"compute": 0.3, "server": 0.1, "record": 0.02})
        if finished:
            record.finish({"w/fc": torch.ones(2)}, "0" * 64)
    return path


def flip(path: Path, name: str, r: int) -> None:
    """One bit of a number, as it lies on the disk."""
    with h5py.File(path, "r+") as file:
        values = file[name][()]
        values.view(np.uint64)[r] ^= 1
        file[name][...] = values


def test_what_is_damaged_is_left_out_and_reported_in_a_line(tmp_path: Path) -> None:
    path = run_file(tmp_path / "run.h5", 60)
    whole = shown(path).splitlines()
    flip(path, "rounds/accuracy", 10)
    flip(path, "timing/server", 3)
    text = shown(path)
    assert [line for line in text.splitlines() if line.startswith("left out: ")] == [
        "left out: rounds/accuracy is damaged in round 10: its checksum is another; all other columns can be read",
        "left out: timing/server is damaged in round 3: its checksum is another; all other columns can be read",
    ]
    for line in (line for line in whole if line.startswith(("run.h5", "sent over", "training", "10 clients"))):
        assert line in text
    assert "accuracy" not in text.splitlines()[4]
    assert "of clients" in text.splitlines()[4]


def test_a_finished_run(tmp_path: Path) -> None:
    text = shown(run_file(tmp_path / "run.h5", 60))
    for part in (
        "run.h5  finished",
        "fedavg, seed 7, 60 rounds, 10 clients",
        "3 ranks on n1,n2",
        "60.0%",
        "183 MB: 61.0 MB up, 122 MB down",
    ):
        assert part in text
    for part in (
        "244 GFLOP",
        "500 MFLOP in a round",
        "3.00 MB of memory",
        "30.5 s, 0.5 s a round",
        "mean 45.0%, 10th percentile 9.0%, lowest 0.0%",
    ):
        assert part in text
    assert "60.0%" in text
    assert "10 clients, round 60" in text
    assert len([line for line in text.splitlines() if line.strip()[:2].strip().isdigit()]) <= 16


def pruned(path: Path, rows: list[dict[str, float]]) -> str:
    with RunWriter.create(path, attributes={"rounds_planned": len(rows) - 1}, layers=["fc"], clients=10) as record:
        for r, values in enumerate(rows):
            record.row(r, values)
    return " ".join(shown(path).split())


def test_the_busiest_client_is_reported_beside_dense_training_and_selection_by_itself(tmp_path: Path) -> None:
    first = {"max_client_flops": 3.3e8, "max_client_flops_share": 0.5, "candidates": 10, "chosen_candidate": 3, "candidate_loss": 2.0625}
    rounds = [
        {"max_client_flops": flops, "max_client_flops_share": flops / 1e9, "weights_swapped": k} for flops, k in ((1.57e8, 0), (1e8, 1200))
    ]
    text = pruned(tmp_path / "a.h5", [first, *rounds, rounds[1] | {"weights_swapped": 34}])
    assert "busiest client 157 MFLOP in a round beside dense at most 15.7% of the FLOPs that dense training would take the client" in text
    assert "selection candidate 3 of 10, loss 2.062; busiest client 330 MFLOP" in text
    assert "adjustments 2 rounds, 1,234 weights moved in all" in text


def test_the_servers_flops_and_the_largest_memory_are_reported_by_term(tmp_path: Path) -> None:
    first = {"server_flops": 3e9, "server_flops_pretraining": 3e9, "max_client_memory": 1e6, "memory_weights": 1e6}
    largest = {"max_client_memory": 5e6, "memory_weights": 1e6, "memory_dense_gradient": 3.98e6, "memory_top": 2e4, "memory_signs": 0}
    text = pruned(tmp_path / "a.h5", [first, largest | {"server_flops": 4e6, "server_flops_hyper_networks": 4e6}, first])
    assert "the server itself 4.00 MFLOP for hyper networks, 6.00 GFLOP for pretraining" in text
    assert "largest client 5.00 MB of memory: 3.98 MB dense gradient, 1.00 MB weights, 20.0 kB others" in text
    plain = pruned(tmp_path / "b.h5", [{"server_flops": 0, "max_client_memory": 1e6}])
    assert "server" not in plain
    assert "largest client 1.00 MB of memory" in plain


def test_nothing_is_reported_of_pruning_that_did_not_happen(tmp_path: Path) -> None:
    text = pruned(
        tmp_path / "a.h5",
        [{"max_client_flops": 0, "candidates": 1, "chosen_candidate": 1}, {"max_client_flops": 1e6, "weights_swapped": 0}],
    )
    assert "busiest client 1.00 MFLOP in a round" in text
    assert not any(word in text for word in ("dense", "selection", "adjustments", "before round 1"))
    assert "before round 1 busiest client 2.00 kFLOP" in pruned(tmp_path / "b.h5", [{"max_client_flops": 2e3}, {"max_client_flops": 1e6}])


def test_smaller_networks_are_reported_as_last_recorded(tmp_path: Path) -> None:
    first = {"client_inference_share": 1.0, "client_overlap": 1.0}
    cut = {"inference_share": 0.8, "parameters": 683_018, "parameters_share": 683_018 / 853_018}
    text = pruned(tmp_path / "a.h5", [first, {"client_inference_share": 0.498, "client_overlap": 0.83} | cut, {"train_loss": 1.0}])
    assert "network 80.0% of the FLOPs, 683,018 of 853,018 parameters" in text
    assert "sub-networks 49.8% of the FLOPs, overlap 83.0%" in text
    assert "sub-networks 50.0% of the FLOPs" in pruned(tmp_path / "b.h5", [{"client_inference_share": 0.5}])
    assert "network" not in pruned(tmp_path / "c.h5", [{"train_loss": 1.0}])


def test_networks_with_dynamic_gates_and_the_clients_own_are_reported_apart(tmp_path: Path) -> None:
    row = {"nominal_share": 0.5, "active_share": 0.4, "varying_share": 0.1, "client_accuracy": 0.9, "client_global_accuracy": 0.8}
    text = pruned(tmp_path / "a.h5", [row | {"gated_client_accuracy": 0.85, "personal_client_accuracy": 0.95}])
    assert "dynamic gates at most 50.0% of the FLOPs, 40.0% measured; 10.0% of the channels differ between images" in text
    own = "90.0% client's own network; 85.0% dynamic gates; 95.0% dynamic gates, personalised"
    assert f"clients' accuracy {own}; 80.0% client's own network on the global test set" in text


def test_the_worst_client_is_named_where_it_is_known(tmp_path: Path) -> None:
    with RunWriter.create(tmp_path / "a.h5", attributes={"rounds_planned": 0}, layers=["fc"], clients=10) as record:
        record.row(0, {"client_accuracy_macro": 0.5, "worst_client": 7}, {"accuracy": (np.array([3, 7]), np.array([0.75, 0.25]))})
    assert "lowest 25.0% (client 7)" in shown(tmp_path / "a.h5")


def test_only_round_0_is_there(tmp_path: Path) -> None:
    assert "busiest client - in a round" not in pruned(tmp_path / "a.h5", [{"max_client_flops": 2e3, "max_client_flops_share": 0.1}])


def test_a_run_that_grows_and_one_that_has_not_begun(tmp_path: Path) -> None:
    assert "not finished: 7 of 60 rounds" in shown(run_file(tmp_path / "half.h5", 7, finished=False))
    assert "no round is complete yet" in shown(run_file(tmp_path / "new.h5", -1, finished=False))


def test_a_run_without_evaluation(tmp_path: Path) -> None:
    text = shown(run_file(tmp_path / "run.h5", 3, every=1000))
    assert "train loss" in text
    assert "nan" not in text


def test_no_run_file(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="there is no run file"):
        show(tmp_path / "none.h5", Console(file=io.StringIO()))


def test_numbers_are_reported_in_three_digits() -> None:
    told = {0: "0 B", 999: "999 B", 1000: "1.00 kB", 44_734_248: "44.7 MB", 8.3e13: "83.0 TB", float("nan"): "-"}
    assert [quantity(value, "B") for value in told] == list(told.values())
    assert [duration(v) for v in (0.4234, 12.34, 200)] == ["0.423 s", "12.3 s", "0:03:20"]
    assert share(0.1234) == "12.3%"


@pytest.mark.parametrize(
    ("name", "shown_as"), [("42", "7, called '42'"), ("[bold]ann", "7, called '[bold]ann'"), (", ".join("abc" * 20), "7")]
)
def test_the_worst_client_has_its_name_where_the_users_have_names(tmp_path: Path, name: str, shown_as: str) -> None:
    names = {"client": [*"0123456", name, "8"]}
    with RunWriter.create(tmp_path / "a.h5", attributes={"rounds_planned": 0}, layers=["fc"], clients=9, called=names) as record:
        record.row(0, {"client_accuracy_macro": 0.5, "worst_client": 7}, {"accuracy": (np.array([3, 7]), np.array([0.75, 0.25]))})
    assert f"lowest 25.0% (client {shown_as})" in shown(tmp_path / "a.h5")


def test_clients_that_only_chose_or_came_too_late_are_not_reached(tmp_path: Path) -> None:
    """Client 0 trains; 1 answers in round 0 alone, which trains nothing; 2 is late."""
    attributes = {"method": "fedtiny", "seed": 0, "rounds_planned": 1}
    counts = np.array([[6, 0], [3, 3], [0, 6]])
    with RunWriter.create(tmp_path / "run.h5", attributes=attributes, layers=["fc"], clients=3, counts=counts) as record:
        every, answered = np.arange(3), np.zeros(3)
        record.row(0, {}, {"status": (every, answered), "samples": (every, answered)})
        record.row(1, {}, {"status": (np.array([0, 2]), np.array([0.0, 1.0])), "samples": (np.array([0, 2]), np.array([6.0, 0.0]))})
    assert "1 of 3 clients, who hold 33.3% of the training images; of class 1 the least, 0.0%" in " ".join(
        shown(tmp_path / "run.h5").split()
    )
