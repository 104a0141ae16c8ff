"""Stories of kills: a run on three ranks is killed, goes on elsewhere, is killed again, and in the end is the run that was never killed."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from campaign import instants
from campaign.instants import AIMS, TooLate
from campaign.jobs import JOBS, Small
from campaign.lab import NONE, Lab, Lost, done, same, sound
from campaign.legs import Leg, alone, on_ranks
from campaign.outcomes import LIMIT, Outcome

TARGETS = ("rank 0", "rank 1", "rank 2", "mpirun", "all at once")
WRITERS = ("rank 0", "all at once", "mpirun")  # whom a kill hits during a write
KILLS = 4  # of three ranks, in a story
LAST = (0, 0, 2, 0, 0, 5)  # ranks that end the stories in turn; 0: without mpirun


@dataclass(frozen=True)
class Kill:
    """Who is killed, and when: before which row at the latest, and while the run does what."""

    target: str
    aim: str
    before: int


@dataclass
class Story:
    """One run, the kills that it has lived through, and the fields of its job that are set on the command line."""

    run: Path
    job: Small
    reference: Path
    draw: random.Random
    more: tuple[str, ...] = ()
    lag: int = 1  # rounds that a kill may cost
    last: int = 0  # ranks of the last leg; 0: without mpirun
    found: list[Outcome] = field(default_factory=list)

    def on_ranks(self, ranks: int) -> Leg:
        """The next leg; 0: without mpirun."""
        return on_ranks(self.run, self.job.name, ranks, *self.more) if ranks else alone(self.run, self.job.name, *self.more)

    def killed(self, leg: Leg, kill: Kill) -> bool:
        """Whether the kill came before the run had ended; its outcome, but for how the run ends, is added to those found."""
        try:
            seen = instants.wait(kill.aim, leg, self.job, self.reference, self.draw, kill.before)
            victims = victims_of(leg, kill.target)
            instant = leg.kill(victims)
        except TooLate:
            done(leg.ended())
            return False
        who = kill.target if leg.ranks else "all of one process"
        what = f"{self.job.name}, in the {kill.aim} after row {seen if seen > NONE else 'none'}, {leg.ranks or 'no'} ranks"
        return self.ended(leg, Outcome(f"kill {who}", what), instant, seen)

    def ended(self, leg: Leg, outcome: Outcome, instant: float, seen: int) -> bool:
        """Whether the fault ended the leg before the run was done; adds what came of it."""
        ended = leg.ended()
        seconds = time.monotonic() - instant
        if ended is not None and ended.code == 0:
            return False
        self.found.append(replace(outcome, seconds=seconds, hung=ended is None or seconds > LIMIT))
        self.found[-1] = replace(self.found[-1], rounds=sound(self.run, self.reference, seen, self.lag))
        return True

    def finish(self) -> None:
        """The last leg, on another number of ranks."""
        done(self.on_ranks(self.last).ended())
        same(self.run, self.reference)

    def outcomes(self, error: Lost | None = None) -> list[Outcome]:
        """All of them, now that it is known how the run ended."""
        if error is None:
            return [replace(outcome, same=True) for outcome in self.found]
        last = self.found[-1] if self.found else Outcome("undisturbed", self.job.name)
        return [*(replace(outcome, same=True) for outcome in self.found[:-1]), replace(last, lost=str(error))]


def told(lab: Lab, number: int, draw: random.Random, name: str, *more: str, lag: int = 1) -> list[Outcome]:
    """One run that is killed several times; an outcome for each kill."""
    job = list(JOBS.values())[number % len(JOBS)]
    with lab.story(f"{name}-{number}") as folder:
        story = Story(folder / f"{job.name}.h5", job, lab.reference(job.name), draw, more, lag, LAST[number % len(LAST)])
        try:
            for kill in kills_of(number, draw, job):
                if not story.killed(story.on_ranks(3), kill):
                    break
                between = Kill("all at once", draw.choice(("training", "write", "end")), kill.before)
                if draw.random() < 0.4 and not story.killed(story.on_ranks(0), between):
                    break
            story.finish()
        except Lost as error:
            lab.keep(folder)
            return story.outcomes(error)
    return story.outcomes()


def ranks(lab: Lab, number: int, draw: random.Random) -> list[Outcome]:
    """Kills of one rank, of mpirun and of all."""
    return told(lab, number, draw, "kills")


def kills_of(number: int, draw: random.Random, job: Small) -> list[Kill]:
    """Of story `number`: all targets get their turn, and each kill has a part of the rounds."""
    found = []
    for place in range(KILLS):
        aims = AIMS if place == KILLS - 1 else {name: odds for name, odds in AIMS.items() if name != "end"}
        aim = draw.choices(list(aims), list(aims.values()))[0]
        turn = TARGETS if aim != "write" else WRITERS
        found.append(Kill(turn[(KILLS * number + place) % len(turn)], aim, job.rounds * (place + 1) // KILLS))
    return found


def victims_of(leg: Leg, target: str) -> list[int]:
    """The processes to kill; mpirun where the rank has not begun yet."""
    if target == "all at once" or not leg.ranks:
        return leg.members()
    number = leg.rank(int(target[-1])) if target != "mpirun" else None
    return [leg.session if number is None else number]
