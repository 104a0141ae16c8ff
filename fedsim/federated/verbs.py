"""The verbs of a method, called by the engine: what goes wrong in a method is reported with its name, its file and the verb."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from traceback import walk_tb
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim import errors, storage
from fedsim.core import masks, rng, serialization, shared_generators, tree
from fedsim.core.tree import Tree
from fedsim.errors import MethodFault
from fedsim.federated.protocol import Fleet, Method, Setting
from fedsim.nn.net import Net
from fedsim.storage.columns import COLUMNS, OF_DEVICES

OF_ENGINE = {path.removeprefix("rounds/") for path in COLUMNS | OF_DEVICES if path.startswith("rounds/")} - {
    "lr"
}  # columns that no method records
STORAGE = Path(storage.__file__).parent
INIT = "the state before round 0: a dataclass, or dicts, lists and tuples, of tensors, numbers and text"
ROUND = "(state, record): the state after the round, and a dict of what to record, name -> number"
DEPLOY = "(shared, own, net): two dicts of tensors, which may be empty, and a fedsim.Net after a permanent cut or None"


def init(method: Method[Any], setting: Setting, public: Any) -> Any:
    """The method's first state. MethodFault where it is None, or where no checkpoint could hold it."""
    where = f"{name_of(method)}, init"
    with _reporting(where), _seeded(setting, "init"):
        state = method.init(setting, public)
    if state is None:
        raise MethodFault(f"{where}: it returned None; it must return {INIT}")
    with storing(where):
        serialization.dump(state)
    return state


def round(method: Method[Any], setting: Setting, state: Any, fleet: Fleet, r: int) -> tuple[Any, dict[str, float]]:
    """The state after round `r` and what to record, with what the server was charged. MethodFault where they are not that."""
    where = f"{name_of(method)}, round (r = {r})"
    with _reporting(where), _seeded(setting, "round", r):
        found: Any = method.round(setting, state, fleet, r)
    if not isinstance(found, tuple | list) or len(found) != 2 or found[0] is None or not isinstance(found[1], Mapping):
        raise MethodFault(f"{where}: it returned {shown(found)}; it must return {ROUND}")
    record = {_column(where, key): _number(where, key, value) for key, value in found[1].items()}
    return found[0], record | setting.server.take()


def deploy(method: Method[Any], setting: Setting, state: Any, fleet: Fleet, cohort: Sequence[int]) -> tuple[Tree, Tree, Net | None]:
    """What clients use. MethodFault where it is not two trees and a network or None, or does not fit the network."""
    where = f"{name_of(method)}, deploy"
    with _reporting(where), _seeded(setting, "deploy"), setting.server.untouched():
        found: Any = method.deploy(setting, state, fleet, cohort)
    if not isinstance(found, tuple | list) or len(found) != 3 or not (found[2] is None or isinstance(found[2], Net)):
        raise MethodFault(f"{where}: it returned {shown(found)}; it must return {DEPLOY}")
    shared, own, net = found
    with _reporting(where, bare=True):
        tree.check(shared, "shared")
        masks.check(shared)
        tree.check(own, "own")
        fits(net or setting.net, shared, "shared")
        for key, value in own.items():
            if value.dim() == 0 or len(value) != len(cohort):
                rows = f"own {key!r} is {tuple(value.shape)}; it must have a row for each of the {len(cohort)} clients of the cohort"
                raise ValueError(rows)
    return shared, own, net


def fits(net: Net, held: Tree, name: str) -> None:
    """Raises ValueError where a weight or a buffer in `held` is not of the network's shape and dtype. `name` is how messages call it."""
    for key, value in net.initial.items():
        mine = held.get(key)
        if mine is not None and (mine.shape != value.shape or (mine.dtype != value.dtype and mine.dtype != torch.float32)):
            right = f"{tuple(value.shape)} {value.dtype}"
            raise ValueError(f"{name} {key!r} is {tuple(mine.shape)} {mine.dtype}; the network has it as {right}")


@contextmanager
def storing(where: str) -> Iterator[None]:
    """A state that no checkpoint can hold is reported as the method's fault."""
    try:
        yield
    except TypeError as error:
        raise MethodFault(f"{where}: the state it returned cannot be stored in a checkpoint: {error}") from None


def name_of(method: object) -> str:
    """ "method mine:Method (mine.py)"."""
    kind = type(method)
    return f"method {kind.__module__}:{kind.__qualname__} ({file_of(kind)})"


def file_of(kind: type) -> str:
    """The file of a class, as a path from the working folder where it is below it."""
    return _file_from(kind, Path.cwd())


@cache
def _file_from(kind: type, folder: Path) -> str:
    """Once for a class: a method is named in every round, should it fail."""
    try:
        path = Path(inspect.getfile(kind))
    except (TypeError, OSError):
        return "in no file"
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def shown(value: Any) -> str:
    """What a value is, for the message that it is the wrong one."""
    if value is None:
        return "None"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)} ({', '.join(type(each).__name__ for each in value[:4])})"
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" + (f" {tuple(shape)}" if isinstance(shape, tuple) else "")


def _seeded(setting: Setting, *verb: str | int) -> AbstractContextManager[None]:
    """Draws of the method by torch, NumPy or Python depend on the job's seed, the verb and the round, in a resumed run too."""
    return shared_generators.seeded(rng.number(setting.seed, "method", *verb))


@contextmanager
def _reporting(where: str, bare: bool = False) -> Iterator[None]:
    """An error of the method's own code is reported with its place. `bare`: by a message alone."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if type(error).__module__ == errors.__name__ or _is_of_storage(error):
            raise
        trace = error.__traceback__
        while trace and trace.tb_next and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next  # it begins with the method's own line
        error.__traceback__ = trace
        raise MethodFault(f"{where}: {error if bare else f'{type(error).__name__}: {error}'}") from (None if bare else error)


def _is_of_storage(error: BaseException) -> bool:
    """Whether the run file or a checkpoint could not be written or read, which may happen while a round goes on."""
    files = (Path(frame.f_code.co_filename) for frame, _ in walk_tb(error.__traceback__))
    return isinstance(error, OSError) and any(file.is_relative_to(STORAGE) for file in files)


def _column(where: str, key: Any) -> str:
    right = "a name is a text without '/', such as \"loss_of_gates\""
    if not isinstance(key, str) or not key.strip() or "/" in key or "\0" in key or key in (".", "round"):
        raise MethodFault(f"{where}: it records {key!r}, which cannot name a column of the run file; {right}")
    if key in OF_ENGINE:
        raise MethodFault(f"{where}: it records {key!r}, which the engine itself measures; give it another name")
    return key


def _number(where: str, key: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if isinstance(value, bool | np.bool_ | np.integer | np.floating):
        return float(value)
    if isinstance(value, int | float):
        return value
    raise MethodFault(f"{where}: it records {key!r} as {shown(value)}; a record is one number, such as float(value.mean())")
