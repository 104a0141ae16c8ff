"""The run file that a command line names, looked at before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path

from fedsim.errors import BadInput


def check(path: Path) -> None:
    """BadInput where there is no file, before anything heavy is imported."""
    if path.is_dir():
        found = sorted(path.glob("*.h5"))
        example = f", for example {found[0]}" if found else "; there is none in it"
        raise BadInput(f"{path} is a folder; give a run file{example}")
    if not path.is_file():
        raise BadInput(f"there is no run file {path}")


def called(run: Path, name: str) -> int:
    """The number of the client that the data set called `name`."""
    from fedsim.storage.reader import RunReader

    known = RunReader(run).called("client")
    if known is None:
        raise BadInput(f"--client {name}: the clients of {run} have no names, only numbers from 0")
    if name not in known:
        raise BadInput(
            f"--client {name}: {run} has no client of this name; it has {', '.join(known[:10])}{', …' if len(known) > 10 else ''}"
        )
    return known.index(name)
