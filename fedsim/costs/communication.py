"""What a client sends over the air: encode, decode, and the length that the ledger charges.

| prefix | bytes |
|---|---|
| w/ opt/ buf/ | 4 · ones of its mask; 4 · size without one |
| grad/ loss/ own/ | 4 · size |
| mask/ | per tensor the cheapest of 4 · changed positions, 4 · ones, ceil(N / 8); nothing for all ones |
| top/ index/ | 4 · size (int32 indices, float32 values) |
| byte/ scale/ | 1 · size (uint8); 4 · size |
| gate/ | ceil(G / 8) a row when hard (bool), 4 · size when soft |
| n/ | 0 for a few numbers (16), which go with the header; 4 · size for more |
| vote/ seed/ | 0: the receiver knows or can compute it |

Names, shapes and the chosen form of a mask are agreed on beforehand (the header), so that the payload holds values only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsim.core import keys, masks
from fedsim.core.keys import FREE, PRICED
from fedsim.core.tree import Tree

FEW = 16  # numbers under n/ that cost nothing: how many images, steps or visits


@dataclass(frozen=True)
class Head:
    """What both ends know of one tensor before it travels."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    form: str  # masked | float32 | int32 | uint8 | bits | changed | ones | full
    size: int  # bytes


def length(tree: Tree, held: Tree | None = None, last: Tree | None = None) -> int:
    """Bytes of `tree` on the air.

    `held` are the masks that both ends know (default: those in the tree), `last` the masks that the receiver holds already.
    """
    return sum(head.size for head in heads(tree, held, last))


def heads(tree: Tree, held: Tree | None = None, last: Tree | None = None) -> list[Head]:
    """The header of every tensor that travels, in the order of the keys."""
    known = {**(held or {}), **tree}
    return [_head(key, value, known, (last or {}).get(key)) for key, value in sorted(tree.items()) if not _is_free(key, value)]


def _is_free(key: str, value: Tensor) -> bool:
    """Whether a tensor costs nothing on the air."""
    many = key.startswith(keys.COUNTS) and value.numel() > FEW and not key.startswith(keys.WORKED_OUT)
    return key.startswith(FREE) and not many


def _head(key: str, value: Tensor, known: Tree, last: Tensor | None) -> Head:
    form, size = _form(key, value, known, last)
    return Head(key, tuple(value.shape), value.dtype, form, size)


def _form(key: str, value: Tensor, known: Tree, last: Tensor | None) -> tuple[str, int]:
    if key.startswith((keys.WEIGHTS, keys.OPTIMISER, keys.BUFFERS)):
        mask = known.get(keys.mask_of(key))
        return ("float32", 4 * value.numel()) if mask is None else ("masked", 4 * masks.count(mask))
    if key.startswith(keys.MASKS):
        return _mask_form(value, last)
    if key.startswith((keys.GATES, keys.COUNTS)) and value.dtype == torch.bool:
        rows = value.numel() // value.shape[-1] if value.numel() else 0
        return "bits", rows * -(-value.shape[-1] // 8)
    if key.startswith(keys.BYTES) and value.dtype == torch.uint8:
        return "uint8", value.numel()
    if key.startswith((*PRICED, keys.COUNTS)):
        return "float32" if value.is_floating_point() else "int32", 4 * value.numel()
    raise ValueError(f"no price for {key!r}; a key begins with one of {', '.join(keys.KNOWN)}")


def _mask_form(mask: Tensor, last: Tensor | None) -> tuple[str, int]:
    """The cheapest form; a receiver without an earlier mask holds all ones."""
    if bool(mask.all()):
        return "full", 0
    changed = masks.count(~mask if last is None else mask ^ last)
    forms = {"changed": 4 * changed, "ones": 4 * masks.count(mask), "bits": -(-mask.numel() // 8)}
    form = min(forms, key=lambda name: forms[name])
    return form, forms[form]


def encode(tree: Tree, held: Tree | None = None, last: Tree | None = None) -> tuple[bytes, list[Head]]:
    """The payload and its header; len(payload) == length(tree, held, last)."""
    known = {**(held or {}), **tree}
    header = heads(tree, held, last)
    return b"".join(_values(head, tree[head.key].cpu(), known, (last or {}).get(head.key)).tobytes() for head in header), header


def _values(head: Head, value: Tensor, known: Tree, last: Tensor | None) -> np.ndarray:
    if head.form == "masked":
        return value[known[keys.mask_of(head.key)]].float().numpy()
    if head.form == "float32":
        return value.float().contiguous().numpy()
    if head.form == "int32":
        return value.to(torch.int32).contiguous().numpy()
    if head.form == "uint8":
        return value.contiguous().numpy()
    if head.form == "bits":
        rows = value.reshape(-1) if head.key.startswith(keys.MASKS) else value.reshape(-1, value.shape[-1])
        return np.packbits(rows.numpy(), axis=-1)
    if head.form == "full":
        return np.zeros(0, np.uint8)
    chosen = value if head.form == "ones" else (~value if last is None else value ^ last)
    return chosen.flatten().nonzero().flatten().to(torch.int32).numpy()


def decode(payload: bytes, header: list[Head], held: Tree | None = None, last: Tree | None = None) -> Tree:
    """The tree that was encoded; keys that cost nothing are not in it. Masks travel first, so that weights can be placed."""
    begins = dict(zip((head.key for head in header), np.cumsum([0] + [head.size for head in header]), strict=False))
    known = dict(held or {})
    tree: Tree = {}
    for head in sorted(header, key=lambda head: not head.key.startswith(keys.MASKS)):
        part = payload[begins[head.key] : begins[head.key] + head.size]
        tree[head.key] = known[head.key] = _tensor(head, part, known, (last or {}).get(head.key))
    return tree


def _tensor(head: Head, part: bytes, known: Tree, last: Tensor | None) -> Tensor:
    if head.form == "masked":
        value = torch.zeros(head.shape, dtype=head.dtype)
        value[known[keys.mask_of(head.key)]] = torch.from_numpy(np.frombuffer(part, np.float32).copy()).to(head.dtype)
        return value
    if head.form in ("float32", "int32", "uint8"):
        return torch.from_numpy(np.frombuffer(part, head.form).copy()).to(head.dtype).view(head.shape)
    count = int(np.prod(head.shape))
    if head.form == "bits":
        width = count if head.key.startswith(keys.MASKS) else head.shape[-1]
        bits = np.unpackbits(np.frombuffer(part, np.uint8).reshape(count // width, -1), axis=-1, count=width)
        return torch.from_numpy(bits.astype(bool)).view(head.shape)
    if head.form == "full":
        return torch.ones(head.shape, dtype=torch.bool)
    listed = torch.zeros(count, dtype=torch.bool)
    listed[torch.from_numpy(np.frombuffer(part, np.int32).astype(np.int64))] = True
    if head.form == "ones":
        return listed.view(head.shape)
    return listed.view(head.shape) ^ (torch.ones(head.shape, dtype=torch.bool) if last is None else last)
