"""Which layer of a module fails, and which one is the first to answer otherwise than another module's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Trail:
    """The calls of a module's layers, the inner ones first."""

    inside: list[str] = field(default_factory=list)  # the layers whose calls have not ended
    answers: list[tuple[str, Tensor]] = field(default_factory=list)

    def fork(self, other: Trail, unlike: Any) -> str:
        """The first layer whose answers differ by `unlike(a, b)`; empty where all are alike, or the layers are called in another order."""
        for (name, mine), (theirs, value) in zip(self.answers, other.answers, strict=False):
            if name != theirs:
                return ""
            if unlike(mine, value):
                return name
        return ""


@contextmanager
def following(module: nn.Module) -> Iterator[Trail]:
    """Notes the calls of the module's layers while the block runs."""
    trail = Trail()

    def begin(name: str, *_: Any) -> None:
        trail.inside.append(name)

    def end(name: str, layer: nn.Module, inputs: Any, answer: Any) -> None:
        trail.inside.pop()
        first = answer[0] if isinstance(answer, tuple | list) and answer else answer
        if isinstance(first, Tensor):
            with torch.no_grad():
                trail.answers.append((name, first.detach().clone()))

    hooks = []
    for name, layer in module.named_modules():
        hooks += [layer.register_forward_pre_hook(partial(begin, name)), layer.register_forward_hook(partial(end, name))]
    try:
        yield trail
    finally:
        for hook in hooks:
            hook.remove()
