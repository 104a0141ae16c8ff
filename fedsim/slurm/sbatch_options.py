"""`--sbatch "…"`: any options of sbatch that fedsim has no word for, one `#SBATCH` line each."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

OURS = {  # options of sbatch that fedsim writes itself, and the option of fedsim that says the same
    "account": "--account",
    "array": "--array",
    "chdir": "",
    "clusters": "",
    "cpus-per-task": "--threads",
    "help": "",
    "job-name": "",
    "mem": "--memory",
    "no-requeue": "--restarts 0",
    "nodes": "--nodes",
    "ntasks": "--ranks",
    "open-mode": "",
    "output": "",
    "parsable": "",
    "partition": "--partition",
    "qos": "--qos",
    "requeue": "",
    "signal": "",
    "test-only": "--dry-run",
    "time": "--time",
    "usage": "",
    "version": "",
    "wait": "--status",
    "wrap": "",
}
OF_GPUS = dict.fromkeys(("gpus", "gpus-per-node", "gpus-per-task", "gres"), "--gpus")
SHORT = {"A": "account", "a": "array", "c": "cpus-per-task", "D": "chdir", "G": "gpus", "h": "help", "J": "job-name", "M": "clusters",
         "N": "nodes", "n": "ntasks", "o": "output", "p": "partition", "q": "qos", "t": "time", "V": "version", "W": "wait"}  # fmt: skip


def options(text: str) -> list[tuple[str, str]]:
    """The options in a text, with their values: --exclusive --constraint="a|b" -w n1 is --exclusive, "", and so on.

    ValueError: it cannot be cut into words, or a word belongs to no option.
    """
    found: list[tuple[str, str]] = []
    waits = False
    for word in shlex.split(text):
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word.partition("=")
            found.append((name, value))
            waits = not equals
        elif word.startswith("-") and len(word) > 1 and not word.startswith("--"):
            found.append((word[:2], word[2:]))
            waits = len(word) == 2
        elif waits:
            found[-1] = (found[-1][0], word)
            waits = False
        else:
            raise ValueError(f"{word!r} belongs to no option; options of sbatch begin with -")
    return found


def wrong(text: str, gpus: bool) -> Iterator[str]:
    """What cannot stand there. gpus: whether the option --gpus was given."""
    try:
        found = options(text)
    except ValueError as error:
        yield str(error)
        return
    ours = OURS | (OF_GPUS if gpus else {})
    for option, _ in found:
        name = SHORT.get(option[1:], option[1:]) if len(option) == 2 else option[2:]
        same = next((mine for mine in sorted(ours) if mine.startswith(name)), None) if len(option) > 2 else name if name in ours else None
        if same:
            yield f"{option} is written by fedsim itself" + (f"; say {ours[same]}" if ours[same] else "")
