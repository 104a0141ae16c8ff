"""Names of format 1, and what they are called since format 2: old run files are read under the new names.

The tables are those of `fedsim_analysis`, which imports nothing of fedsim. Jobs under old names are refused with the new name, so that a
field means one thing.
"""

from __future__ import annotations

from typing import Any

import tomli_w
from fedsim_analysis import checked
from fedsim_analysis.former_names import COLUMNS, FLEETS, GROUPS, METHODS, SECTIONS, fields_of, renamed
from fedsim_analysis.former_names import job as table_of_job

__all__ = ["COLUMNS", "FLEETS", "GROUPS", "METHODS", "SECTIONS", "fields_of", "job", "partition", "plan", "renamed"]

PLAN = {"stacked": "packed_conv"}


def job(text: str) -> str:
    """A resolved job of format 1 under the names of format 2."""
    return tomli_w.dumps(table_of_job(checked.from_toml(text)))


def plan(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of an execution plan of format 1 under the names of format 2."""
    return renamed(values, PLAN) | ({"fleet": FLEETS.get(values["fleet"], values["fleet"])} if "fleet" in values else {})


def partition(record: dict[str, Any]) -> dict[str, Any]:
    """The record of a partition, its parameters under the names of format 2. Its hash stays: it was taken over the old names."""
    return record | ({"parameters": renamed(record["parameters"], SECTIONS["partition"])} if "parameters" in record else {})
