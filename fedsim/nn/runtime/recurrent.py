"""Recurrent layers as run-time layers: torch's own, on the parameters of the call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Recurrent(nn.RNNBase):
    """torch keeps a list of the parameters beside them, which a call of `Net` does not fill."""

    context: Any
    key: str

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [self._parameters.get(name) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, held: list[Tensor | None]) -> None:
        pass


class RNN(Recurrent, nn.RNN):
    pass


class LSTM(Recurrent, nn.LSTM):
    pass


class GRU(Recurrent, nn.GRU):
    pass
