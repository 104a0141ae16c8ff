"""The table of methods, and how one of them is run; also the program that `mpirun` starts: `python cases.py FOLDER NAME METHOD:WAY…`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

HERE = Path(__file__).parent
SIZES = (7, 10, 23, 16, 1)  # images of the clients, with a batch of 10: padded, exact, three steps, two, a lone image
ROUNDS = 3


@dataclass(frozen=True)
class Case:
    """A method of the table: one line each."""

    method: str
    fields: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    holdout: float = 0.0
    public: int = 0
    masked: bool = False  # the server's model has masks
    budget: float | None = 1.0  # the whole density it may not exceed; None: it starts denser by definition
    model: dict[str, Any] = field(default_factory=dict)
    cohort: dict[str, Any] = field(default_factory=dict)
    devices: dict[str, Any] = field(default_factory=dict)


TINY = {"density": 0.3, "pool": 2, "pretrain_epochs": 0, "adjust_every": 1, "stop_round": 4, "probe_share": 0.5}
BY_STATISTICS = TINY | {"bn_passes": 2}
MOVED = {"density": 0.3, "adjust_every": 2, "stop_round": 4, "penalty": 0.05}
GATED = {"cotrain": 2, "warmup": 0, "hyper_interval": 1, "hyper_lr": 0.05, "unseen_clients": "accept"}
PRUNEFL = {
    "adjust_every": 2,
    "constant_seconds": 0.02,
}
INITIAL = {"initial_iterations": 6, "initial_every": 2, "initial_batch": 5, "start_accuracy": 0}
BY_KIND = {"board": 0.5, "single_board_computer": 0.5, "mid_phone": 1.0, "fast_phone": 1.0}
STEPS = {"epochs": None, "steps": 3}
TABLE = {
    "fedavg": Case("fedavg"),
    "at-init-magnitude": Case("magnitude", {"density": 0.3, "pretrain_epochs": 1, "class_weights": 2}, public=1, masked=True, budget=0.3),
    "at-init-random": Case("random", {"density": 0.3}, {"aggregate": "fednova"}, masked=True, budget=0.3),
    "at-init-snip": Case("snip", {"density": 0.3, "iterations": 2}, public=1, masked=True, budget=0.3),
    "at-init-clients": Case("snip", {"density": 0.3, "data": "clients"}, {"aggregate": "scaffold"}, masked=True, budget=0.3),
    "at-init-synflow": Case("synflow", {"density": 0.3, "iterations": 5}, masked=True, budget=0.3),
    "at-init-grasp": Case("grasp", {"density": 0.3}, {"aggregate": "fedprox"}, public=1, masked=True, budget=0.3),
    "fedprox": Case("fedprox", train={"fedprox_mu": 0.5}),
    "fednova": Case("fednova"),
    "scaffold": Case("scaffold"),
    "rigl": Case("rigl", {"density": 0.3, "adjust_every": 1, "stop_round": 4}, masked=True, budget=0.3),
    "set": Case(
        "set",
        {"density": 0.3, "adjust_every": 2, "stop_round": 4, "regrow": False},
        {"aggregate": "scaffold"},
        masked=True,
        budget=0.3,
    ),
    "gradual": Case("gradual", {"density": 0.3, "adjust_every": 2, "stop_round": 3}, masked=True, budget=None),
    "feddip": Case("feddip", {"density": 0.3, "reconfigure_every": 2, "penalty": 0.1, "segments": 3}, masked=True, budget=None),
    "fedtiny": Case("fedtiny", BY_STATISTICS | {"pretrain_epochs": 1}, public=1, masked=True, budget=0.3),
    "fedtiny-last-step": Case(
        "fedtiny",
        TINY | {"growth": "last_step", "selection": "vanilla"},
        {"optimiser": "adam", "lr": 0.003, "momentum": 0.0},
        masked=True,
        budget=0.3,
    ),
    "fedtiny-scaffold": Case("fedtiny", BY_STATISTICS, {"aggregate": "scaffold"}, masked=True, budget=0.3),
    "fedtiny-standardised": Case(
        "fedtiny", TINY | {"selection": "vanilla"}, masked=True, budget=0.3, model={"norm": "group", "standardise": True}
    ),
    "prunefl": Case("prunefl", PRUNEFL | INITIAL, masked=True, budget=None),
    "prunefl-capped": Case(
        "prunefl",
        PRUNEFL | {"importance": "reconfiguration_round", "max_density": 0.6, "density": 0.4, "initial_iterations": 0},
        {"aggregate": "scaffold"},
        masked=True,
        budget=None,
    ),
    "prunefl-library": Case("prunefl", {"form": "library", "density": 0.3, "adjust_every": 2, "stop_round": 4}, masked=True, budget=0.3),
    "fedrts": Case("fedrts", {"density": 0.3, "adjust_every": 2, "stop_round": 4}, masked=True, budget=0.3),
    "dwfnp": Case("dwfnp", GATED, STEPS, holdout=0.2),
    "dwfnp-client": Case("dwfnp", GATED | {"hypernet": "client", "finetune": "static", "norm_over": "all"}, STEPS, holdout=0.2),
    "feddst": Case("feddst", {"density": 0.3, "adjust_every": 1, "stop_round": 4, "adjust_fraction": 0.5}, masked=True, budget=0.3),
    "feddst-library": Case(
        "feddst",
        {"density": 0.3, "adjust_fraction": 0.5, "stop_round": 3, "average": "zeros", "adjust_epoch": 0, "min_votes": 2},
        {"aggregate": "fedprox", "fedprox_mu": 0.5, "optimiser": "adam", "lr": 0.003, "momentum": 0.0},
        masked=True,
        budget=0.3,
    ),
    "feddst-between": Case(
        "feddst",
        {"density": 0.3, "adjust_fraction": 1.0, "stop_round": 3, "adjust_epoch": 1, "mask_first": True, "regrow": False},
        {"activation_keep": 0.5},
        masked=True,
        budget=0.3,
    ),
    "fedmef": Case("fedmef", MOVED | {"extrusion_rounds": 1}, {"activation_keep": 0.3}, masked=True, budget=0.3, model={"norm": "nsconv"}),
    "fedmef-options": Case(
        "fedmef",
        MOVED
        | {
            "remark_every_step": True,
            "ramp": True,
            "drop_rule": "marked",
            "penalty_form": "norm",
            "beta_norm": "l1",
            "budget": 3,
            "blocks": 2,
        },
        {"activation_keep": 0.5, "activation_cache": "int32", "schedule": "exponential", "factor": 0.5},
        masked=True,
        budget=0.3,
    ),
    "lotteryfl": Case("lotteryfl", {"target": 0.3, "threshold": 0.05, "prune": 0.4}, holdout=0.2),
    "lotteryfl-options": Case(
        "lotteryfl",
        {"threshold": 0.0, "prune": 0.5, "weights": "uniform", "mask_first": True, "mask_classifier": False},
        {"aggregate": "fedprox", "fedprox_mu": 0.5, "optimiser": "adam", "lr": 0.003, "momentum": 0.0},
        holdout=0.3,
    ),
    "finetune": Case("finetune", {"epochs": 2}),
    "finetune-options": Case("finetune", {"lr": 0.02}, STEPS | {"aggregate": "scaffold", "schedule": "cosine"}, model={"norm": "group"}),
    "adp": Case("adp", model={"gate_keep": 0.5}),
    "adp-options": Case(
        "adp",
        {"gates": "local", "bn": "local", "export_gate": "folded", "align": 3, "personalise": 1},
        {"lr": 0.01},
        model={"name": "resnet8", "gate_keep": 0.5, "gate_l1": 1e-3, "gate_place": "affine"},
    ),
    "adp-global": Case("adp", {"export": "global"}, model={"name": "resnet8", "gate_keep": 0.6, "norm": "group"}),
    "heterofl": Case("heterofl", {"rates": (1.0, 0.5, 0.25)}),
    "heterofl-options": Case(
        "heterofl",
        {"rates": (0.7, 0.3), "assignment": "dynamic", "weights": "samples", "scaler": False, "static_norm": False, "mask_classes": False},
        {"aggregate": "fedprox", "fedprox_mu": 0.1},
        model={"name": "resnet8"},
    ),
    "flpqsu": Case("flpqsu"),
    "fedtiny-gated": Case("fedtiny", BY_STATISTICS, masked=True, budget=0.3, model={"gate_keep": 0.5}),
    "feddp": Case("feddp", {"theta": 0.02, "filters": 0.3}),
    "structured": Case("structured", {"choice": "fl1", "cotrain": 2}, STEPS),
    "devices": Case("fedtiny", BY_STATISTICS, masked=True, budget=0.3, cohort={"least": 2}, devices={"name": "phones"}),
    "devices-deadline": Case(
        "dwfnp", GATED, STEPS, holdout=0.2, cohort={"mode": "deadline", "deadline": 0.2}, devices={"name": "four_kinds"}
    ),
    "devices-oversample": Case(
        "scaffold", cohort={"size": 2, "mode": "oversample", "extra": 0.5, "select": "available"}, devices={"name": "phones"}
    ),
    "devices-buffered": Case(
        "magnitude",
        {"density": 0.3},
        masked=True,
        budget=0.3,
        cohort={"mode": "buffered", "concurrency": 3, "buffer": 2, "select": "available"},
        devices={"name": "phones"},
    ),
    "devices-fit": Case("heterofl", {"rates": BY_KIND}, cohort={"select": "fastest"}, devices={"name": "four_kinds", "unfit": "fit"}),
    "static-mask": Case("toys:StaticMask", {"density": 0.3}, masked=True, budget=0.3),
    "keeper": Case("toys:Keeper", holdout=0.2),
    "prober": Case("toys:Prober", {"k": 5}),
    "gated": Case("toys:Gated"),
    "dropout": Case(
        "fedtiny",
        BY_STATISTICS | {"pretrain_epochs": 1},
        public=1,
        masked=True,
        budget=0.3,
        model={"factory": "toys:with_dropout", "name": "cnn", "width": None},
    ),
}
FLEETS = ("serial", "packed")
WAYS: dict[str, dict[str, Any]] = {  # [execution] of every way to compute the same
    "serial": {"fleet": "serial", "packs": 4},
    "packed": {"fleet": "packed", "packs": 2},
    "sparse": {"fleet": "serial", "packs": 4, "kernels": "sparse"},
}
RUNS = [(name, way) for name, case in TABLE.items() for way in WAYS if way != "sparse" or case.masked]
DISTINCT = ("static-mask", "keeper", "prober", "dwfnp", "adp-options", "fedtiny")  # lines that send different kinds of messages


def images(folder: Path) -> Path:
    """A user's own file: real digits of clients with SIZES images, and a test set."""
    path = folder / "digits.h5"
    if not path.exists():
        from sklearn.datasets import load_digits  # it takes a second, which ranks that find the file need not wait

        digits = load_digits()
        x, y = (digits.images * 15.9).astype(np.uint8), digits.target
        n = sum(SIZES)
        with h5py.File(path, "w") as file:
            file["x"], file["y"], file["client"] = x[:n], y[:n], np.repeat(np.arange(len(SIZES)), SIZES)
            file["x_test"], file["y_test"] = x[n : n + 60], y[n : n + 60]
    return path


def table(name: str, way: str, folder: Path) -> dict[str, Any]:
    """The job of a line of the table, as its TOML file would say it."""
    case = TABLE[name]
    return {
        "name": f"{name}-{way}",
        "rounds": ROUNDS,
        "data": {"name": "file", "path": str(images(folder)), "augment": ["crop", "flip", "cutout"], "crop_pad": 1, "cutout": 3},
        "partition": {"name": "natural", "clients": 0, "min_images": 1, "holdout": case.holdout, "public": case.public},
        "cohort": {"size": 4} | case.cohort,
        "devices": case.devices,
        "model": {"name": "cnn", "width": 4, "norm": "batch"} | case.model,
        "train": {"epochs": 2, "batch": 10, "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3} | case.train,
        "method": {"name": case.method} | case.fields,
        "evaluate": {"every": 1, "batch": 32},
        "execution": {"plan": "reference", "device": "cpu"} | WAYS[way],
    }


def run(name: str, way: str, folder: Path, out: Path, stopped: Callable[[], bool] | None = None, change: dict | None = None) -> int:
    """Runs one line of the table on this process's ranks; the exit code."""
    from fedsim.config import job
    from fedsim.simulation import launch

    made = job.check(table(name, way, folder) | (change or {}))
    return launch.main(made, out, "auto") if stopped is None else stopping(made, out, stopped)


def stopping(made: Any, out: Path, stopped: Callable[[], bool]) -> int:
    """A run that `stopped` may end between two packs, as a signal would."""
    from fedsim.errors import Stopped
    from fedsim.simulation import launch
    from fedsim.simulation.experiment import build_experiment
    from fedsim.simulation.resume import find_start

    parts = build_experiment(made, 0, stopped)
    try:
        launch.lead(parts, find_start(parts, out, "auto"), None, ["here"], launch.Observer())
    except Stopped:
        return 3
    return 0


if __name__ == "__main__":
    sys.path[:0] = [str(HERE)]
    where = Path(sys.argv[1])
    for pair in sys.argv[3:]:
        line, kind = pair.split(":")
        if code := run(line, kind, where, where / sys.argv[2] / f"{line}-{kind}.h5"):
            sys.exit(code)
