"""Clients whose names in the user's own file look like numbers: what the commands call them, and whom they mean."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from captured_console import Fedsim
from small_job import small_job

from fedsim.cli import run_files
from fedsim.errors import BadInput

USERS = np.array(["12", "3", "0", "[red]"])  # clients 1, 2, 0 and 3, in the order of their names
OWN = {
    "data": {"name": "file", "path": "mine.npz"},
    "partition": {"name": "natural", "clients": 0, "min_images": 1, "holdout": 0.2},
    "train": {"steps": 5},
    "method": {"name": "dwfnp", "cotrain": 2, "warmup": 1},
}


@pytest.fixture(autouse=True)
def job(fedsim: Fedsim, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job whose clients end with a network each."""
    monkeypatch.setenv("COLUMNS", "300")
    draw = np.random.default_rng(0)
    x = draw.integers(0, 256, (80, 8, 8), dtype=np.uint8)
    np.savez("mine.npz", x=x, y=np.arange(80) % 5 % 2 + 1, client=USERS[np.arange(80) % 4])
    Path("job.toml").write_text(small_job(3, **OWN))


def test_a_name_goes_before_a_number(fedsim: Fedsim) -> None:
    ran = fedsim("run", "job.toml", "--out", "run.h5")
    assert any(f"(client {number}, called {name!r})" in ran.out for number, name in enumerate(("0", "12", "3", "[red]")))
    run = Path("run.h5")
    assert [run_files.client(run, text) for text in ("0", "12", "3", "[red]")] == [0, 1, 2, 3]
    for text in ("1", "-1", "ann"):  # some names are numbers, so that a number is a name too
        with pytest.raises(BadInput, match="has no client of this name; it has 0, 12, 3"):
            run_files.client(run, text)
    assert "wrote run.client2.pt" in fedsim("export", "run.h5", "--client", "3").out


def test_estimate_says_what_the_run_says_of_the_data(fedsim: Fedsim) -> None:
    dense = small_job(1, data=OWN["data"], method={"name": "fedavg"})
    Path("job.toml").write_text(dense)
    commands = ["estimate", "job.toml"], ["run", "job.toml", "--out", "run.h5"]
    estimated, ran = (" ".join(fedsim(*words).out.split()) for words in commands)
    for text in (estimated, ran):
        assert "note: 3 classes, of which 0 has no image (images by class: 1 has" in text
