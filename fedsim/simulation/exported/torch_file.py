"""A network as a pickled torch module, which holds its graph too."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor, nn

from fedsim.errors import BadInput
from fedsim.simulation.exported.form import Facts, Form, Network


def _content(module: nn.Module, images: Tensor, facts: Facts) -> bytes:
    content = io.BytesIO()
    torch.save(module, content)  # to the memory: torch's own writer gives no reason where a disk is full
    return content.getvalue()


def _read(path: Path, content: bytes, module: nn.Module) -> Network:
    """The module in the file. It is a pickle, so it is read only if it is what was written, byte for byte."""
    there = path.read_bytes()
    if there != content:
        raise BadInput("the file on the disk is not what was written")
    read: nn.Module = torch.load(io.BytesIO(there), weights_only=False)
    return read


def _how(out: Path, module: nn.Module, why: str) -> str:
    load = f'torch.load("{out}", weights_only=False)'
    if not why:
        return f"{load}, without fedsim"
    kind = type(module)
    return f"{load} where {kind.__module__}.{kind.__qualname__} can be imported, since {why}"


FORM = Form(".pt", _content, _read, _how)
