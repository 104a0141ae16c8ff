"""What `fedsim export RUN.h5 --to csv | parquet | netcdf | mat` does."""

from __future__ import annotations

from pathlib import Path

from fedsim_analysis import checked, run_file
from fedsim_analysis.dataset.sources import Source, sources

FORMS = ("csv", "parquet", "netcdf", "mat")
OUT = {"csv": "-csv", "parquet": "-parquet", "netcdf": ".nc", "mat": ".mat"}  # after the name of the run


def write(run: str | Path, form: str, out: str | Path | None = None) -> list[str]:
    """Writes the complete rounds of a run file in a form that other tools read; the lines to print.

    form: "csv" or "parquet", a folder with a file for each table, or "netcdf" or "mat", one file. out: the folder or file; by default
    beside the run file, RUN-csv, RUN-parquet, RUN.nc or RUN.mat. A former export there is replaced.

    Raises FileNotFoundError, and ValueError: for a file that is damaged or no run file, for another form, where something else stands at
    `out` or it cannot be written, and where a library is missing.
    """
    run = Path(run)
    if form not in FORMS:
        raise ValueError(f"--to {form}: fedsim export writes {', '.join(FORMS)}")
    source = sources([run])[0]
    place = Path(out) if out is not None else run.with_name(run.stem + OUT[form])
    try:
        return [*_written(source, form, place), *_unfinished(source)]
    except ImportError as error:
        raise ValueError(f"fedsim export --to {form} needs the extra `analysis` ({error}); pip install 'fedsim[analysis]'") from error
    except checked.Damaged as error:
        raise run_file.Unreadable(f"{run} is damaged: {error}") from error


def _written(source: Source, form: str, out: Path) -> list[str]:
    if form == "netcdf":
        from fedsim_analysis.export import netcdf

        return netcdf.write(source, out)
    if form == "mat":
        from fedsim_analysis.export import matlab

        return matlab.write(source, out)
    from fedsim_analysis.export import folder

    return folder.write(source, form, out)


def _unfinished(source: Source) -> list[str]:
    if source.attributes["finished"]:
        return []
    planned, last = source.attributes.get("rounds_planned", "?"), source.rows - 1
    held = f"rounds 0 to {last} of {planned}" if last >= 0 else "no rounds yet"
    return [f"The run has not finished: these are its {held}." if last >= 0 else f"The run has not finished: it has {held}."]
