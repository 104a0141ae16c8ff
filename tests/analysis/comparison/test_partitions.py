"""What a table says of the partitions over whose seeds it has an interval."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from compared_runs import write
from fedsim_analysis.comparison import collect
from fedsim_analysis.comparison.printed.remarks import ONE_PARTITION, OWN_PARTITIONS, drawn

CASES: dict[str, tuple[Mapping[str, list[str]], str]] = {
    "one each": ({"fedavg": ["a", "b", "c"], "fedprox": ["a", "b"]}, OWN_PARTITIONS),
    "one for all": ({"fedavg": ["a", "a"], "fedprox": ["b", "b"]}, ONE_PARTITION),
    "one for two of three seeds": ({"fedavg": ["a", "a", "b"]}, ""),
    "rows that differ in this": ({"fedavg": ["a", "b"], "fedprox": ["a", "a"]}, ""),
    "files that do not say": ({"fedavg": ["", ""]}, ""),
    "one seed": ({"fedavg": ["a"], "fedprox": ["a"]}, ""),
    "one row of one seed": ({"fedavg": ["a", "b"], "fedprox": ["a"]}, OWN_PARTITIONS),
}


@pytest.mark.parametrize("name", CASES)
def test_the_remark_says_what_the_files_have(name: str, tmp_path: Path) -> None:
    rows, said = CASES[name]
    runs = [
        write(tmp_path / f"{method}-{seed}.h5", method, seed, partition_sha256=known)
        for method, each in rows.items()
        for seed, known in enumerate(each)
    ]
    assert drawn(collect(runs)) == said
