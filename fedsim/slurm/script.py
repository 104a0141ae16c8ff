"""The text that sbatch gets, as a function of values alone. It ends in `exec … fedsim batch …`, as the scripts of `slurm/` do."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedsim.slurm import sbatch_options
from fedsim.slurm.arrays import Array
from fedsim.slurm.options import Options

PLAIN = re.compile(r"[\w@%+=:,./-]+", re.ASCII)
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
BEGIN = """trap 'export FEDSIM_WARNED=1' USR1 TERM     # a signal may come at once"""
KEEP = """keep=$(env --block-signal=USR1,TERM true 2>/dev/null && echo env --block-signal=USR1,TERM)  # until fedsim can hear them
trap '' USR1 TERM"""


@dataclass(frozen=True)
class Place:
    """Where things are, as absolute paths of the file system that all nodes see.

    here: the folder of the call, in which the job runs. folder: of the run files. program: the words that call fedsim.
    """

    here: Path
    folder: Path
    program: tuple[str, ...]

    @property
    def slurm(self) -> Path:
        """The folder of what belongs to submissions."""
        return self.folder / "slurm"


@dataclass(frozen=True)
class Name:
    """Of a SLURM job: its own name, and the one run that it does. run: empty for an array, which takes its runs from `runs.txt`."""

    job: str
    run: str = ""


def text(name: Name, place: Place, options: Options, array: Array | None = None) -> str:
    """The batch text of one run, or of a job array. A pure function."""
    what = f"the run {name.run}" if array is None else f"runs of {place.slurm / 'runs.txt'}, lines {_lines(array)}"
    lines = [
        "#!/bin/bash",
        f"# fedsim submit wrote this: {_comment(what)}.",
        f"# What becomes of it: fedsim submit --status {_comment(shlex.quote(str(place.folder)))}",
        *(f"#SBATCH {line}" for line in _directives(name, place, options, array)),
        "",
        BEGIN,
        f"cd {_quoted(place.here)} || exit 2",
        *(f"export {variable}={options.threads or 1}" for variable in THREADS),
        *_modules(options.modules),
        *(_one(name.run, place) if array is None else _element(array, place)),
        KEEP,
        f'exec $keep {" ".join(map(_quoted, place.program))} batch "$job" --out "$out" {" ".join(_batch_options(options))}',
    ]
    return "\n".join([*lines, ""])


def log_of(name: str, number: str, task: int | None) -> str:
    """The name of the file in `slurm/log` that holds the output of a job, or of a task of an array."""
    return f"{name}-{number}.out" if task is None else f"{name}-{number}_{task}.out"


def _directives(name: Name, place: Place, options: Options, array: Array | None) -> Iterator[str]:
    """Without #SBATCH. A % in a path is no pattern of SLURM's."""
    pattern = "%x-%j.out" if array is None else "%x-%A_%a.out"
    yield _directive("job-name", name.job)
    yield _directive("chdir", str(place.here))
    yield _directive("output", f"{place.slurm / 'log'}/".replace("%", "%%") + pattern)
    yield "--open-mode=append"
    yield "--no-requeue" if options.restarts == 0 else "--requeue"
    yield f"--signal=B:USR1@{options.warning}"
    yield f"--nodes={options.nodes}"
    yield f"--ntasks={options.all_ranks}"
    yield f"--cpus-per-task={options.threads or 1}"
    if options.gpus:
        yield f"--gres=gpu:{options.gpus // options.nodes}"
    values = {"mem": options.memory, "time": options.time}
    values |= {"partition": options.partition, "account": options.account, "qos": options.qos}
    yield from (_directive(option, value) for option, value in values.items() if value)
    if array:
        yield f"--array={array.spec}"
    for option, value in sbatch_options.options(options.sbatch):
        yield f"{option} {_value(value)}".rstrip() if len(option) == 2 else f"{option}={_value(value)}" if value else option


def _directive(option: str, value: str) -> str:
    return f"--{option}={_value(value)}"


def _value(text: str) -> str:
    """As sbatch reads it: it takes away quotes, and a backslash before any sign, within quotes of both kinds too."""
    if not text or PLAIN.fullmatch(text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _quoted(word: Path | str) -> str:
    return shlex.quote(str(word))


def _comment(text: str) -> str:
    """In one line, whatever stands in it."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)


def _lines(array: Array) -> str:
    return f"{array.indices[0]} to {array.indices[-1]}"


def _modules(modules: str) -> Iterator[str]:
    if modules:
        yield "command -v module >/dev/null || . /etc/profile  # where a site defines it"
        yield f"module load {' '.join(map(shlex.quote, shlex.split(modules)))} || exit 2"


def _one(run: str, place: Place) -> Iterator[str]:
    yield f"job={_quoted(place.slurm / 'jobs' / f'{run}.toml')}"
    yield f"out={_quoted(place.folder / f'{run}.h5')}"


def _element(array: Array, place: Place) -> Iterator[str]:
    """Which run a task of the array does: its line of `runs.txt`."""
    yield f"folder={_quoted(place.folder)}"
    yield f"line=$((SLURM_ARRAY_TASK_ID + {array.offset}))  # from 0"
    yield 'run=$(sed -n "$((line + 1))p" "$folder/slurm/runs.txt")'
    yield '[ -n "$run" ] || { echo "$folder/slurm/runs.txt has no line $line" >&2; exit 2; }'
    yield "job=$folder/slurm/jobs/$run.toml"
    yield "out=$folder/$run.h5"


def _batch_options(options: Options) -> Iterator[str]:
    yield f"--ranks {options.all_ranks}"
    if options.launcher:
        yield f"--launcher {options.launcher}"
    if options.restarts is not None:
        yield f"--restarts {options.restarts}"
