"""Images of any source become one HDF5 file in the form of `data.name = "file"`."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from pathlib import Path

from fedsim.data.conversion.batches import Batch
from fedsim.data.conversion.survey import Survey
from fedsim.data.own_file.writing import FileWriter, is_hdf5
from fedsim.errors import BadInput

ALONE = "--test-share 0.2 makes a fifth of each class the test images, --test-share 0 leaves the choice to the run (a fixed fifth)"


def check(out: Path, force: bool, sources: Iterable[str | None] = ()) -> None:
    """BadInput where the file may not be written. sources: what it is made of, which it may not replace."""
    for source in sources:
        if source and Path(source).exists() and out.exists() and Path(source).samefile(out):
            raise BadInput(f"--out {out} is the source itself; choose another file")
    if out.is_dir():
        raise BadInput(f"--out {out} is a folder; give the name of a file, such as {out / 'images.h5'}")
    if not out.parent.is_dir():
        raise BadInput(f"--out {out}: there is no folder {out.parent}")
    if not out.exists():
        return
    if out.suffix.lower() not in (".h5", ".hdf5") and not is_hdf5(out):  # it may be one of the images, or the only labels
        raise BadInput(f"--out {out} is there already and is no HDF5 file; choose another name, such as {out.with_suffix('.h5')}")
    if not force:
        raise BadInput(f"--out {out} is there already; --force replaces it")


def write(batches: Iterable[Batch], found: Survey, out: Path) -> Generator[Batch, None, None]:
    """Writes each batch, and passes it on. The file has its name when the last one has been taken."""
    sizes = {"x": int((~found.test).sum()), "x_test": int(found.test.sum())}
    with FileWriter(out, sizes) as file:
        for batch in batches:
            file.add("x_test" if batch.test else "x", batch.x)
            yield batch
        for ending, some in (("", ~found.test), ("_test", found.test)):
            if some.any():
                file.column(f"y{ending}", found.y[some])
                if (users := found.user(some)) is not None:
                    file.column(f"client{ending}", users)
        if found.class_names:
            file.column("class_names", found.class_names)


def refuse_untested(name: str, found: Survey, share: float | None) -> None:
    """BadInput where a source has no training images, or has no test images and nothing says which they are."""
    if found.test.all():
        raise BadInput(f"{name} has test images alone; a file for jobs needs training images too")
    if share is None and not found.test.any():
        raise BadInput(f"{name} has no test images; {ALONE}, --test PATH takes those of another source")
