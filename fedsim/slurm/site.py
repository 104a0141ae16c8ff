"""The defaults of a site: `~/.config/fedsim/slurm.toml`, with the names of the options. A command line wins over them.

partition = "cpu"
account = "p1234"
modules = "gcc openmpi/5"
scratch = "/local"
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fedsim.config import job_file
from fedsim.errors import BadInput
from fedsim.slurm.options import options_of, refuse_unknown

NOT_THERE = {"array": "which runs are meant differs from sweep to sweep"}


def path() -> Path:
    """Where the file would be."""
    home = os.environ.get("XDG_CONFIG_HOME", "")
    folder = Path(home) if home.startswith("/") else Path.home() / ".config"  # the standard says: a relative one does not count
    return folder / "fedsim" / "slurm.toml"


def defaults(file: Path | None = None) -> dict[str, Any]:
    """What the file says, by the names of options; nothing where there is no file. BadInput, with its name, where it is wrong."""
    file = file or path()
    if not os.path.lexists(file):
        return {}
    table = {name.replace("-", "_"): value for name, value in job_file.read_table(file).items()}  # ranks-per-gpu too, as in --help
    refuse_unknown(table, where=f"{file}: ")
    if wrong := [f"{file}: {name} belongs on the command line: {why}" for name, why in NOT_THERE.items() if name in table]:
        raise BadInput("\n".join(wrong))
    try:
        options_of(table)
    except BadInput as error:
        raise BadInput("\n".join(f"{file}: {line}" for line in str(error).splitlines())) from None
    return table
