"""What a forward changes in its own module: buffers that clients can average, or values that they would share."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.nn import slots
from fedsim.nn.checks.refusals import called

COLLECTIONS = (list, dict, set, deque)
KEPT = (Tensor, bool, int, float, *COLLECTIONS)
OF_TORCH = frozenset(vars(nn.Module()))
FIX = 'store it by self.register_buffer("{slot}", {value}), and each client has its own, which are averaged'
Kept = dict[tuple[str, str], Any]  # layer, attribute -> value


def fault(module: nn.Module, x: Tensor) -> str:
    """What forward changes and clients cannot have each for themselves; empty where there is nothing of the kind."""
    twin = copy.deepcopy(module)
    before = copy.deepcopy(_kept(twin))
    with torch.no_grad():
        for train in (True, False):
            twin.train(train)(x.clone())
    return next(_of_buffers(module, twin), "") or next(_of_attributes(before, twin), "") or _of_new(before, module, twin, x)


def _of_buffers(module: nn.Module, twin: nn.Module) -> Iterator[str]:
    averaged, after = slots.averaged(module), dict(twin.named_buffers())
    for name, value in module.named_buffers():
        now = after.get(name)
        if name in averaged:
            if difference := slots.unlike(now, value):
                yield f"the buffer {name} {difference}"
        elif not name.endswith("num_batches_tracked") and (now is None or not _same(value, now)):
            yield f"forward changes the buffer {name}, which {_constant(value)}"


def _constant(value: Tensor) -> str:
    if value.is_floating_point():
        return "is not finite before any training; clients average the buffers that forward changes, so it should begin with numbers"
    kind = str(value.dtype).removeprefix("torch.")
    return f"holds {value.numel()} values of {kind}; clients average buffers of floats and single whole numbers: make it a float32 buffer"


def _kept(module: nn.Module) -> Kept:
    """Tensors, numbers and collections that layers hold outside of parameters and buffers."""
    return {
        (name, slot): value
        for name, layer in module.named_modules()
        for slot, value in vars(layer).items()
        if slot not in OF_TORCH and isinstance(value, KEPT)
    }


def _of_attributes(before: Kept, twin: nn.Module) -> Iterator[str]:
    after = _kept(twin)
    for (name, slot), value in before.items():
        if (name, slot) not in after or not _same(value, after[name, slot]):
            yield _changed_attribute(twin, name, slot, value)


def _changed_attribute(twin: nn.Module, name: str, slot: str, value: Any) -> str:
    what = f"forward changes self.{slot} of {called(name, twin.get_submodule(name))}, which all clients would share"
    if isinstance(value, COLLECTIONS):
        return f"{what}; store each of its numbers by self.register_buffer, and each client has its own, which are averaged"
    first = f"torch.tensor({value!r})" if not isinstance(value, Tensor) else "its first value"
    return f"{what}; {FIX.format(slot=slot, value=first)}"


def _of_new(before: Kept, module: nn.Module, twin: nn.Module, x: Tensor) -> str:
    """Attributes and entries of collections that forward has made, where it gives something else for other images without them."""
    new = {place: value for place, value in _kept(twin).items() if _entries(value) != _entries(before.get(place, []))}
    again = copy.deepcopy(twin)
    for name, slot in new:
        layer, first = again.get_submodule(name), vars(module.get_submodule(name))
        setattr(layer, slot, copy.deepcopy(first[slot])) if slot in first else delattr(layer, slot)
    with torch.no_grad():
        for train in (False, True) if new else ():
            try:
                mine, theirs = (each.train(train)(0.5 * x.flip(-1)) for each in (twin, again))
            except Exception:
                return ""
            if not _same(mine, theirs):
                place, value = next(iter(new.items()))
                return _changed_attribute(twin, *place, value if isinstance(value, COLLECTIONS) else torch.zeros(()))
    return ""


def _entries(value: Any) -> int:
    """How many values there are in a collection, those inside of inner ones counted; 1 for any other value."""
    return sum(map(_entries, value.values() if isinstance(value, dict) else value)) if isinstance(value, COLLECTIONS) else 1


def _same(one: Any, other: Any) -> bool:
    """Whether a value is as it was before; a collection may have more entries, after those that it had."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.shape == other.shape and one.dtype == other.dtype
        return same and bool(((one == other) | ((one != one) & (other != other))).all())
    if type(one) is not type(other):
        return False
    if isinstance(one, COLLECTIONS):
        inside = (each.values() if isinstance(each, dict) else () if isinstance(each, set) else each for each in (one, other))
        return len(one) <= len(other) and all(map(_same, *inside))
    return not isinstance(one, bool | int | float) or one == other or one != one
