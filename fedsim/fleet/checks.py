"""What a work returns, checked: its verbs are called here, and wrong values are reported."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from fedsim.core import shared_generators, tree
from fedsim.core.tree import Tree
from fedsim.core.types import Batch
from fedsim.federated.protocol import ClientInput, Report, Work
from fedsim.federated.verbs import file_of, shown
from fedsim.fleet.messages import ErrorContext, Pack, PackResult, WorkerContext, WorkOrder
from fedsim.nn.layers.input_gate import gates_of
from fedsim.nn.layers.nsconv import NormalisedConv2d
from fedsim.nn.net import Net

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def init_kept(work: Work, net: Net, sent: ClientInput) -> Tree:
    return _tree(work, "init_kept", work.init_kept(net, sent))


def init_state(work: Work, net: Net, sent: ClientInput) -> Tree:
    return _tree(work, "init_state", work.init_state(net, sent))


def begin_feed(work: Work, net: Net, sent: ClientInput, state: Tree, feed: int) -> Tree:
    return _tree(work, "begin_feed", work.begin_feed(net, sent, state, feed))


def step(work: Work, net: Net, sent: ClientInput, state: Tree, batch: Batch) -> tuple[Tree, Tensor]:
    found: Any = work.step(net, sent, state, batch)
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[0], dict) or not isinstance(found[1], Tensor):
        right = "(state, loss): a dict of tensors, and the batch's mean loss as a tensor ()"
        raise _wrong(work, "step", f"it returned {shown(found)}; it must return {right}")
    if found[1].dim() or not found[1].is_floating_point():
        loss = f"{tuple(found[1].shape)} {found[1].dtype}"
        raise _wrong(work, "step", f"its loss is {loss}; it must be the batch's mean loss, one float: ()")
    return found[0], found[1]


def finish(work: Work, net: Net, sent: ClientInput, state: Tree) -> Report:
    report: Any = work.finish(net, sent, state)
    if not isinstance(report, Report):
        raise _wrong(work, "finish", f"it returned {shown(report)}; it must return a fedsim.Report(total, each, keep)")
    for name in ("total", "each", "keep"):
        _tree(work, "finish", getattr(report, name), name)
    made: Report = report
    return made


def _tree(work: Work, verb: str, found: Tree, name: str = "") -> Tree:
    """`found`, if it is a tree."""
    try:
        tree.check(found, name or "what it returned")
    except (TypeError, ValueError) as error:
        raise _wrong(work, verb, str(error)) from None
    return found


def _wrong(work: Work, verb: str, what: str) -> TypeError:
    return TypeError(f"{verb} of {type(work).__qualname__} ({file_of(type(work))}): {what}")


def drawing_by_keys(answers: Iterable[PackResult], order: WorkOrder, packs: Sequence[Pack], site: WorkerContext) -> Iterator[PackResult]:
    """The answers of the packs. ClientFault after the last one if the work has drawn by a generator that all clients share."""
    before = shared_generators.states()
    yield from answers
    if whose := shared_generators.moved(before):
        what = f"it draws random numbers by the generator of {whose}, so what a client draws depends on the clients before it"
        with ErrorContext(order, site, packs[0].clients[:1], "step").reporting():
            raise ValueError(f"{what}; fedsim.rng draws by a key: rng.uniform(rng.fold(sent.key, batch.t), count)")


def alike(rows: Sequence[Tree], clients: Sequence[int], name: str) -> None:
    """Raises ValueError where clients report trees of other keys, shapes or dtypes than the first."""
    if not any(rows):
        return
    first = form(rows[0])
    for row, client in zip(rows, clients, strict=True):
        if (mine := form(row)) != first:
            key = min(key for key in {*mine, *first} if mine.get(key) != first.get(key))
            both = [
                f"client {who} reports {name} {key!r} as {held.get(key, 'nothing')}" for who, held in ((client, mine), (clients[0], first))
            ]
            raise ValueError(f"{', '.join(both)}; all clients of a cohort must report the same keys, shapes and dtypes")


def form(row: Tree) -> dict[str, str]:
    """The shape and the dtype of every tensor, as a message says them."""
    return {key: f"{tuple(value.shape)} {value.dtype}" for key, value in row.items()}


def unchanged(start: Tree, state: Tree) -> None:
    """Raises where a state no longer has the keys, shapes and dtypes that `start` fixed."""
    if start.keys() != state.keys():
        odd = sorted(start.keys() ^ state.keys())
        raise ValueError(f"{', '.join(odd)}: init_state fixes the keys of the state; a step must neither add nor drop one")
    for key, value in start.items():
        mine = state[key]
        if mine.shape != value.shape or mine.dtype != value.dtype:
            what = f"{tuple(value.shape)} {value.dtype}"
            raise TypeError(f"state {key!r} is {tuple(mine.shape)} {mine.dtype}; init_state made it {what}, and so it must stay")


def advice(net: Net) -> str:
    """What may keep the loss of this network finite."""
    kinds = [type(layer) for layer in net.original.modules()]
    found = ["a lower train.lr"]
    if any(not gate.sigmoid for gate in gates_of(net.original).values()):
        found.append("model.gate_sigmoid = true (without it the gates grow with what they multiply)")
    if not any(issubclass(kind, (*NORMS, NormalisedConv2d)) for kind in kinds):
        found.append("a model with norms (model.norm)")
    return f"{', or '.join(found)} may help"


def finite(losses: Tensor, clients: Sequence[int], place: ErrorContext) -> None:
    """Raises for the first step (S,) or (S, A) whose loss is not a number."""
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        step = bad[0].tolist()
        place.stage, place.clients = f"step {step[0]}", [clients[step[1] if len(step) > 1 else 0]]
        raise FloatingPointError(f"the loss is {losses[tuple(step)].item()}; {advice(place.order.net)}")
