"""Masks of the node `masks` as packed bits, read a few rounds at a time, and how much two of them share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedsim_analysis.measures.nodes import Lacking, along_runs, column, is_tree, node, round_numbers

if TYPE_CHECKING:
    import xarray

    from fedsim_analysis.measures.nodes import Runs

Bits = NDArray[np.uint8]
AT_ONCE = 2**26  # bytes of masks, one for each weight, that are held at once


def masks_of(runs: Runs) -> xarray.Dataset:
    """The node `masks`; Lacking where it is empty."""
    found = node(runs, "masks")
    if not found.data_vars or any({"run", "round"} - set(held.dims) for held in found.data_vars.values()):
        raise Lacking("no run has masks: the networks are dense, or were cut without masks")
    return found


def sizes(runs: Runs) -> dict[str, int]:
    """Of each weight with a mask, its number of entries."""
    found = masks_of(runs)
    return {str(name): prod(held.shape[axis] for axis in _own_axes(held)) for name, held in found.data_vars.items()}


def _own_axes(held: xarray.DataArray) -> list[int]:
    return [axis for axis, name in enumerate(held.dims) if name not in ("run", "round")]


def has_masks(runs: Runs) -> NDArray[np.bool_]:
    """(runs,) whether the masks of a run remove a weight at its end; Lacking where no run's do."""
    found = masks_of(runs)
    last = last_rows(runs)
    has = np.array([any(not held.isel(run=i, round=last[i]).values.all() for held in found.data_vars.values()) for i in range(len(last))])
    if not has.any():
        raise Lacking("no run has masks: the networks are dense, or were cut without masks")
    return has


def last_rows(runs: Runs) -> list[int]:
    """Of each run, where its last complete round stands."""
    found, numbers = masks_of(runs), round_numbers(runs, "masks")
    done = along_runs(runs, "masks", "rounds_done") or [numbers[-1]] * found.sizes["run"]
    return [max(int(np.searchsorted(numbers, last, side="right")) - 1, 0) for last in done]


def changed_rounds(runs: Runs, i: int) -> list[int]:
    """Round 0 and the rounds after which run `i` may have had other masks than before: of a Dataset of masks alone, every round."""
    last = last_rows(runs)[i]
    if not is_tree(runs):
        return list(range(last + 1))
    one = node(runs, "layers").isel(run=[i])
    moved = (np.nan_to_num(column(one, "layers", "grown")) + np.nan_to_num(column(one, "layers", "pruned"))).sum(axis=(0, 2))
    return [0, *(int(r) for r in np.flatnonzero(moved[: last + 1]) if r > 0)]


def of_rounds(runs: Runs, i: int, rounds: Sequence[int], names: Sequence[str] | None = None) -> Iterator[Bits]:
    """The bits of all masks of run `i` after each of the rounds, one after the other; `names`: of these weights alone."""
    found = masks_of(runs)
    chosen = [str(name) for name in found.data_vars] if names is None else list(names)
    step = max(1, AT_ONCE // max(1, sum(sizes(runs)[name] for name in chosen)))
    for begin in range(0, len(rounds), step):
        part = list(rounds[begin : begin + step])
        held = [np.asarray(found[name].isel(run=i, round=part).values, bool).reshape(len(part), -1) for name in chosen]
        yield from np.concatenate([np.packbits(values, axis=1) for values in held], axis=1)


def shared(one: Bits, other: Bits) -> float:
    """Jaccard index: weights that both masks keep over weights that either keeps; NaN where neither keeps one."""
    either = int(np.bitwise_count(one | other).sum())
    return int(np.bitwise_count(one & other).sum()) / either if either else float("nan")
