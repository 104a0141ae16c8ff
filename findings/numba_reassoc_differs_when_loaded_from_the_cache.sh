#!/usr/bin/env bash
# A numba kernel with fastmath "reassoc" gives other bits in the process that compiles it than in every later one that loads it from the cache.
#
# Expected   cache=True saves the time to compile and changes nothing else: the same code on the same machine gives the same bits.
# Happens    row_means calls total; both have cache=True and fastmath={"reassoc", "nsz", "contract"}. On the first start, which compiles
#            them, row_means gives what total gives when Python calls it. On later starts row_means gives other last bits,
#            while total gives those of the first start still. So the cached row_means holds a copy of total with another order of
#            the additions. No warning is given. Without fastmath both starts give the same bits.
# Versions   numba 0.68.1, llvmlite 0.50.0, numpy 2.4.6, Python 3.11, x86-64 with AVX-512. Rows of 64, 640 and 5000 float32.
# Seen       means of 4 rows of 64, as bytes
#            start 1, compiled   row_means 93cc883dd7ac6b3d757db1bd0289f6bc   total 93cc883dd7ac6b3d757db1bd0289f6bc
#            start 2, loaded     row_means 93cc883dd6ac6b3d767db1bd0089f6bc   total 93cc883dd7ac6b3d757db1bd0289f6bc
#            start 3 is as start 2. Without fastmath all three starts agree.
# Matters    A simulation that promises equal weights for equal seeds breaks its promise once, on the first start on each machine, and where
#            some ranks compile and others find the cache, ranks of one run compute with different bits.
# Instead    Write the order of the sum down (accumulators of your own, added in a written order), and leave "reassoc" away. fma
#            can be asked for by the intrinsic llvm.fma; "contract" leaves it to the compiler.
# Needs      Python 3.11 or later and a package index; 300 MB in a temporary folder, which is removed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check numba==0.68.1 llvmlite==0.50.0 numpy==2.4.6
export OMP_NUM_THREADS=1

cat > "$work/kernels.py" <<'PY'
import os

import numpy as np
from numba import njit

LANES = {"reassoc", "nsz", "contract"} if os.environ["FAST"] == "1" else False


@njit(cache=True, fastmath=LANES)
def total(values):
    whole = 0.0
    for begin in range(0, values.size, 4096):
        part = np.float32(0)
        for k in range(begin, min(begin + 4096, values.size)):
            part += values[k]
        whole += part
    return whole


@njit(cache=True, fastmath=LANES)
def row_means(x, out):
    for c in range(x.shape[0]):
        out[c] = total(x[c]) / x.shape[1]
PY

cat > "$work/start.py" <<'PY'
import sys

import llvmlite
import numba
import numpy as np
from kernels import row_means, total

found = []
for n in (64, 640, 5000):
    x = np.random.default_rng(0).standard_normal((4, n)).astype(np.float32)
    out = np.empty(4, np.float32)
    row_means(x, out)
    direct = np.array([total(row) / n for row in x], np.float32)
    found.append([out.tobytes().hex(), direct.tobytes().hex()])
loaded = bool(row_means.stats.cache_hits)
print("numba", numba.__version__, "llvmlite", llvmlite.__version__, "numpy", np.__version__, file=sys.stderr)
for n, (means, direct) in zip((64, 640, 5000), found):
    print("loaded  " if loaded else "compiled", f"n = {n:4}  row_means {means}  total {direct}", file=sys.stderr)
print(loaded, *sum(found, []))
PY

start() { FAST=$1 NUMBA_CACHE_DIR="$work/cache$1" "$work/venv/bin/python" "$work/start.py"; }
for fast in 0 1; do
    echo "fastmath: $fast" >&2
    for number in 1 2 3; do start $fast > "$work/seen$fast$number"; done
done

"$work/venv/bin/python" - "$work" <<'PY'
import sys
from pathlib import Path

seen = {(f, s): Path(sys.argv[1], f"seen{f}{s}").read_text().split() for f in "01" for s in "123"}
loads = all([seen[f, s][0] for s in "123"] == ["False", "True", "True"] for f in "01")
plain = seen["0", "1"][1:] == seen["0", "2"][1:] == seen["0", "3"][1:]
first, second, third = (seen["1", s][1:] for s in "123")
differ = all(one != other for one, other in zip(first[::2], second[::2]))
total_stays = first[1::2] == second[1::2] and first[::2] == first[1::2]
as_described = loads and plain and differ and total_stays and second == third
print("as described" if as_described else "CHANGED: a loaded kernel and a compiled one agree, or differ in another way")
sys.exit(not as_described)
PY
