"""CSV and Parquet: the numbers of the run file in tables that R, pandas and spreadsheets read."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fedsim_analysis import load
from fedsim_analysis.export import command
from hand_made_run import ATTRIBUTES, hand_made_run
from pyarrow import parquet

CLIENTS = [(0, 0, 0.5), (0, 2, 1.0), (1, 1, 0.25), (1, 2, 0.75), (3, 0, 0.125)]  # those that were measured
PARTITION = [(0, 0, 4), (0, 1, 0), (1, 0, 1), (1, 1, 2), (2, 0, 0), (2, 1, 9)]


def read(folder: Path, name: str, form: str) -> pd.DataFrame:
    return pd.read_csv(folder / f"{name}.csv") if form == "csv" else pd.read_parquet(folder / f"{name}.{form}")


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_the_tables_have_the_numbers(tmp_path: Path, form: str) -> None:
    lines = command.write(hand_made_run(tmp_path / "run.h5"), form)
    out = tmp_path / f"run-{form}"
    assert lines[0] == str(out)
    rounds = read(out, "rounds", form)
    assert rounds["round"].tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(rounds["accuracy"], [0.25, np.nan, 0.5, 0.75])
    assert rounds["bytes_up"].tolist() == [0, 1000, 2000, 3000]
    assert rounds["loss"].isna().all()
    assert read(out, "timing", form)["compute"].tolist() == [0, 0.5, 1, 1.5]
    layers = read(out, "layers", form)
    assert layers[["round", "layer", "density"]].to_records(index=False).tolist()[3:6] == [
        (1, "fc", 0.5),
        (2, "conv1", 1.0),
        (2, "fc", 0.25),
    ]
    assert read(out, "clients", form)[["round", "client", "accuracy"]].to_records(index=False).tolist() == CLIENTS
    assert read(out, "clients", form)["device"].tolist() == ["fast", "fast", "slow", "fast", "fast"]
    assert read(out, "partition", form)[["client", "class", "images"]].to_records(index=False).tolist() == PARTITION


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_every_number_of_the_file_is_there(tmp_path: Path, form: str) -> None:
    """Held against the other reader, whose tables have a column for each client."""
    path = hand_made_run(tmp_path / "run.h5")
    command.write(path, form)
    run, tables = load(path), {name: read(tmp_path / f"run-{form}", name, form) for name in ("rounds", "timing", "clients", "layers")}
    np.testing.assert_array_equal(tables["rounds"].set_index("round")[list(run.rounds)], run.rounds)
    np.testing.assert_array_equal(tables["timing"].set_index("round")[list(run.timing())], run.timing())
    for group in ("clients", "layers"):
        wide = tables[group].pivot(index="round", columns=group.removesuffix("s"), values=("accuracy", "density")[group == "layers"])
        expected = run.clients("accuracy") if group == "clients" else run.layers("density")
        np.testing.assert_array_equal(wide.reindex(expected.index), expected)


def test_units_stand_beside_csv_and_in_parquet(tmp_path: Path) -> None:
    path = hand_made_run(tmp_path / "run.h5")
    for form in ("csv", "parquet"):
        command.write(path, form)
        about = read(tmp_path / f"run-{form}", "columns", form).set_index(["table", "column"])
        assert about.loc[("rounds", "bytes_up")].tolist() == ["B", "sent by all clients of the cohort"]
        assert about.loc[("clients", "accuracy")].tolist() == ["1", "accuracy of the client's model on its own test shard"]
        assert about.loc[("layers", "layer"), "description"] == "name of the layer"
    field = parquet.read_schema(tmp_path / "run-parquet" / "rounds.parquet").field("bytes_up")
    assert field.metadata == {b"units": b"B", b"long_name": b"sent by all clients of the cohort"}


def test_what_was_not_measured_is_missing_and_no_not_a_number(tmp_path: Path) -> None:
    """NaN in a column of DuckDB or Arrow would make a mean NaN."""
    path = hand_made_run(tmp_path / "run.h5")
    command.write(path, "csv")
    command.write(path, "parquet")
    column = parquet.read_table(tmp_path / "run-parquet" / "rounds.parquet")["accuracy"]
    assert (column.null_count, column.to_pylist()[1]) == (1, None)
    header, _, second = (tmp_path / "run-csv" / "rounds.csv").read_text().splitlines()[:3]
    assert second.split(",")[header.split(",").index('"accuracy"')] == ""


def test_text_stays_text(tmp_path: Path) -> None:
    """A spreadsheet would take the name of the first client for a formula. The second is a number; the third has all that CSV quotes."""
    path = hand_made_run(tmp_path / "run.h5")
    command.write(path, "csv")
    command.write(path, "parquet")
    names = read(tmp_path / "run-csv", "partition", "csv").drop_duplicates("client")
    assert names["client_name"].tolist() == ["'=SUM(A1)", "-7", 'a "b", c']
    assert read(tmp_path / "run-parquet", "partition", "parquet")["client_name"].tolist()[::2] == ["=SUM(A1)", "-7", 'a "b", c']
    assert read(tmp_path / "run-csv", "clients", "csv")["client_name"].tolist()[1] == 'a "b", c'


@pytest.mark.parametrize("text", ["+1+1", "-1+1", "@A1", "\t=1", "-inf", "+1_0"])
def test_formulas_of_every_kind(tmp_path: Path, text: str) -> None:
    from fedsim_analysis.foreign_text import no_formula

    assert no_formula(text) == f"'{text}"
    assert [no_formula(plain) for plain in ("+1.5", "-3e7", "a=b", "")] == ["+1.5", "-3e7", "a=b", ""]


def test_the_job_and_the_attributes(tmp_path: Path) -> None:
    command.write(hand_made_run(tmp_path / "run.h5", peak_flops=float("inf")), "csv")
    out = tmp_path / "run-csv"
    assert (out / "job.toml").read_text() == ATTRIBUTES["job"]
    found = json.loads((out / "attributes.json").read_text(), parse_constant=pytest.fail)
    assert (found["finished"], found["rounds"], found["seed"], found["hosts"]) == (True, 3, 3, "")
    assert (found["plan"], found["partition"], found["peak_flops"]) == ({"fleet": "serial"}, {"scheme": "iid"}, None)
    assert "job" not in found
    assert "crc32" not in found


def test_a_job_of_a_former_format_has_the_present_names(tmp_path: Path) -> None:
    job = '[train]\nmu = 0.5\n[method]\nname = "fedtiny"\nstop = 4\n'
    path = hand_made_run(tmp_path / "run.h5", job=job, format_version=1)
    command.write(path, "csv")
    found = tomllib.loads((tmp_path / "run-csv" / "job.toml").read_text())
    assert found == {"train": {"fedprox_mu": 0.5}, "method": {"name": "fedtiny", "stop_round": 4}}


def test_pieces_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two rounds and of one client at once."""
    path = hand_made_run(tmp_path / "run.h5")
    for form in ("csv", "parquet"):
        command.write(path, form, tmp_path / f"whole-{form}")
    monkeypatch.setattr("fedsim_analysis.export.tables.ROWS", 2)
    for form in ("csv", "parquet"):
        command.write(path, form, tmp_path / f"pieces-{form}")
        for whole in (tmp_path / f"whole-{form}").glob(f"*.{form}"):
            pieces = read(tmp_path / f"pieces-{form}", whole.stem, form)
            pd.testing.assert_frame_equal(pieces, read(tmp_path / f"whole-{form}", whole.stem, form))
