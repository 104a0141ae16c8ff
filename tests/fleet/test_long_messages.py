"""Messages that are longer than MPI takes at once go in pieces, and arrive as they were sent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rank_scripts import on_ranks
from small_job import small_job

SIZES = [0, 1, 999, 1000, 1001, 2000, 4321]  # bytes, in pieces of 1000
ECHO = f"""
import json, time
import numpy as np
from fedsim.fleet.mpi import communicator

communicator.PIECE = 1000
link, found = communicator.connect(time.perf_counter, time.sleep), []
for size in {SIZES}:
    sent = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    if link.rank == 0:
        link.send(dict.fromkeys((1, 2), sent), 5)
        found.append([len(link.receive(rank, 6)) for rank in (2, 1)])
    else:
        got = link.receive(0, 5)
        assert np.array_equal(got, sent)
        link.send({{0: got}}, 6)
if link.rank == 0:
    open("found.json", "w").write(json.dumps([found, link.messages]))
"""
RUN = """
import fedsim
from fedsim.fleet.mpi import communicator

communicator.PIECE = 100
fedsim.run("job.toml", out="ranks.h5", progress=False)
"""
LONG = """
import time
import numpy as np
from fedsim.fleet.mpi import communicator

link, size = communicator.connect(time.perf_counter, time.sleep), 2**31 + 5
if link.rank == 0:
    link.send({1: np.full(size, 7, np.uint8)}, 5)
else:
    got = link.receive(0, 5)
    assert got.nbytes == size and got[0] == got[-1] == 7
"""


@pytest.mark.processes
def test_messages_of_every_length_arrive_whole(tmp_path: Path) -> None:
    on_ranks(3, ECHO, tmp_path)
    found, messages = json.loads((tmp_path / "found.json").read_text())
    assert found == [[size, size] for size in SIZES]
    assert messages == sum(4 * (size // 1000 + 1) for size in SIZES)


@pytest.mark.processes
def test_a_run_in_short_pieces_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fedsim

    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.toml").write_text(small_job(2, method={"name": "fedtiny", "density": 0.5}, partition={"public": 5}))
    alone = fedsim.run("job.toml", out="alone.h5", progress=False)
    on_ranks(3, RUN, tmp_path)
    assert fedsim.open_run("ranks.h5").attributes["weights_sha256"] == alone.attributes["weights_sha256"]


@pytest.mark.outside
def test_a_message_above_the_limit_of_mpi_arrives(tmp_path: Path) -> None:
    on_ranks(2, LONG, tmp_path)
