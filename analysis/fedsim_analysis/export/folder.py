"""Runs as a folder of CSV or Parquet files, a file for each table, with the job and the attributes of the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import tomli_w
from pyarrow import csv, parquet

from fedsim_analysis import checked, run_file
from fedsim_analysis.dataset.sources import Source
from fedsim_analysis.export import place, tables
from fedsim_analysis.export.tables import Column, Piece, Table
from fedsim_analysis.foreign_text import no_formula

NAMES = ("rounds", "timing", "speed", "layers", "clients", "partition", "columns")  # of the tables
ATTRIBUTES, JOB = "attributes.json", "job.toml"
KINDS = {"int": pa.int64(), "float": pa.float64(), "text": pa.string()}


def write(source: Source, form: str, out: Path) -> list[str]:
    """Writes the folder `out` in the form "csv" or "parquet"; a line for each file. Raises place.Refused."""
    lines = []
    with place.aside(out, is_folder=True, is_ours=_is_ours) as folder:
        made = tables.of_run(source)
        for table in [*made, _described(made)]:
            name = f"{table.name}.{form}"
            lines.append(f"  {name:<20} {_write(table, form, folder / name):,} rows")
        (folder / ATTRIBUTES).write_text(_attributes(source), "utf-8")
        (folder / JOB).write_text(_job(source), "utf-8")
    return [f"{out}", *lines, f"  {ATTRIBUTES}, {JOB}"]


def _is_ours(folder: Path) -> bool:
    """Whether nothing but an export is in the folder."""
    expected = {ATTRIBUTES, JOB} | {f"{name}.{form}" for name in NAMES for form in ("csv", "parquet")}
    found = {path.name for path in folder.iterdir()}
    return found <= expected and (not found or {ATTRIBUTES, JOB} <= found)


def _write(table: Table, form: str, path: Path) -> int:
    """The rows that were written."""
    count, schema = 0, _schema(table, form)
    writer = csv.CSVWriter(path, schema) if form == "csv" else parquet.ParquetWriter(path, schema, compression="snappy")
    with writer:
        for piece in table.pieces():
            batch = pa.table([_array(column, piece, form) for column in table.columns], schema=schema)
            writer.write_table(batch)
            count += batch.num_rows
    return count


def _schema(table: Table, form: str) -> pa.Schema:
    """With the unit and the description of each column, which Parquet keeps."""
    about = [{"units": column.units, "long_name": column.about} for column in table.columns]
    names = [no_formula(column.name) if form == "csv" else column.name for column in table.columns]
    kinds = [KINDS[column.kind] for column in table.columns]
    return pa.schema([pa.field(*field, metadata=each) for *field, each in zip(names, kinds, about, strict=True)])


def _array(column: Column, piece: Piece, form: str) -> pa.Array:
    """Values as Arrow has them: what was not measured is missing, which R, pandas, DuckDB and spreadsheets leave out of means."""
    values = piece[column.name]
    if column.kind == "text" and form == "csv":
        values = [no_formula(value) for value in values]
    return pa.array(values, KINDS[column.kind], from_pandas=column.kind == "float")


def _described(made: Sequence[Table]) -> Table:
    """What each column of each table holds."""
    about = [(table.name, column) for table in made for column in table.columns]
    piece = {
        "table": [name for name, _ in about],
        "column": [column.name for _, column in about],
        "units": [column.units for _, column in about],
        "description": [column.about for _, column in about],
    }
    texts = {"table": "file", "column": "name of the column", "units": 'its unit; "1" is a share or a count', "description": "what it is"}
    return Table("columns", [Column(name, "text", about=text) for name, text in texts.items()], lambda: iter([piece]))


def _attributes(source: Source) -> str:
    """The attributes of the run file but the job, as JSON; what is JSON in one of them is an object here."""
    known = {name: value for name, value in source.attributes.items() if name != "job"}
    for name in {"plan", "partition"} & known.keys():
        known[name] = checked.from_json(known[name], f"the attribute {name!r}")
    return json.dumps({name: _plain(value) for name, value in sorted(known.items())}, indent=2, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    return None if isinstance(value, float | np.floating) and not isfinite(value) else value


def _job(source: Source) -> str:
    """The resolved job, under the present names."""
    former = source.attributes["format_version"] < run_file.RENAMED
    return tomli_w.dumps(run_file.job(source.attributes)) if former else str(run_file.one(source.attributes, "job"))
