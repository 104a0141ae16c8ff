"""fedsim simulates federated network pruning. `fedsim.run("job.toml")` runs a job.

Functions (`help(fedsim.run)` has arguments, results, errors and an example):
    run             does one run of a job and returns its run file, opened
    sweep           does all runs of the [sweep] of a job, in several processes
    submit          submits one run, or those of the [sweep], to SLURM
    estimate        predicts bytes, FLOPs and memory of a job without training
    load_job        reads and validates a job
    open_run        opens a run file for reading
    export_module   the final network of a run as a plain torch module

What they take, return and raise:
    Job             a validated job
    RunReader       a run file, opened for reading
    Submission      what `submit` gave to SLURM
    FinishedRound   a round, as the callback of `run` sees it
    BadInput        the job, the data or an argument is wrong
    ClientFault     an exception in the work of a client
    MethodFault     an exception in a method on the server, or a wrong value that it returned
    Stopped         a signal or a time limit ended the run

For authors of methods:
    Method, Work, Train, Fleet, Setting, ClientInput, Report, Reply   the server, the work of one client, and what they exchange
    AveragedState, averaged_round, trained                            a round that averages weights
    FedAvg                                                            the plain mean, from which aggregations of one's own inherit
    Batch, Data, Feed, Tree, Net                                      images, named tensors, and the network
    keys, masks, rng, tree                                            modules: names of tensors, masks, random numbers, arithmetic

Names are imported when they are first used, so that `import fedsim` takes no time.

>>> import fedsim
>>> fedsim.load_job({"method": {"name": "fedavg"}}).rounds
100
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "fedsim.api": ("estimate", "export_module", "load_job", "open_run", "run", "submit", "sweep"),
    "fedsim.config.job": ("Job",),
    "fedsim.errors": ("BadInput", "ClientFault", "MethodFault", "Stopped"),
    "fedsim.simulation.finished_round": ("FinishedRound",),
    "fedsim.storage.reader": ("RunReader",),
    "fedsim.slurm.submission": ("Submission",),
    "fedsim.federated.protocol": ("ClientInput", "Fleet", "Method", "Reply", "Report", "Setting", "Work"),
    "fedsim.federated.client_work": ("Train",),
    "fedsim.federated.aggregation": ("FedAvg",),
    "fedsim.federated.averaged_round": ("AveragedState", "averaged_round", "trained"),
    "fedsim.core.types": ("Batch", "Data", "Feed", "Tree"),
    "fedsim.nn.net": ("Net",),
    "fedsim.core": ("keys", "masks", "rng", "tree"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = [*sorted(_HOME_OF)]

if TYPE_CHECKING:
    from fedsim.api import estimate, export_module, load_job, open_run, run, submit, sweep
    from fedsim.config.job import Job
    from fedsim.core import keys, masks, rng, tree
    from fedsim.core.types import Batch, Data, Feed, Tree
    from fedsim.errors import BadInput, ClientFault, MethodFault, Stopped
    from fedsim.federated.aggregation import FedAvg
    from fedsim.federated.averaged_round import AveragedState, averaged_round, trained
    from fedsim.federated.client_work import Train
    from fedsim.federated.protocol import ClientInput, Fleet, Method, Reply, Report, Setting, Work
    from fedsim.nn.net import Net
    from fedsim.simulation.finished_round import FinishedRound
    from fedsim.slurm.submission import Submission
    from fedsim.storage.reader import RunReader


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'fedsim' has no attribute {name!r}; it has {', '.join(__all__)}")
    home = import_module(_HOME_OF[name])
    value = import_module(f"fedsim.core.{name}") if _HOME_OF[name] == "fedsim.core" else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
