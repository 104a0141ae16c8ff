"""Masks: which weights are kept. A mask is bool, stands beside its weight under "mask/", and is counted, never inferred from zeros."""

from __future__ import annotations

import torch

from fedsim.tree import Tree


def key_of(key: str) -> str:
    """The mask of a tensor: "w/conv.weight", "opt/momentum/conv.weight" and "grad/conv.weight" all have "mask/conv.weight"."""
    prefix, _, name = key.partition("/")
    return "mask/" + (name.partition("/")[2] if prefix == "opt" else name)


def apply(tree: Tree, masks: Tree) -> Tree:
    """The tree with every masked weight multiplied by its mask, so that pruned weights are exactly 0."""
    return {key: value * masks[key_of(key)] if key_of(key) in masks else value for key, value in tree.items()}


def ones(masks: Tree) -> dict[str, int]:
    """Kept weights by the weight's name: {"conv.weight": 12}."""
    return {key.removeprefix("mask/"): int(mask.sum()) for key, mask in masks.items() if key.startswith("mask/")}


def check(tree: Tree) -> None:
    """Raises ValueError for a mask that is not bool or not of its weight's shape."""
    for key, mask in tree.items():
        if not key.startswith("mask/"):
            continue
        name = key.removeprefix("mask/")
        if mask.dtype != torch.bool:
            raise ValueError(f"mask {name!r} is {mask.dtype}; a mask is bool")
        weight = tree.get("w/" + name)
        if weight is not None and weight.shape != mask.shape:
            raise ValueError(f"mask {name!r} is {tuple(mask.shape)}, its weight is {tuple(weight.shape)}")
