"""Gates of channels as the network runs them."""

from __future__ import annotations

from torch import Tensor, nn

from fedsim.core import rng
from fedsim.nn.layers import input_gate
from fedsim.nn.runtime.call_context import CallContext


class Gate(nn.Module):
    """Multiplies a group's channels by its gate, where there is one."""

    def __init__(self, group: str, call: CallContext) -> None:
        super().__init__()
        self.group, self.call = group, [call]

    def forward(self, x: Tensor) -> Tensor:
        call = self.call[0]
        if call.energy is not None:
            real = 1.0 if call.real is None else call.real.to(x.dtype).view([-1] + [1] * (x.dim() - 1))
            found = (x.abs() ** call.power * real).sum([axis for axis in range(x.dim()) if axis != 1])
            call.energy[self.group] = call.energy[self.group] + found if self.group in call.energy else found
        gate = call.gates.get(self.group)
        return x if gate is None else x * gate.to(x.dtype).view([1, -1] + [1] * (x.dim() - 2))


class RuntimeInputGate(input_gate.InputGate):
    """Stands where a gate by the image stood. Under a hard gate of its channels it selects none of them by itself.

    Where the tree has VALUES (n,), it is those numbers, whatever the image.
    """

    def __init__(self, gate: input_gate.InputGate, name: str, call: CallContext) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias, self.group = gate.weight, gate.bias, name.removeprefix(f"{input_gate.GATES_MODULE}.")
        self.keep, self.sigmoid, self.l1, self.random = gate.keep, gate.sigmoid, gate.l1, gate.random
        self.call = [call]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        call = self.call[0]
        g = self._values(x, call)  # (B, C) or (C,)
        if call.saliency is not None:
            call.saliency[self.group] = g
        if call.train and self.l1:
            call.penalties.append(self.l1 * _mean(g.sum(-1), call.real))
        return y * g[..., None, None]

    def _values(self, x: Tensor, call: CallContext) -> Tensor:
        hard, constant = call.gates.get(self.group), call.values.get(self.group)
        g = self.saliency(x) if constant is None else constant
        if hard is not None or constant is not None:
            return g if hard is None else g * hard
        return self.selected(g, rng.fold(call.image_keys(), self.group) if self.random else None)


def _mean(values: Tensor, real: Tensor | None) -> Tensor:
    """Of (B,), over the real images."""
    return values.mean() if real is None else (values * real).sum() / real.sum()
