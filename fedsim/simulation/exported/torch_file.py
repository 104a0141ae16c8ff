"""A network as a pickled torch module, which holds its graph too."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor, nn

from fedsim.simulation.exported.form import Facts, Form, Network


def _content(module: nn.Module, images: Tensor, facts: Facts) -> bytes:
    content = io.BytesIO()
    torch.save(module, content)  # to the memory: torch's own writer gives no reason where a disk is full
    return content.getvalue()


def _read(path: Path, module: nn.Module) -> Network:
    read: nn.Module = torch.load(path, weights_only=False)
    return read


def _how(out: Path, module: nn.Module, why: str) -> str:
    load = f'torch.load("{out}", weights_only=False)'
    if not why:
        return f"{load}, without fedsim"
    kind = type(module)
    return f"{load} where {kind.__module__}.{kind.__qualname__} can be imported, since {why}"


FORM = Form(".pt", _content, _read, _how)
