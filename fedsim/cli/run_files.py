"""The run file that a command line names, looked at before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path

from fedsim.errors import BadInput, naming_path


def check(path: Path) -> None:
    """BadInput where there is no file, before anything heavy is imported."""
    with naming_path(path):
        folder, there = path.is_dir(), path.is_file()
    if folder:
        found = sorted(path.glob("*.h5"))
        example = f", for example {found[0]}" if found else "; there is none in it"
        raise BadInput(f"{path} is a folder; give a run file{example}")
    if not there:
        raise BadInput(f"there is no run file {path}")


def found(path: Path) -> list[Path]:
    """The run file, or the run files of the folder; BadInput where there is nothing of that name."""
    with naming_path(path):
        if path.is_dir():
            return sorted(path.glob("*.h5"))
        if not path.exists():
            raise BadInput(f"there is no run file {path}")
    return [path]


def client(run: Path, said: str) -> int:
    """The number of the client that the data set called so. A number counts as one of ours where no client has a number for a name."""
    from fedsim.storage.reader import RunReader

    known = RunReader(run).called("client")
    if known and said in known:
        return known.index(said)
    if said.removeprefix("-").isdecimal() and not any(name.isdecimal() for name in known or ()):
        return int(said)
    if known is None:
        raise BadInput(f"--client {said}: the clients of {run} have no names, only numbers from 0")
    raise BadInput(f"--client {said}: {run} has no client of this name; it has {', '.join(known[:10])}{', …' if len(known) > 10 else ''}")
