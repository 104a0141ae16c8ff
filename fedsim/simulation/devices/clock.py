"""The virtual clock of a run: on its fleet, through repeated rounds, in its rows and in its checkpoints."""

from __future__ import annotations

from typing import Any

from fedsim.errors import BadInput, NobodyThere, TooFewAnswers
from fedsim.federated import verbs
from fedsim.federated.protocol import Method, Setting
from fedsim.fleet.local_fleet import LocalFleet
from fedsim.fleet.timed.buffered import BufferedEmulation
from fedsim.fleet.timed.emulation import DeviceEmulation
from fedsim.fleet.timed.rules import Rules
from fedsim.fleet.timed.state import ClockState
from fedsim.simulation.round_record import RoundRow

REPEATS = 1_000  # cohorts of one round, one after the other, before a run gives up
WAITS = 1_000  # times that nobody was there, up to an hour each


def add_clock(fleet: LocalFleet, rules: Rules | None) -> LocalFleet:
    """The fleet of a run, which emulates devices from now on, if there are some."""
    if rules is not None:
        fleet.emulation = (BufferedEmulation if rules.mode == "buffered" else DeviceEmulation)(rules)
        fleet.account.prices.timed = True
    return fleet


def played(method: Method[Any], setting: Setting, state: Any, fleet: LocalFleet, r: int) -> tuple[Any, dict[str, float]]:
    """`verbs.round`; where clients have devices and too few of them answer, once more with others. BadInput where none ever do."""
    emulation = fleet.emulation
    if not isinstance(emulation, DeviceEmulation):
        return verbs.round(method, setting, state, fleet, r)
    repeats = waits = 0
    while True:
        with fleet.undoing() as undo:
            try:
                with emulation.playing(r, repeats + waits):
                    return verbs.round(method, setting, state, fleet, r)
            except TooFewAnswers as error:
                undo()
                away = isinstance(error, NobodyThere)
                waits, repeats, why = waits + away, repeats + (not away), str(error)
        if repeats >= REPEATS:
            raise BadInput(
                f"round {r} was tried with {REPEATS:,} cohorts, and too few clients answered in each ({why});"
                " raise cohort.deadline or lower cohort.least, or give devices more memory"
            )
        if waits >= WAITS:
            raise BadInput(
                f"round {r} has waited {WAITS:,} times ({why}); give devices more memory, or more time at which they can be asked"
            )


def record(row: RoundRow, fleet: LocalFleet) -> None:
    """Adds what the clock says of a round to its row."""
    if isinstance(fleet.emulation, DeviceEmulation):
        row.values.update(fleet.emulation.log.values(fleet.emulation.state.seconds))
        row.clients.update(fleet.emulation.log.columns())


def kept(fleet: LocalFleet) -> tuple[ClockState, ...]:
    """What a checkpoint holds of the clock; nothing where there is none."""
    return (fleet.emulation.state.copy(),) if isinstance(fleet.emulation, DeviceEmulation) else ()


def resume(fleet: LocalFleet, held: list[Any]) -> None:
    """The clock goes on as a checkpoint holds it."""
    if isinstance(fleet.emulation, DeviceEmulation) and held:
        assert isinstance(held[0], ClockState)
        fleet.emulation.state = held[0]
