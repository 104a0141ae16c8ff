"""Where the command line begins. What runs notes signals, and a rank watches its launcher, before anything heavy is imported."""

import sys

from fedsim.simulation.launchers import first_signals


def main() -> None:
    """The console script."""
    if sys.argv[1:2] in (["run"], ["sweep"]):
        first_signals.note()
        from fedsim.simulation.launchers import watch

        watch.begin()
    elif sys.argv[1:2] == ["batch"]:
        first_signals.note()
    from fedsim.cli import commands

    commands.main()
