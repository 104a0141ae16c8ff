"""Every kernel gives the same bits in the process that compiles it and in one that loads it, at every address and on any threads."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedsim.core.compiled import KEYED, PACKAGE

PROGRAM = Path(__file__).with_name("every_kernel.py")
PATIENCE = 300  # seconds; compiling all takes 30 on two cores


def start(cache: Path, **environment: str) -> dict[str, Any]:
    """What the program says."""
    given = os.environ | {"NUMBA_CACHE_DIR": str(cache)} | environment
    done = subprocess.run([sys.executable, str(PROGRAM)], env=given, capture_output=True, check=True, timeout=PATIENCE)
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The first start on a machine, and the second."""
    cache = tmp_path_factory.mktemp("cache")
    return [start(cache), start(cache)]


@pytest.mark.processes
def test_compiled_and_loaded_kernels_give_the_same_bits(starts) -> None:
    cold, warm = starts
    assert cold["loaded"] == 0
    assert warm["loaded"] > 15
    assert cold["found"] == warm["found"]
    assert not cold["unused"]


@pytest.mark.processes
@pytest.mark.parametrize("way", ["an address that ends in 4", "an address that ends in 12", "two threads"])
def test_no_bit_depends_on_addresses_or_threads(starts, way) -> None:
    for found in (one["found"] for one in starts):
        assert found[way] == found["plain"]


@pytest.mark.full
@pytest.mark.processes
@pytest.mark.skipif(platform.machine() != "x86_64", reason="these processors have other instructions")
@pytest.mark.parametrize("processor", ["nehalem", "haswell"])  # without and with vectors of eight and one rounding for a product and a sum
def test_no_bit_depends_on_the_processor(starts, processor, tmp_path) -> None:
    assert start(tmp_path, NUMBA_CPU_NAME=processor, NUMBA_CPU_FEATURES="")["found"]["plain"] == starts[1]["found"]["plain"]


def test_no_order_of_a_sum_is_left_to_the_compiler_and_all_compiled_code_is_in_the_key() -> None:
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"fastmath|fmuladd|reduce\.fadd", text), path
        if path.name != "compiled.py":
            assert not re.search(r"import.* njit|numba\.njit", text), path
        if "core.compiled import" in text and ("kernel" in text or "inlined" in text):
            assert path.relative_to(PACKAGE).parts[0] in {*KEYED, "simulation"}, path
