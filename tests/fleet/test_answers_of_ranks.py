"""Answers of real ranks: whoever stops, rank 0 takes everything that is under way, and the next order finds nothing of the last."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rank_scripts import on_ranks
from small_job import small_job

RANKS = 5  # that train: 3 answers through 2, and 5 through 4
ANSWERS = f"""
import json, time
from pathlib import Path
import torch
from fedsim.config.job import load
from fedsim.core.exact_sum import Sum
from fedsim.errors import Stopped
from fedsim.federated.client_work import Train
from fedsim.fleet.messages import PackResult, WorkOrder
from fedsim.fleet.mpi import communicator
from fedsim.fleet.mpi.fleet import MPIFleet
from fedsim.fleet.mpi.worker import Worker
from fedsim.simulation.experiment import build_experiment

link, parts = communicator.connect(time.perf_counter, time.sleep), build_experiment(load(Path("job.toml")))
setting, found = parts.setting, []
fleet, order = MPIFleet(parts.site, parts.account(), 1, link), WorkOrder(Train.at(setting, 1), setting.net, setting.net.initial, 1, 100)
for stopped in (None, 1, 2, 3, 4, 5, None):
    link.comm.Barrier()  # as the order, which no rank answers before rank 0 has taken all answers to the last
    if link.rank:
        answer = PackResult(Sum(setting.net.initial, 100), [link.rank], loss={{link.rank: 0.0}})
        answer.each[link.rank] = {{"n/x": torch.full((20_000,), link.rank)}}  # long: it goes to rank 0 alone
        answer.total.add({{"w/fc2.bias": torch.full((1, 4), float(link.rank), dtype=torch.float64)}}, [link.rank], [20])
        Worker(parts.site, link).reply(answer, {RANKS}, link.rank == stopped)
        continue
    try:
        answer = fleet._joined(order, *fleet._collect({RANKS})[:1], {RANKS}, False)
        found.append([answer.total.value()["w/fc2.bias"].tolist(), [int(answer.each[rank]["n/x"][-1]) for rank in range(1, {RANKS + 1})]])
    except Stopped:
        found.append("stopped")
if not link.rank:
    Path("found.json").write_text(json.dumps([found, link.messages]))
"""
AGAIN = """
import os, signal
from pathlib import Path
import fedsim
rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", 0))


def stop(finished):
    if finished.round == 1:
        os.kill(os.getpid(), signal.SIGUSR1)


for name in ("first", "second"):
    try:
        fedsim.run("job.toml", out=f"{name}.h5", callback=stop, progress=False)
    except fedsim.Stopped:
        Path(f"stopped-{name}-{rank}").touch()
run = fedsim.run("job.toml", out="first.h5", progress=False)
Path(f"{run.rounds}-{run.attributes['weights_sha256']}-{rank}").touch()
"""


@pytest.mark.processes
def test_a_rank_that_stops_leaves_nothing_under_way(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(small_job(1))
    on_ranks(1 + RANKS, ANSWERS, tmp_path)
    found, messages = json.loads((tmp_path / "found.json").read_text())
    whole = [[15.0] * 4, [1, 2, 3, 4, 5]]
    assert found == [whole, *["stopped"] * RANKS, whole]
    replies, rows = 3 * 7, RANKS * 2 + (RANKS - 1) * RANKS  # of ranks 1, 2 and 4; of every rank that has not stopped
    totals = 3 * 2 + 5 * 3 - 1 - 2 - 2  # but of rank 1 where it stopped, of rank 2 where it or 3 did, of rank 4 where it or 5 did
    assert messages == replies + rows + totals


@pytest.mark.processes
def test_a_run_after_a_stopped_one_in_the_same_processes_is_not_stopped(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(small_job(4))
    on_ranks(3, AGAIN, tmp_path)
    found = {path.name for path in tmp_path.iterdir()}
    assert {f"stopped-{name}-{rank}" for name in ("first", "second") for rank in range(3)} <= found
    ended = {name for name in found if name.startswith("4-")}
    assert len(ended) == 3
    assert len({name[:-1] for name in ended}) == 1
