"""`python -m campaign`: tries faults and prints what came of them; exit code 1 when something was lost or hung."""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: a process with threads cannot be forked

from campaign import legs
from campaign.kinds import KINDS
from campaign.lab import Lab, short
from campaign.outcomes import Outcome, Skipped, as_json, table

MEMORY = Path("/dev/shm")  # a disk in memory, where there is one: a campaign waits for the disk some thousand times


def cases(kinds: Sequence[str]) -> Iterator[tuple[str, int]]:
    """(kind, number of the case) of a whole campaign, the kinds in turn."""
    for number in range(max(KINDS[kind].cases for kind in kinds)):
        yield from ((kind, number) for kind in kinds if number < KINDS[kind].cases)


def tried(lab: Lab, kind: str, number: int, seed: int) -> list[Outcome]:
    """What came of one case; an error of the campaign itself counts as something lost."""
    try:
        return KINDS[kind].try_(lab, number, random.Random(f"{seed}/{kind}/{number}"))
    except Exception as error:
        traceback.print_exc()
        return [Outcome(kind, f"case {number}", lost=f"the campaign failed: {type(error).__name__}: {short(str(error))}")]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code. Ctrl-C and SIGTERM end it with the table so far."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    asked = _asked(arguments)
    kinds = [kind for kind in asked.kinds if not KINDS[kind].missing()]
    skipped = [Skipped(kind, KINDS[kind].missing()) for kind in asked.kinds if kind not in kinds]
    folder = Path(tempfile.mkdtemp(prefix="faults-", dir=MEMORY if os.access(MEMORY, os.W_OK) else None))
    folder.chmod(0o755)  # for a run of another user
    lab, outcomes, began = Lab(folder), list[Outcome](), time.monotonic()
    try:
        for kind, number in islice(cases(kinds) if kinds else (), asked.count):
            outcomes += (found := tried(lab, kind, number, asked.seed))
            if not asked.quiet:
                print(f"{time.monotonic() - began:5.0f} s  {kind} {number}: {len(found)} tried", *_lost(found), flush=True)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    finally:
        legs.end_all()
        lab.close()
    about = {"seed": asked.seed, "seconds": time.monotonic() - began, "asked": list(asked.kinds), "count": asked.count}
    _show(outcomes, skipped, about, asked.json)
    return int(not all(outcome.good for outcome in outcomes))


def _show(outcomes: list[Outcome], skipped: list[Skipped], about: dict[str, object], to: Path | None) -> None:
    print(table(outcomes, skipped))
    print(f"{about['seconds']:.0f} s; --seed {about['seed']} tries the same again, as far as instants allow")
    if to:
        to.write_text(as_json(outcomes, skipped, about))


def _lost(found: Sequence[Outcome]) -> list[str]:
    return [f"LOST: {outcome.what}: {outcome.lost or 'it hangs'}" for outcome in found if not outcome.good]


def _asked(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn; instants depend on the machine too")
    parser.add_argument("--kinds", type=_kinds, default=list(KINDS), help=f"separated by commas, of {', '.join(KINDS)}")
    parser.add_argument("--count", type=int, help="cases in all, of the kinds in turn; without it the whole campaign")
    parser.add_argument("--json", type=Path, help="a file for all outcomes")
    parser.add_argument("--quiet", action="store_true", help="print the table alone")
    return parser.parse_args(arguments)


def _kinds(text: str) -> list[str]:
    asked = [name for name in text.split(",") if name]
    if wrong := [name for name in asked if name not in KINDS]:
        raise argparse.ArgumentTypeError(f"there is no kind {wrong[0]!r}; there are {', '.join(KINDS)}")
    return asked


if __name__ == "__main__":
    sys.exit(main())
