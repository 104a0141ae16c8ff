"""Calls a function of stacked clients (K, …) from code that is written for one client.

Without `vmap` the function gets a stack of one client; under `vmap` it gets the whole stack. So kernels that torch cannot trace, and
programs for a whole pack, can be used inside of that code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]  # of tensors (K, …) or None, to tensors (K, …)


def by_rows(function: Function, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """The result of `function` for one client; its tensors come without the leading K."""
    if torch._C._are_functorch_transforms_active():  # torch binds the signature of such a function anew at every call
        found: tuple[Tensor, ...] = _Rows.apply(function, *tensors)
        return found
    with torch.no_grad():
        return _Rows.forward(function, *tensors)


def applied(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """`function.apply` of an autograd function with a `setup_context`, without the cost of what only transforms need."""
    return (function if torch._C._are_functorch_transforms_active() else _plain(function)).apply(*inputs)


@cache
def _plain(function: Any) -> Any:
    def forward(ctx: Any, *inputs: Any) -> Any:
        output = function.forward(*inputs)
        function.setup_context(ctx, inputs, output)
        return output

    return type(function.__name__, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": function.backward})


class _Rows(torch.autograd.Function):
    """Leaves `vmap`: the rule below gets the stacked tensors themselves."""

    @staticmethod
    def forward(function: Function, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(value.squeeze(0) for value in function(*(None if value is None else value.unsqueeze(0) for value in tensors)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps nothing: the result is not differentiated."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError("packed kernels have no second derivative; use net.hessian_vector(...), which differentiates twice")

    @staticmethod
    def vmap(info: Any, dims: Any, function: Function, *tensors: Tensor | None) -> tuple[Any, Any]:
        found = function(*(_in_front(value, dim, info.batch_size) for value, dim in zip(tensors, dims[1:], strict=True)))
        return found, (0,) * len(found)


def _in_front(value: Tensor | None, dim: int | None, clients: int) -> Tensor | None:
    """The tensor as (K, …), also if all clients share it."""
    if value is None:
        return None
    return value.expand(clients, *value.shape) if dim is None else value.movedim(dim, 0)
