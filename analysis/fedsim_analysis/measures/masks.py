"""Masks as packed bits, all of a round read from the run file at once, and how much two of them share."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import prod
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedsim_analysis import checksums, masks, run_file
from fedsim_analysis.dataset.sources import mask_shapes
from fedsim_analysis.measures.nodes import Lacking, along_runs, node, round_numbers

if TYPE_CHECKING:
    import h5py

    from fedsim_analysis.measures.nodes import Runs

Bits = NDArray[np.uint8]
AT_ONCE = 2**26  # bytes of masks that are held at once
DENSE = "no run has masks: the networks are dense, or were cut without masks"


def sizes(runs: Runs, i: int) -> dict[str, int]:
    """Of each weight of run `i` with a mask of one shape in all rounds, its number of entries; whatever other runs there are."""
    last = int(round_numbers(runs, "masks")[last_rows(runs)[i]])
    found: dict[str, int] = run_file.read(_path(runs, i), partial(_sizes, last=last), time.sleep)
    return found


def _sizes(file: h5py.File, last: int) -> dict[str, int]:
    shapes, changed, _ = mask_shapes(file, last)
    layers = set(checksums.labels(file, "layer"))
    return {name: prod(shape) for name, shape in shapes.items() if name not in changed and name.removesuffix(".weight") in layers}


def has_masks(runs: Runs) -> NDArray[np.bool_]:
    """(runs,) whether the masks of a run remove a weight at its end; Lacking where no run's do."""
    if not len(round_numbers(runs, "masks")):
        raise Lacking(DENSE)
    wanted = [sizes(runs, i) for i in range(len(last_rows(runs)))]
    kept = [int(np.bitwise_count(last_of(runs, i, each)).sum()) if each else 0 for i, each in enumerate(wanted)]
    has = np.array([count < sum(each.values()) for count, each in zip(kept, wanted, strict=True)])
    if not has.any():
        raise Lacking(DENSE)
    return has


def last_rows(runs: Runs) -> list[int]:
    """Of each run, where its last complete round stands."""
    found, numbers = node(runs, "masks"), round_numbers(runs, "masks")
    done = along_runs(runs, "masks", "rounds_done") or [numbers[-1]] * found.sizes["run"]
    return [max(int(np.searchsorted(numbers, last, side="right")) - 1, 0) for last in done]


def changed_rounds(runs: Runs, i: int) -> list[int]:
    """Where the first round of run `i` stands, and those after which it had other masks than before."""
    numbers, last = round_numbers(runs, "masks"), last_rows(runs)[i]
    stored = run_file.read(_path(runs, i), masks.stored_rounds, time.sleep)
    places = np.searchsorted(numbers, [r for r in stored if r > numbers[0]])
    return [0, *sorted({int(place) for place in places if 0 < place <= last})]


def of_rounds(runs: Runs, i: int, rounds: Sequence[int]) -> Iterator[Bits]:
    """The bits of all masks of run `i` after each of the rounds, one after the other, as the file of the run has them."""
    numbers, wanted = round_numbers(runs, "masks"), sizes(runs, i)
    step = max(1, 8 * AT_ONCE // max(1, sum(wanted.values())))
    for begin in range(0, len(rounds), step):
        part = [int(numbers[r]) for r in rounds[begin : begin + step]]
        yield from run_file.read(_path(runs, i), partial(_of_numbers, numbers=part, wanted=wanted), time.sleep)


def last_of(runs: Runs, i: int, wanted: Mapping[str, int]) -> Bits:
    """The bits of the masks of these weights after the last round of run `i`."""
    last = int(round_numbers(runs, "masks")[last_rows(runs)[i]])
    (found,) = run_file.read(_path(runs, i), partial(_of_numbers, numbers=[last], wanted=wanted), time.sleep)
    return found


def layers_of(runs: Runs, i: int) -> list[str]:
    """The names of the layers of run `i`."""
    return [str(name) for name in run_file.read(_path(runs, i), partial(checksums.labels, path="layer"), time.sleep)]


def _path(runs: Runs, i: int) -> str:
    paths = along_runs(runs, "masks", "path")
    if paths is None:
        raise Lacking("the runs do not say from which files they are")
    return str(paths[i])


def _of_numbers(file: h5py.File, numbers: Sequence[int], wanted: Mapping[str, int]) -> list[Bits]:
    known = checksums.columns(file)
    return [_bits(file, r, wanted, known) for r in numbers]


def _bits(file: h5py.File, r: int, wanted: Mapping[str, int], known: Sequence[str]) -> Bits:
    """All ones for a weight that has no mask in this run."""
    layout, packed = masks.in_force(file, r, known)
    found, begin = dict[str, Bits](), 0
    for key, shape in masks.shapes(layout).items():
        end = begin + -(-prod(shape) // 8)
        found[key.removeprefix(masks.PREFIX)], begin = np.frombuffer(packed[begin:end], np.uint8), end
    return np.concatenate([found[name] if name in found else np.packbits(np.ones(size, bool)) for name, size in wanted.items()])


def shared(one: Bits, other: Bits) -> float:
    """Jaccard index: weights that both masks keep over weights that either keeps; NaN where neither keeps one."""
    either = int(np.bitwise_count(one | other).sum())
    return int(np.bitwise_count(one & other).sum()) / either if either else float("nan")
