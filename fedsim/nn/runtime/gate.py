"""Static and dynamic gates of channels as run-time layers."""

from __future__ import annotations

from torch import Tensor, nn

from fedsim.core import rng
from fedsim.nn.layers import input_gate
from fedsim.nn.runtime.call_context import CallContext


class Gate(nn.Module):
    """A static gate: multiplies the channels of a group by the gate of the call, if there is one."""

    def __init__(self, group: str, context: CallContext) -> None:
        super().__init__()
        self.group, self.context = group, context

    def forward(self, x: Tensor) -> Tensor:
        context = self.context
        if context.energy is not None:
            real = 1.0 if context.real is None else context.real.to(x.dtype).view([-1] + [1] * (x.dim() - 1))
            found = (x.abs() ** context.power * real).sum([axis for axis in range(x.dim()) if axis != 1])
            context.energy[self.group] = context.energy[self.group] + found if self.group in context.energy else found
        gate = context.gates.get(self.group)
        return x if gate is None else x * gate.to(x.dtype).view([1, -1] + [1] * (x.dim() - 2))


class RuntimeInputGate(input_gate.InputGate):
    """Replaces a dynamic gate. Under a hard static gate of its channels it selects none by itself.

    If the tree has GATE_VALUES (n,), its values are these numbers for every image.
    """

    def __init__(self, gate: input_gate.InputGate, name: str, context: CallContext) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias, self.group = gate.weight, gate.bias, name.removeprefix(f"{input_gate.GATES_MODULE}.")
        self.keep, self.sigmoid, self.l1, self.random = gate.keep, gate.sigmoid, gate.l1, gate.random
        self.context = context

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        context = self.context
        g = self._values(x, context)  # (B, C) or (C,)
        if context.saliency is not None:
            context.saliency[self.group] = g
        if context.train and self.l1:
            context.penalties.append(self.l1 * _mean(g.sum(-1), context.real))
        return y * g[..., None, None]

    def _values(self, x: Tensor, context: CallContext) -> Tensor:
        hard, constant = context.gates.get(self.group), context.gate_values.get(self.group)
        g = self.saliency(x) if constant is None else constant
        if hard is not None or constant is not None:
            return g if hard is None else g * hard
        return self.selected(g, rng.fold(context.image_keys(), self.group) if self.random else None)


def _mean(values: Tensor, real: Tensor | None) -> Tensor:
    """Mean of values (B,) over the real images."""
    return values.mean() if real is None else (values * real).sum() / real.sum()
