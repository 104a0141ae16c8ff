#!/usr/bin/env bash
# In a numba kernel, uint64 and a plain integer give a signed int64, so a hash that is right in NumPy draws other numbers.
#
# Expected   h is a uint64 from an array. h % 10, h // 10 and (h + 1) >> 32 give the same number in NumPy 2, where a plain Python integer
#            takes the type of h, and in a numba kernel, where the same code is compiled.
# Happens    numba gives h + 1, h ^ 1, h % 10 and h // 10 the type int64. From 2**63 on, h counts as negative: the remainder
#            is another one, the quotient is negative, and a later >> copies the sign. No warning is given. h >> 1 alone stays
#            uint64 and is right, so part of a hash looks right. A whole array + 1 gives a third answer: float64, which
#            drops the low bits.
# Versions   numba 0.68.1, llvmlite 0.50.0, numpy 2.4.6, Python 3.11. h = 2**63 + 12345.
# Seen       code              NumPy                   numba
#            h % 10            3                       7
#            h // 10           922337203685478815      -922337203685476347
#            (h + 1) >> 32     2147483648              -2147483648
#            h >> 1            4611686018427394076     4611686018427394076
#            dtype of array + 1   uint64               float64
#            h % 100 of 10,000 hashes: 5,010 differ
# Matters    Simulators draw clients, samples and masks from a 64-bit hash of (seed, round, client), so that a run does not depend on
#            the number of ranks. About half of all hashes are 2**63 or more. The NumPy path and the numba path then
#            choose other clients, and both look random.
# Instead    Give every constant and every counter the type of the hash: h % np.uint64(10), h + np.uint64(k). Then the results are equal.
# Needs      Python 3.11 or later and a package index; 300 MB in a temporary folder, which is removed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check numba==0.68.1 llvmlite==0.50.0 numpy==2.4.6
export OMP_NUM_THREADS=1

cat > "$work/try.py" <<'PY'
import sys

import llvmlite
import numba
import numpy as np

hashes = np.random.default_rng(0).integers(0, 2**64, 10_000, dtype=np.uint64)
hashes[0] = 2**63 + 12345


def remainder(a, i):
    return a[i] % 10


def quotient(a, i):
    return a[i] // 10


def added_then_shifted(a, i):
    return (a[i] + 1) >> 32


def shifted(a, i):
    return a[i] >> 1


def array_plus_one(a):
    return a + 1


def clients(a):
    out = np.empty(len(a), np.int64)
    for i in range(len(a)):
        out[i] = a[i] % 100
    return out


def clients_typed(a):
    out = np.empty(len(a), np.int64)
    for i in range(len(a)):
        out[i] = a[i] % np.uint64(100)
    return out


print("numba", numba.__version__, "llvmlite", llvmlite.__version__, "numpy", np.__version__, "| h =", hashes[0])
differs = {}
for name, function in (("h % 10", remainder), ("h // 10", quotient), ("(h + 1) >> 32", added_then_shifted), ("h >> 1", shifted)):
    plain, compiled = int(function(hashes, 0)), int(numba.njit(function)(hashes, 0))
    differs[name] = plain != compiled
    print(f"{name:14}  NumPy {plain:20}   numba {compiled:20}")
types = [str(f(hashes).dtype) for f in (array_plus_one, numba.njit(array_plus_one))]
print("array + 1       NumPy", types[0], "  numba", types[1])
wrong = int((clients(hashes) != numba.njit(clients)(hashes)).sum())
typed = int((clients(hashes) != numba.njit(clients_typed)(hashes)).sum())
print(f"h % 100 of {len(hashes)} hashes: {wrong} differ; h % np.uint64(100): {typed} differ")
as_described = list(differs.values()) == [True, True, True, False] and types == ["uint64", "float64"] and wrong > 4000 and typed == 0
print("as described" if as_described else "CHANGED: numba types these expressions in another way")
sys.exit(not as_described)
PY
"$work/venv/bin/python" "$work/try.py"
