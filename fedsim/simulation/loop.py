"""The rounds of a run, and what is written after each."""

from __future__ import annotations

import time
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from fedsim.config import own_code
from fedsim.core import keys, tree
from fedsim.core.trace import span
from fedsim.core.tree import Tree, under
from fedsim.errors import MethodFault
from fedsim.federated import verbs
from fedsim.fleet.local_fleet import LocalFleet
from fedsim.fleet.received_masks import ReceivedMasks
from fedsim.nn.net import Net
from fedsim.simulation.devices import clock
from fedsim.simulation.devices.clock import played
from fedsim.simulation.evaluation import due, evaluate, final_gates
from fedsim.simulation.experiment import Experiment
from fedsim.simulation.exported.network import Final
from fedsim.simulation.finished_round import Callback, FinishedRound
from fedsim.simulation.mirrors.sender import Mirror
from fedsim.simulation.progress import Progress
from fedsim.simulation.resume import RunStart
from fedsim.simulation.round_record import RoundRow, row_of, speeds
from fedsim.storage import checkpoint
from fedsim.storage.checkpoint import Taken
from fedsim.storage.client_gates import Gates
from fedsim.storage.known_classes import KnownClasses
from fedsim.storage.manifest import name_of
from fedsim.storage.places.presence import check_checkpoint, writing
from fedsim.storage.writer import RunWriter

Number = TypeVar("Number", int, float)


def bytes_written() -> int:
    """Bytes that this thread has written so far, as the kernel counts them; 0 on a system that does not count."""
    try:
        counters = Path("/proc/thread-self/io").read_text()
    except OSError:
        return 0
    return int(counters.partition("wchar:")[2].split()[0])


class RoundWriter:
    """Writes rows and checkpoints down: row, flush, counter, mirror, checkpoint."""

    def __init__(self, parts: Experiment, record: RunWriter, start: RunStart, plan: str, mirror: Mirror | None = None) -> None:
        self.parts, self.record, self.start, self.mirror = parts, record, start, mirror
        self.extra = {"plan": plan, "job_sha256": parts.identity}
        self.known = KnownClasses(own_code.modules(parts.job))
        self.seconds, self.bytes = 0.0, 0  # of the last write
        self.kept: dict[int, Tree] = {}  # touched since the last checkpoint
        self.last: int | None = None  # the round of the last checkpoint
        self.saved: Mapping[int, Tree] | None = None  # all kept states, as the last checkpoint has them

    def taken(self, r: int, state: Any) -> Taken | None:
        """What the checkpoint of round `r` holds of the state; None where none is due."""
        if r % self.parts.job.execution.checkpoint_every and r != self.parts.job.rounds:
            return None
        where = f"{verbs.name_of(self.parts.method)}, round (r = {r})"
        with verbs.storing(where):
            taken = Taken.of(state)
        try:
            self.known.check(taken.plain)
        except ValueError as error:
            raise MethodFault(f"{where}: a checkpoint of the state it returned could not be read: {error}") from None
        return taken

    def write(self, r: int, row: RoundRow, state: Taken | None, kept: dict[int, Tree]) -> None:
        """Writes down the row of round `r`, and the checkpoint where one is due. `kept`: of clients that were touched in it."""
        began, before = time.perf_counter(), bytes_written()
        with writing(self.start.path):
            self._check()
            with span("record", r=r):
                self.record.row(r, row.values, row.clients, row.layers, row.masks, row.timing, row.gates, row.speed)
            self.kept |= kept
            if self.mirror and not self.start.scratch:
                self.mirror.row(r)
            if state is not None:
                self._check()
                before = self.start.round if self.last is None else self.last
                with span("checkpoint", r=r):
                    self.saved = checkpoint.save(self.start.folder, r, state, self.extra, self.kept, before)
                self.kept, self.last = {}, r
                self._copy_back(r)
        self.seconds, self.bytes = time.perf_counter() - began, bytes_written() - before

    def hand_back(self, fleet: LocalFleet) -> None:
        """Once they are saved, the fleet reads kept states from the disk, but for those that clients have touched since."""
        if self.saved is not None:
            newer = {client: fleet.kept[client] for client in fleet.touched}
            fleet.kept, self.saved = ChainMap(newer, self.saved), None  # type: ignore[arg-type]

    def finish(self, model: Tree, gates: Gates | None) -> None:
        """Stores the final model."""
        with writing(self.start.path):
            self._check()
            self.record.finish(model, tree.sha256_of(model), gates)

    def _copy_back(self, r: int) -> None:
        """From the scratch folder; then a mirror can read the row of round `r`."""
        if self.start.scratch:
            self._check()
            self.start.scratch.copy_back()
            if self.mirror:
                self.mirror.row(r)

    def _check(self) -> None:
        """CannotWrite where another run writes the file by now, or what was written is not there any more."""
        self.start.check()
        self.record.check()
        if self.last is not None:
            check_checkpoint(self.start.folder / name_of(self.last))


def simulate(
    parts: Experiment, fleet: LocalFleet, writer: RoundWriter, start: RunStart, progress: Progress, callback: Callback | None = None
) -> None:
    """Runs every round that is still to be done, and stores the final model. Ends earlier after a round that `callback` stops at."""
    setting, method, rounds = parts.setting, parts.method, parts.job.rounds
    state = _resumed(start, fleet) if start.checkpoint else start.take_state()
    masks = under(verbs.deploy(method, setting, state, fleet, [])[0], keys.MASKS)
    for r in range(start.round + 1, rounds + 1):
        began, timing, moved, traffic = time.perf_counter(), dict(fleet.timing), dict(fleet.moved), dict(fleet.traffic)
        fleet.open(r)
        with span("method", r=r):
            state, found = played(method, setting, state, fleet, r)
        trained, timing, moved = time.perf_counter(), _since(timing, fleet.timing), _since(moved, fleet.moved)
        with span("evaluate", r=r):
            score = evaluate(parts, state, fleet, r) if due(parts, r) else None
        ended = time.perf_counter()
        with span("wait for the record of the round before"):
            fleet.drain()
        with span("row", r=r):
            shared, _, net = verbs.deploy(method, setting, state, fleet, [])
            row = row_of(parts.model_profile, fleet.account.bills, score, shared, masks, found, net or setting.net)
        row.timing.update(timing, server=trained - began - sum(timing.values()), evaluate=ended - trained, record=writer.seconds)
        row.speed.update(speeds(fleet.account.bills, parts.job.train.batch, row.timing, moved | {"record": writer.bytes}))
        row.values.update(_since(traffic, fleet.traffic), executed_memory=fleet.account.executed)
        row.values.update({"deploy_flops": fleet.account.deployed} if fleet.account.deployed else {})
        clock.record(row, fleet)
        row.values["seconds"] = time.perf_counter() - began
        masks = row.masks
        with span("copy for the record", r=r):
            fleet.later(partial(writer.write, r, *_to_keep(writer, r, row, state, fleet)), partial(writer.hand_back, fleet))
        progress.advance(r, row)
        if callback and _stops(callback, FinishedRound(r, rounds, dict(row.values), partial(_module, parts, net or setting.net, shared))):
            return
    fleet.drain()
    model = _model(*verbs.deploy(method, setting, state, fleet, []))
    writer.finish(model, final_gates(parts, state, fleet))


def _stops(callback: Callback, finished: FinishedRound) -> bool:
    """Whether the callback ends the run before its last round."""
    callback(finished)
    return finished.stopped and finished.round < finished.rounds


def _module(parts: Experiment, net: Net, shared: Tree) -> nn.Module:
    """The server's model as a torch module that shares no memory with the run."""
    values = {key: value.clone() for key, value in under(shared, keys.WEIGHTS, keys.BUFFERS, keys.MASKS, keys.GATES).items()}
    return Final(net, values, parts.model_profile).module


def _since(before: Mapping[str, Number], now: Mapping[str, Number]) -> dict[str, Number]:
    """By how much each of some growing numbers has grown."""
    return {name: now[name] - before[name] for name in now}


def _model(shared: Tree, own: Tree, net: Net | None) -> Tree:
    """What the run file keeps of a deployed model: its values, and after a cut which channels of the original network they are."""
    index = {keys.INDICES + group: kept for group, kept in net.kept.items()} if net else {}
    return under(shared, keys.WEIGHTS, keys.BUFFERS, keys.MASKS, keys.GATES) | index


def _to_keep(writer: RoundWriter, r: int, row: RoundRow, state: Any, fleet: LocalFleet) -> tuple[RoundRow, Taken | None, dict[int, Tree]]:
    """What is written down of this moment: the row, what a checkpoint holds where one is due, and the kept states that changed.

    A method may change its state in place, so it is a copy. Nothing of it lies on a GPU, which the thread that writes must leave alone:
    another records a graph there.
    """
    kept = {client: fleet.kept[client] for client in sorted(fleet.touched)}
    fleet.touched.clear()
    taken = writer.taken(r, (state, fleet.account.received, *clock.kept(fleet)))
    masks = {key: value.to("cpu", copy=True) for key, value in row.masks.items()}
    return replace(row, masks=masks), taken, {client: {key: value.cpu() for key, value in held.items()} for client, held in kept.items()}


def _resumed(start: RunStart, fleet: LocalFleet) -> Any:
    assert start.checkpoint is not None
    state, received, *held = start.checkpoint.state
    assert isinstance(received, ReceivedMasks)
    fleet.account.received = received
    clock.resume(fleet, held)
    return state
