"""Where the command line begins. What runs notes signals, and a rank watches its launcher, before anything heavy is imported.

Of several ranks on a node the first imports for all and forks the others (`simulation/launchers/forking/`).
"""

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
    if sys.argv[1:2] == ["run"]:
        from fedsim.simulation.launchers import forking

        forking.begin()
    from fedsim.cli import commands

    try:
        commands.main()
    except SystemExit as end:
        _tell(end.code)
        raise


def _tell(code: object) -> None:
    """Of a rank that was forked, the one who stands for it hears the exit code."""
    if forking := sys.modules.get("fedsim.simulation.launchers.forking"):
        forking.tell(code)
