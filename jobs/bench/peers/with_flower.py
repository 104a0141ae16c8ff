"""Flower's simulation on two CPUs, one per client at work: `python with_flower.py WORK.npz ANSWER.npz`.

The client is a module of its own, as in Flower's tutorials: Ray then sends it by name, and what it caches outlives a message.
"""

from __future__ import annotations

import sys
import time

import flower_client
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from work import answer, asked

CPUS = 2

app = ServerApp()
work = asked()
marks: list[float] = []


def mark(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
    """In the place of an evaluation, which Flower calls for before the first round and after each."""
    marks.append(time.perf_counter())
    return None


@app.main()
def main(grid: Grid, context: Context) -> None:
    clients = len(work.labels)
    result = FedAvg(
        fraction_train=work.cohort / clients, min_train_nodes=work.cohort, min_available_nodes=clients, fraction_evaluate=0.0
    ).start(
        grid=grid,
        initial_arrays=ArrayRecord(work.first),
        num_rounds=work.rounds,
        train_config=ConfigRecord({"work": sys.argv[1]}),
        evaluate_fn=mark,
    )
    steps = result.train_metrics_clientapp[1]["steps"]  # a client's mean
    answer(marks, round(float(steps) * work.cohort), result.arrays.to_torch_state_dict())


if __name__ == "__main__":
    run_simulation(
        server_app=app,
        client_app=flower_client.app,
        num_supernodes=len(work.labels),
        backend_config={"init_args": {"num_cpus": CPUS}, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
