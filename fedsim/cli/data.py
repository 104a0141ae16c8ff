"""`fedsim data`: shows images and their partition, and converts images to the file that jobs read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.text import Text

from fedsim.data.conversion.options import Options
from fedsim.errors import BadInput, naming_job

if TYPE_CHECKING:
    from fedsim.config.job import Job
    from fedsim.data.conversion.source import Source
    from fedsim.data.population import Population
    from fedsim.data.showing.description import Description

SOURCE = (
    "A data set by its name, a job, your own HDF5 or npz file; or what can be converted: a folder of images (train/CLASS/*.png), a CSV file"
    " (path,label or path,label,user, or pixels), IDX files as MNIST's. ./NAME is a file or folder."
)
FIGURES = (".png", ".pdf", ".svg")
LEVELS = "The folders above the images: class, user/class or class/user. Default: class."
NAMED = ("client", "class")  # the axes of the figure
CONVERT = "Options of conversion"

Name = Literal["class", "user/class", "class/user"]


def add(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command()(data)


def _option(*names: str, metavar: str | None = None, about: str, **more: Any) -> Any:
    return typer.Option(*names, metavar=metavar, help=about, rich_help_panel=CONVERT, **more)


def data(
    source: Annotated[str, typer.Argument(metavar="NAME | PATH | JOB.toml", help=SOURCE)],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Replace a value of the job, such as data.download=true."),
    ] = None,
    sheet: Annotated[Path | None, typer.Option(metavar="SHEET.png", help="Write a picture of some images of each class.")] = None,
    partition: Annotated[
        Path | None, typer.Option(metavar="FIGURE.png", help="Write a figure of the images that each client holds of each class.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="MINE.h5", help='Convert the images to this file, for data.name = "file".')] = None,
    force: Annotated[bool, _option("--force", about="Replace a file that is there.")] = False,
    test: Annotated[str | None, _option("--test", metavar="PATH", about="The test images, in the same form.")] = None,
    test_share: Annotated[
        float | None,
        _option("--test-share", metavar="SHARE", about="Make this share of each class the test images, by a hash of their names. 0: none."),
    ] = None,
    levels: Annotated[Name | None, _option("--levels", metavar="LEVELS", about=LEVELS)] = None,
    images: Annotated[
        str | None, _option("--images", metavar="FOLDER", about="The folder of the paths in a CSV. Default: its own.")
    ] = None,
    shape: Annotated[str | None, _option("--shape", metavar="C,H,W", about="The shape of a CSV's pixels. Default: a grey square.")] = None,
    size: Annotated[int | None, _option("--size", metavar="N", min=1, max=4096, about="Resize images to NxN pixels.")] = None,
    grey: Annotated[bool, _option("--grey", about="Make all images grey.")] = False,
    rgb: Annotated[bool, _option("--rgb", about="Give all images three channels.")] = False,
    relabel: Annotated[bool, _option("--relabel", about="Number the labels that occur from 0, in sorted order.")] = False,
) -> None:
    """Show images: their shape, classes and users, and how a job deals them to clients. With --out, convert them to one file for jobs.

    Without --out everything is read and checked, and nothing is written but what --sheet and --partition name.
    """
    _check_options(source, sheet, partition, out, force, grey, rgb, test, test_share)
    options = Options(levels, images, _sizes(shape), test, test_share, size, grey, rgb, relabel)
    with _named_files():
        job, is_dealt = _job(source, settings, partition is not None)
        from fedsim.data.conversion import writing

        if out is not None:
            writing.check(out, force, (source, test))
        found, population = _opened(source, job, is_dealt, options)
        shown = _read(found, options, out, sheet is not None)
        _print(source, found, shown, population, {"sheet": sheet, "partition": partition, "out": out})


def _check_options(
    source: str,
    sheet: Path | None,
    partition: Path | None,
    out: Path | None,
    force: bool,
    grey: bool,
    rgb: bool,
    test: str | None,
    share: float | None,
) -> None:
    """BadInput for options that are wrong whatever the source is."""
    for name, path, endings in (("--sheet", sheet, FIGURES[:1]), ("--partition", partition, FIGURES)):
        if path is None:
            continue
        if path.suffix.lower() not in endings:
            raise BadInput(f"{name} {path}: the name of the picture should end in {', '.join(endings)}")
        if not path.parent.is_dir():
            raise BadInput(f"{name} {path}: there is no folder {path.parent}")
        if path.exists() and Path(source).is_dir() and path.resolve().is_relative_to(Path(source).resolve()):
            raise BadInput(f"{name} {path} is there already, and may be one of the images of {source}; choose another name")
    if force and out is None:
        raise BadInput("--force replaces the file that --out names; give --out MINE.h5")
    if grey and rgb:
        raise BadInput("--grey and --rgb exclude each other")
    if share is not None and not 0 <= share < 1:
        raise BadInput(f"--test-share {share:g}: it should be at least 0 and below 1, such as 0.2")
    if share is not None and test is not None:
        raise BadInput("--test names the test images, and --test-share takes some of the training images; give one of them")


def _sizes(shape: str | None) -> tuple[int, int, int] | None:
    if shape is None:
        return None
    sizes = [int(size) if size.strip().isdecimal() else 0 for size in shape.split(",")]
    if len(sizes) != 3 or not all(sizes):
        raise BadInput(f"--shape {shape}: should be C,H,W, for example 3,32,32")
    return sizes[0], sizes[1], sizes[2]


def _job(source: str, settings: Sequence[str] | None, wants_partition: bool) -> tuple[Job | None, bool]:
    """The job that reads the source, or None where it is to be converted; and whether its partition is shown."""
    from fedsim.config import job_file

    settings = settings or ()
    path = Path(source)
    if source.endswith(".toml"):
        return _checked(job_file.table_of(path, settings), source), True
    named = _is_name(source)
    if not named and not path.exists():
        raise _unknown(source)
    if not named and not (path.is_file() or path.is_dir()):  # reading a pipe could wait without end
        raise BadInput(f"{source} is neither a file nor a folder; give images, or a file of them")
    if not named and (path.is_dir() or _is_converted(path)):
        if settings or wants_partition:
            option = f"--set {settings[0]} replaces a value of a job" if settings else "--partition shows the clients of a job"
            raise BadInput(f"{option}, and {source} is not in a form that jobs read; convert it first, with --out MINE.h5")
        return None, False
    table: dict[str, Any] = {"name": "data", "data": {"name": source} if named else {"name": "file", "path": source}}
    table["method"] = {"name": "fedavg"}
    for item in settings:
        job_file.override(table, item)
    return _checked(table, f"fedsim data {source}"), wants_partition or "partition" in table


def _is_name(source: str) -> bool:
    from fedsim.core import entry_points
    from fedsim.data.settings import AUGMENTS

    return source in AUGMENTS or source in entry_points.names(entry_points.DATASETS)


def _unknown(source: str) -> BadInput:
    """The error for a source that is neither a file nor a name."""
    from difflib import get_close_matches

    from fedsim.core import entry_points
    from fedsim.data.settings import AUGMENTS

    known = [*(name for name in AUGMENTS if name != "file"), *entry_points.names(entry_points.DATASETS)]
    near = get_close_matches(source, known, 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return BadInput(f"fedsim data {source}: there is no such file, folder or data set{hint}. Data sets: {', '.join(known)}")


def _is_converted(path: Path) -> bool:
    """Whether a file is in a form that is converted, and that jobs do not read."""
    from fedsim.data.conversion import opening

    opening.refuse_archive(path)
    return opening.is_convertible(path)


def _checked(table: dict[str, Any], where: str) -> Job:
    from fedsim.config import job

    made = job.check(table, where)
    varied = [key for key in made.sweep if key == "seed" or key.startswith(("data.", "partition."))]
    if varied:
        raise BadInput(f"{where}: [sweep] varies {varied[0]}; fix it, for example --set {varied[0]}={made.sweep[varied[0]][0]}")
    return made


@contextmanager
def _named_files() -> Iterator[None]:
    """An error of the file system inside becomes one message."""
    try:
        yield
    except OSError as error:
        raise BadInput(f"{error.filename or 'a file'}: {error.strerror or error}") from error


def _opened(source: str, job: Job | None, is_dealt: bool, options: Options) -> tuple[Source, Population | None]:
    """The images, and where a partition is shown, which client holds which."""
    from fedsim.data.conversion import opening
    from fedsim.data.conversion.source import Opened
    from fedsim.data.population import populate
    from fedsim.data.sources import open_data

    if job is None:
        converted = opening.open_source(source, options)
        if converted is None:
            raise BadInput(f"{source} cannot be read")
        return converted, None
    opening.refuse_other(source, options)
    with naming_job(source):
        if is_dealt:
            population = populate(job.data, job.partition, job.seed)
            return Opened(source, population.train, population.test, list(population.record["notes"])), population
        train, test = open_data(job.data, job.seed)
        return Opened(source, train, test, list(getattr(train, "notes", ()))), None


def _read(source: Source, options: Options, out: Path | None, keeps: bool) -> Description:
    """Reads all images once, and writes them where that is wanted."""
    from fedsim.data.conversion import writing
    from fedsim.data.conversion.batches import batches
    from fedsim.data.conversion.survey import survey
    from fedsim.data.showing.description import KEPT, describe

    found = survey(source, options)
    every = batches(source, found, options)
    if out is None:
        return describe(every, found, KEPT if keeps else 0)
    writing.refuse_untested(source.name, found, options.test_share)
    with closing(writing.write(every, found, out)) as written:  # at an error or a signal the half file is removed at once
        return describe(written, found, KEPT if keeps else 0)


def _print(source: str, found: Source, shown: Description, population: Population | None, files: dict[str, Path | None]) -> None:
    """Prints the tables, writes the pictures and says what was written."""
    from fedsim.cli import data_tables

    console = Console(emoji=False)
    console.print(*data_tables.of_images(source, found, shown), sep="\n")
    if population is not None:
        console.print("", *data_tables.of_clients(population, console.width), sep="\n")
    lines = []
    if files["sheet"]:
        from fedsim.data.showing import sheet

        lines.append(sheet.write(shown.examples, shown.class_names, files["sheet"]))
    if files["partition"] and population is not None:
        lines.append(_figure(population, Path(source).name, files["partition"]))
    if files["out"]:
        lines += data_tables.of_file(files["out"], shown)
    console.print(*(Text(line) for line in ("", *lines) if lines), sep="\n", soft_wrap=True)


def _figure(population: Population, label: str, out: Path) -> str:
    """Writes the figure of the partition; a line about it."""
    counts = population.counts()
    if counts is None:
        raise BadInput(f"--partition: {population.clients:,} clients are too many for a figure; at most 100,000 are drawn")
    try:
        from fedsim_analysis.measures import Heat
        from fedsim_analysis.plots import page
        from fedsim_analysis.plots.heat_maps import heat
    except ImportError as error:
        raise BadInput(f"--partition needs the extra `analysis` ({error}); pip install 'fedsim[analysis]'") from error
    clients, classes = (population.names.get(kind) or tuple(map(str, range(counts.shape[axis]))) for axis, kind in enumerate(NAMED))
    shown = Heat(label, counts.astype(float), clients, classes, "Client", "Class", "Training images", "1", False, 1)
    page.save(heat(shown, None, "page"), out)
    return f"{out}: images of {population.clients:,} clients by class"
