"""For job arrays written by hand, as `slurm/sweep.sbatch`: which run of a [sweep] an element does.

`python -m fedsim.slurm.batch.element JOB.toml FOLDER INDEX` writes the job of that run to FOLDER/slurm/jobs/NAME.toml and prints NAME.
`fedsim submit` makes such arrays by itself.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fedsim.config.job import load, resolved, runs
from fedsim.config.method_source import look_here_too
from fedsim.errors import BadInput, NoRoom


def element(job: Path, folder: Path, index: str) -> str:
    """The name of the run with this index, from 0 in the order of `fedsim sweep`; its job is written. Raises BadInput, NoRoom, OSError."""
    found = runs(load(job))
    if not (index.isascii() and index.isdigit() and int(index) < len(found)):
        raise BadInput(f"{job} has {len(found)} runs, and there is none with index {index!r}: submit it with --array=0-{len(found) - 1}")
    run = found[int(index)]
    from fedsim.storage.disk_room import put

    file = folder / "slurm" / "jobs" / f"{run.name}.toml"
    file.parent.mkdir(parents=True, exist_ok=True)
    put(file, os.fsencode(resolved(run)), again="submit the element again")
    return run.name


def main(arguments: list[str]) -> int:
    """The exit code: 2 for wrong arguments or a wrong job, 3 where there is no room."""
    look_here_too()
    if len(arguments) != 3:
        return _refuse("usage: python -m fedsim.slurm.batch.element JOB.toml FOLDER INDEX", 2)
    job, folder, index = arguments
    try:
        sys.stdout.write(f"{element(Path(job), Path(folder), index)}\n")
    except NoRoom as error:
        return _refuse(error, 3)
    except (BadInput, OSError) as error:
        return _refuse(error, 2)
    return 0


def _refuse(why: object, code: int) -> int:
    sys.stderr.write(f"{why}\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
