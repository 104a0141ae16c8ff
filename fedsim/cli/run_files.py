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


def client_of(run: Path, text: str) -> int:
    """The number of the client that the data set called `text`, which may be a number too; else of the client with this number."""
    from fedsim.storage.reader import RunReader

    known = RunReader(run).called("client") or []
    if text in known:
        return known.index(text)
    if text.removeprefix("-").isdecimal():
        return int(text)
    if not known:
        raise BadInput(f"--client {text}: the clients of {run} have no names, only numbers from 0")
    some = ", ".join(known[:10]) + (", …" if len(known) > 10 else "")
    raise BadInput(f"--client {text}: {run} has no client of this name; it has {some}")
