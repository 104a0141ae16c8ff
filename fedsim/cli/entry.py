"""Where the command line begins. A run notes signals and watches its launcher before it imports anything heavy."""

import sys

from fedsim.simulation.launchers import first_signals


def main() -> None:
    """The console script."""
    if sys.argv[1:2] in (["run"], ["sweep"]):
        first_signals.note()
        from fedsim.simulation.launchers import watch

        watch.begin()
    from fedsim.cli import commands

    commands.main()
