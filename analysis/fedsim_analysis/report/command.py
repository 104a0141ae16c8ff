"""`fedsim report`: the page of some runs, and the folder of its figures beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedsim_analysis.report import files, folder, page
from fedsim_analysis.report.escaping import shown

HEAD = 4096  # bytes in which a page of ours is marked


def write(runs: Sequence[Path], out: Path) -> list[str]:
    """Writes the page to `out` and its figures beside it, to OUT_figures; lines that say what was written.

    runs: run files, or folders of run files. A page of ours is replaced; any other file is not.
    ValueError and OSError, with the message for the user, for runs that cannot be read and places that cannot be written.
    """
    out = Path(out)
    figures = out.with_name(f"{out.stem}_figures")
    _check(out)
    folder.check(figures)
    from fedsim_analysis.report import assembly

    try:
        made = assembly.report(runs, figures.name)
    except (OSError, ValueError) as error:
        raise ValueError(shown(" ".join(str(error).split()))) from error
    report = made.report
    pictures = folder.drawn(report.figures(), made.runs)
    text = page.render(report, {name: kinds["svg"] for name, kinds in pictures.items()})
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder.write(figures, pictures, folder.index(report.title, report.figures(), made.opening))
        files.put(out, text.encode())
    except OSError as error:
        if error.errno is None:  # it says already what is wrong
            raise
        raise OSError(f"{error.filename or out} cannot be written: {error.strerror}; choose another --out") from error
    lines = [f"{out}: {report.subtitle}, {len(text.encode()) / 1e6:.1f} MB", f"{figures}: {len(pictures)} figures as SVG and PDF"]
    return [shown(line) for line in lines + ([report.warning] if report.warning else [])]


def _check(out: Path) -> None:
    """That the page may be written there."""
    if out.is_dir():
        raise IsADirectoryError(f"{out} is a folder; give --out a file, such as {out / 'report.html'}")
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{out} does not end in .html; a report is a page, such as --out report.html")
    if out.exists() and not _is_ours(out):
        raise FileExistsError(f"{out} exists, and is no report of fedsim; move it, or choose another --out")


def _is_ours(out: Path) -> bool:
    with out.open("rb") as file:
        head = file.read(HEAD)
    return not head or page.MARK.encode() in head
