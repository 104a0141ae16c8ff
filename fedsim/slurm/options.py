"""What a submission can say: how many ranks and nodes, for how long, where. The words are those of `fedsim submit` and `fedsim.submit`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

from fedsim.config.durations import TIME, UNLIMITED, seconds
from fedsim.config.toml_values import written
from fedsim.errors import BadInput
from fedsim.slurm import arrays, sbatch_options

Launcher = Literal["mpirun", "srun", "none"]
MEMORY = re.compile(r"\d{1,9}[KMGT]?")
RANKS = 3  # where nothing else is said: a server and two that train, as in the quickstart
MEANING = {
    "nodes": "nodes of a run",
    "ranks": "MPI ranks of a run, rank 0 included, which serves and trains nothing; default: 3, or one on each GPU and one more",
    "gpus": "GPUs of a run, on all its nodes together",
    "ranks_per_gpu": "ranks that share a GPU",
    "threads": "threads of a rank; default: execution.threads of the job",
    "memory": "memory of each node, such as 8G",
    "time": "longest time, in minutes or as SLURM writes it: 90, 1:30:00, 2-12; default: the site's",
    "partition": "partition",
    "account": "account",
    "qos": "quality of service",
    "array": f"which runs, counted from 0, and how many at the same time: {arrays.SPEC}",
    "restarts": "how often a run may be requeued; default: 100",
    "launcher": "mpirun, srun or none, which is one process; default: what the job finds",
    "modules": "what `module load` loads, such as 'gcc openmpi/5'",
    "sbatch": "any other options of sbatch, such as '--constraint=icelake --exclusive'",
    "warning": "seconds before the end of the time when SLURM warns the run, which stops and is requeued",
    "venv": "the folder of the virtual environment; default: the one that submits",
    "scratch": "execution.scratch of the job: a folder on the disk of the node",
}


@dataclass(frozen=True)
class Options:
    """The options of a submission, validated. None and "" leave a choice to fedsim, the job or the site; see `MEANING`."""

    nodes: int = 1
    ranks: int | None = None
    gpus: int = 0
    ranks_per_gpu: int = 1
    threads: int | None = None
    memory: str = ""  # of each node, MB where no unit is given
    time: str = ""  # minutes, or D-HH:MM:SS
    partition: str = ""
    account: str = ""
    qos: str = ""
    array: str = ""
    restarts: int | None = None
    launcher: Launcher | None = None
    modules: str = ""
    sbatch: str = ""
    warning: int = 60  # seconds
    venv: str = ""
    scratch: str = ""

    @property
    def all_ranks(self) -> int:
        """Ranks of a run, rank 0 included."""
        if self.launcher == "none":
            return 1
        return self.ranks or (self.gpus * self.ranks_per_gpu + 1 if self.gpus else max(RANKS, self.nodes))

    @property
    def given(self) -> dict[str, Any]:
        """What differs from the defaults."""
        return {name: value for name, value in asdict(self).items() if value != DEFAULTS[name]}


DEFAULTS = {field.name: field.default for field in fields(Options)}
LEAST = {"nodes": 1, "ranks": 1, "gpus": 0, "ranks_per_gpu": 1, "threads": 1, "restarts": 0, "warning": 1}
KINDS = get_type_hints(Options)


def options_of(*given: Mapping[str, Any], called: Callable[[str], str] = str) -> Options:
    """The options that the tables say; what stands in a later table wins. BadInput lists all that is wrong.

    called: how a message calls an option, such as --ranks-per-gpu for ranks_per_gpu.
    """
    values = {name: value for table in given for name, value in table.items() if value is not None}
    refuse_unknown(values, called)
    if wrong := list(_wrong(values, called)):
        raise BadInput("\n".join(wrong))
    settled: dict[str, Any] = {name: str(value) if KINDS[name] is str else value for name, value in values.items()}
    options = Options(**settled)
    if wrong := list(_contradictions(options, called)):
        raise BadInput("\n".join(wrong))
    return options


def refuse_unknown(values: Mapping[str, Any], called: Callable[[str], str] = str, where: str = "") -> None:
    """BadInput for options that there are not; it lists all that there are, with their defaults."""
    if unknown := [called(name) for name in values if name not in DEFAULTS]:
        there = "\n".join(f"  {called(name)} = {_default(name)}: {MEANING[name]}" for name in DEFAULTS)
        raise BadInput(f"{where}there is no option {', '.join(unknown)}. The options of a submission and their defaults:\n{there}")


def _default(name: str) -> str:
    return "-" if DEFAULTS[name] in (None, "") else written(DEFAULTS[name])


def _wrong(values: Mapping[str, Any], called: Callable[[str], str]) -> Iterator[str]:
    """What is wrong with single values."""
    for name, value in values.items():
        if name in LEAST:
            if type(value) is not int or not LEAST[name] <= value < 2**31:
                yield f"{called(name)} = {written(value)}: should be a whole number, at least {LEAST[name]} ({MEANING[name]})"
        elif name == "launcher":
            if value not in get_args(Launcher):
                yield f"{called(name)} = {written(value)}: there are {', '.join(get_args(Launcher))}"
        elif (type(value) is int and name in ("time", "memory")) or isinstance(value, str):
            yield from (f"{called(name)} = {written(value)}: {why}" for why in _wrong_text(name, str(value)))
        else:
            yield f"{called(name)} = {value}: should be a text in quotation marks ({MEANING[name]})"


def _wrong_text(name: str, text: str) -> Iterator[str]:
    if any(not sign.isprintable() for sign in text):
        yield "line breaks and other signs that cannot be printed have no place in an option"
    elif name == "memory" and text and not MEMORY.fullmatch(text):
        yield "should be a size such as 8G, 500M, or a number of MB"
    elif name == "time" and text and text.upper() not in UNLIMITED and not TIME.fullmatch(text):
        yield "should be minutes, or a time as SLURM writes it: 90, 1:30:00, 2-12, 2-12:30:00"
    elif name == "modules" and not _has_words(text):
        yield "has a quotation mark without an end"
    elif name in ("partition", "account", "qos") and re.search(r"\s|^-", text):
        yield "should be a name without spaces"


def _has_words(text: str) -> bool:
    try:
        return shlex.split(text) is not None
    except ValueError:
        return False


def _contradictions(options: Options, called: Callable[[str], str]) -> Iterator[str]:
    """What does not fit together."""
    ranks, gpus = options.all_ranks, options.gpus
    if options.ranks_per_gpu > 1 and not gpus:
        yield f"{called('ranks_per_gpu')} = {options.ranks_per_gpu}: say also how many GPUs: {called('gpus')}"
    if gpus and options.ranks and options.ranks_per_gpu != 1 and options.ranks != gpus * options.ranks_per_gpu + 1:
        yield (
            f"{called('ranks')} = {ranks}: {options.ranks_per_gpu} ranks on each of {gpus} GPUs and rank 0, which serves,"
            f" are {gpus * options.ranks_per_gpu + 1}; leave {called('ranks')} out"
        )
    if gpus % options.nodes:
        yield f"{called('gpus')} = {gpus}: the GPUs of all nodes together, which {options.nodes} nodes cannot share evenly"
    if ranks < options.nodes:
        yield f"{called('nodes')} = {options.nodes}: {ranks} ranks cannot fill so many nodes"
    if options.launcher == "none" and (options.ranks or 1) > 1:
        yield f"{called('launcher')} = none: it starts one process, and {called('ranks')} says {options.ranks}"
    if options.time and (whole := seconds(options.time)) <= options.warning:
        yield (
            f"{called('time')} = {options.time}: {whole:.0f} seconds, and the run is warned {options.warning} seconds before the end;"
            f" a longer {called('time')} or a smaller {called('warning')} is needed"
        )
    yield from (f"{called('sbatch')}: {why}" for why in sbatch_options.wrong(options.sbatch, bool(gpus)))
    try:
        arrays.check(options.array)
    except BadInput as error:
        yield str(error)
