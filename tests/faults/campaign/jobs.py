"""The runs that the campaign disturbs: four methods on few real digits, a second or two of work each, and what they give undisturbed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import h5py
from processes import digits

IMAGES = "images.h5"
TRAIN, TEST = 480, 200  # images
JOB = """
name = "{name}"
rounds = {rounds}
[data]
name = "file"
path = "{images}"
[partition]
name = "iid"
clients = 6
{partition}
[cohort]
size = {cohort}
[model]
width = 4
{model}
[train]
batch = 16
lr = 0.05
{train}
[evaluate]
every = 2
[execution]
plan = "reference"
device = "cpu"
[method]
{method}
"""


@dataclass(frozen=True)
class Small:
    """A job: its parts in TOML, and the rounds in which more happens than training (a kill may aim at them)."""

    name: str
    rounds: int
    method: str
    model: str
    train: str
    partition: str = ""
    cohort: int = 4
    aims: tuple[int, ...] = ()

    def text(self, images: Path) -> str:
        fields = {name: value for name, value in vars(self).items() if name != "aims"}
        return JOB.format(images=images, **fields)


JOBS = {
    job.name: job
    for job in (
        Small(  # masks move in rounds 2, 4, 6, 8 and 10
            "fedtiny",
            12,
            'name = "fedtiny"\ndensity = 0.2\npool = 3\nadjust_every = 2\nstop_round = 10',
            'name = "cnn"',
            "epochs = 2",
            "public = 2",
            aims=(1, 3, 5, 7, 9),
        ),
        Small(  # the permanent cut follows round 6
            "dwfnp",
            12,
            'name = "dwfnp"\ncotrain = 6\nwarmup = 1\nhyper_lr = 0.02\nbias = 0.5',
            'name = "resnet8"\nnorm = "group"\nstandardise = true',
            "steps = 3\nmomentum = 0.9",
            "holdout = 0.2",
            6,
            aims=(5, 6),
        ),
        Small(  # clients count how often channels open, train for themselves and get their networks, after the last round
            "adp",
            10,
            'name = "adp"\nexport_gate = "folded"\npersonalise = 1',
            'name = "cnn"\ngate_keep = 0.5',
            "epochs = 2\nmomentum = 0.9",
            aims=(9, 10),
        ),
        Small("scaffold", 12, 'name = "scaffold"', 'name = "cnn"', "epochs = 2"),  # every client keeps a control variate
    )
}


def lay_out(folder: Path, images: Path) -> Path:
    """Writes the job files into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for job in JOBS.values():
        (folder / f"{job.name}.toml").write_text(job.text(images))
    return folder


def write_images(path: Path) -> Path:
    """Real digits, as a user's own file."""
    x, y = digits()
    with h5py.File(path, "w") as file:
        file["x"], file["y"], file["x_test"], file["y_test"] = x[:TRAIN], y[:TRAIN], x[-TEST:], y[-TEST:]
    return path
