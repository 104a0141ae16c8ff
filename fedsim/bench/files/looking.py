"""`fedsim bench looking`: seconds and memory of the commands that read run files, on a large run and on many runs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from fedsim_analysis import run_file
from rich.console import Console
from rich.table import Table

from fedsim.config.job import Job
from fedsim.storage.writer import RunWriter

ROUNDS, CLIENTS, COHORT, LAYERS, WEIGHTS = 1000, 1000, 100, 50, 10_000  # of the large run; weights of a layer
EVALUATED, ADJUSTED = 10, 20  # rounds between two evaluations of all clients, and between two masks
RUNS, THEIR_ROUNDS, SEEDS = 200, 100, 5  # of the many
JOB = """name = "{name}"
seed = {seed}
rounds = {rounds}
[method]
name = "{method}"
density = {density}
[data]
name = "cifar10"
[partition]
name = "dirichlet_class"
clients = {clients}
[cohort]
size = {cohort}
"""
HERE = """
import atexit, os, sys
from pathlib import Path
status = int(sys.argv.pop(1))
atexit.register(lambda: os.write(status, Path("/proc/self/status").read_bytes()))
from fedsim.cli.commands import main
main()
"""


def main(jobs: list[Job], console: Console) -> int:
    """Prints a row per command. `jobs` are not used: the run files are made here, by the writer that runs have."""
    with TemporaryDirectory() as folder:
        large, many = Path(folder) / "large.h5", Path(folder) / "many"
        seconds = write_large(large)
        write_many(many)
        table = Table(title=_title(large, seconds), title_justify="left")
        for name in ("command", "seconds", "memory, MB", "allowed"):
            table.add_column(name, justify="left" if name == "command" else "right")
        for arguments, allowed in commands(large, many, Path(folder)):
            began = time.perf_counter()
            memory = peak(arguments)
            shown = " ".join(arguments).replace(f"{folder}/", "")
            table.add_row(f"fedsim {shown}", f"{time.perf_counter() - began:.2f}", f"{memory / 1e6:.0f}", allowed)
    console.print(table)
    return 0


def commands(large: Path, many: Path, folder: Path) -> list[tuple[list[str], str]]:
    """The arguments of each command, and what it may take."""
    return [
        (["--version"], ""),
        (["show", str(large)], "2 s, 1 GB"),
        (["report", str(large), "--out", str(folder / "large.html")], "30 s, 1 GB"),
        (["compare", str(many)], "5 s"),
        (["report", str(many), "--out", str(folder / "many.html")], ""),
    ]


def _title(large: Path, seconds: float) -> str:
    began = time.perf_counter()
    with run_file.apart(large) as file:
        size = sum(file["clients"][name][()].nbytes for name in file["clients"])
    plain = time.perf_counter() - began
    what = f"{ROUNDS:,} rounds of {CLIENTS:,} clients and {LAYERS} layers, {large.stat().st_size / 1e6:.0f} MB, written in {seconds:.0f} s"
    return f"{what};\nh5py reads its columns of clients ({size / 1e6:.0f} MB) in {plain:.2f} s. {RUNS} runs of {THEIR_ROUNDS} rounds"


def peak(arguments: Sequence[str]) -> int:
    """Runs the command in a process of its own; the most memory that it held, in bytes. Raises CalledProcessError where it fails.

    The process says so itself: what the kernel counts of a child includes what its parent held.
    """
    mine, its = os.pipe()
    command = [sys.executable, "-c", HERE, str(its), *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, pass_fds=(its,)) as process, os.fdopen(mine) as status:
        os.close(its)
        held = next((line for line in status if line.startswith("VmHWM:")), "VmHWM: 0")
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, ["fedsim", *arguments])
    return 1024 * int(held.split()[1])


def write_large(path: Path, rounds: int = ROUNDS, clients: int = CLIENTS, layers: int = LAYERS) -> float:
    """A run file of random numbers; the seconds of writing it."""
    numbers, began = np.random.default_rng(0), time.perf_counter()
    names = [f"layer{i}" for i in range(layers)]
    masks = {f"mask/{name}.weight": torch.ones(WEIGHTS, dtype=torch.bool) for name in names[1:]}
    with RunWriter.create(
        path, attributes=_attributes("large", 0, 0.1, rounds, clients), layers=names, clients=clients, counts=_counts(clients)
    ) as record:
        for r in range(rounds + 1):
            if r % ADJUSTED == 0:
                masks = {key: torch.from_numpy(numbers.random(WEIGHTS) < 0.1) for key in masks}
            cohort = np.sort(numbers.choice(clients, min(COHORT, clients), replace=False)) if r else np.empty(0, np.int64)
            everyone = np.arange(clients if r % EVALUATED == 0 else 0)
            record.row(
                r, _values(r, rounds, numbers), _of_clients(cohort, everyone, numbers), _of_layers(layers, numbers), masks, _timing(numbers)
            )
        record.finish({"w/layer0.weight": torch.zeros(8)}, "0" * 64)
    return time.perf_counter() - began


def write_many(folder: Path, runs: int = RUNS, rounds: int = THEIR_ROUNDS) -> None:
    """Runs of several densities and methods, each with SEEDS seeds."""
    folder.mkdir()
    for i in range(runs):
        numbers, (group, seed) = np.random.default_rng(i), divmod(i, SEEDS)
        attributes = _attributes(("fedtiny", "fedmef", "fedavg")[group % 3], seed, 1 / (1 + group), rounds, 10)
        with RunWriter.create(
            folder / f"run{i}.h5", attributes=attributes, layers=["conv", "fc"], clients=10, counts=_counts(10)
        ) as record:
            for r in range(rounds + 1):
                everyone = np.arange(10)
                record.row(
                    r, _values(r, rounds, numbers), _of_clients(everyone, everyone, numbers), _of_layers(2, numbers), {}, _timing(numbers)
                )
            record.finish({"w/conv.weight": torch.zeros(8)}, "0" * 64)


def _attributes(name: str, seed: int, density: float, rounds: int, clients: int) -> dict[str, str | int]:
    method = "fedtiny" if name == "large" else name
    job = JOB.format(name=name, seed=seed, rounds=rounds, method=method, density=density, clients=clients, cohort=min(COHORT, clients))
    versions: dict[str, str | int] = {
        "fedsim_version": "0",
        "torch_version": "0",
        "hosts": "node1",
        "started_at": "2026-01-01T00:00:00+00:00",
        "ranks": 1,
    }
    return {"job": job, "seed": seed, "method": method, "rounds_planned": rounds, "partition_sha256": "0" * 64, **versions}


def _counts(clients: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 100, (clients, 10))


def _values(r: int, rounds: int, numbers: np.random.Generator) -> dict[str, float]:
    """The columns of one number a round."""
    learnt = 1 - np.exp(-5 * r / rounds)
    names = (
        "train_flops",
        "max_client_flops",
        "max_client_flops_share",
        "max_client_memory",
        "max_client_model_memory",
        "bytes_up",
        "bytes_down",
    )
    values = {name: float(numbers.integers(10**6, 10**7)) for name in names} | {"density": 0.1, "seconds": 1.0, "train_loss": 2.0 - learnt}
    if r % EVALUATED == 0:
        values |= {"accuracy": 0.1 + 0.8 * learnt + 0.01 * numbers.random(), "loss": 2.3 - learnt, "client_accuracy_min": 0.1}
    return values


def _of_clients(cohort: np.ndarray, everyone: np.ndarray, numbers: np.random.Generator) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    trained = ("samples", "train_loss", "density", "train_flops", "bytes_up", "bytes_down", "memory", "in_cohort")
    found = {name: (cohort, numbers.random(len(cohort))) for name in trained if len(cohort)}
    return found | {name: (everyone, numbers.random(len(everyone))) for name in ("accuracy", "loss") if len(everyone)}


def _of_layers(layers: int, numbers: np.random.Generator) -> dict[str, np.ndarray]:
    return {"density": numbers.random(layers), "grown": numbers.integers(0, 9, layers), "pruned": numbers.integers(0, 9, layers)}


def _timing(numbers: np.random.Generator) -> dict[str, float]:
    return {name: float(numbers.random()) for name in ("broadcast", "compute", "reduce", "server", "evaluate", "record")}
