"""What a caller of `fedsim.run` sees of a round that has just been finished."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class FinishedRound:
    """One finished round, given to the callback on rank 0 before the next round begins.

    round: its number; round 0 precedes training. rounds: how many the job has.
    columns: its row of /rounds in the run file, name -> number; what was not measured in this round is not in it.
    The row is written beside the training that follows: who opens the run file now may find the row before as the last.
    """

    round: int
    rounds: int
    columns: Mapping[str, float]
    _make_model: Callable[[], nn.Module] = field(repr=False)
    _stops: list[bool] = field(default_factory=list, repr=False)

    def model(self) -> nn.Module:
        """The server's model after this round as a torch module of its own, in evaluation mode; pruned weights are exactly 0."""
        return self._make_model()

    def stop(self) -> None:
        """Ends the run after this round, on all ranks; `fedsim.run` returns as usual. The run file holds all rounds so far, and the same
        call of `fedsim.run` continues the run. After the last round it has no effect."""
        self._stops.append(True)

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return bool(self._stops)


Callback = Callable[[FinishedRound], Any]
