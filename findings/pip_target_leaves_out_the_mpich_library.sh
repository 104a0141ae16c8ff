#!/usr/bin/env bash
# `pip install --target` of an MPI wheel installs the launcher and leaves out the library, without a warning.
#
# Expected   `pip install --target DIR mpich` gives a folder with all that the wheel holds: bin/mpiexec and lib/libmpi.so, as
#            `--prefix DIR` does. A folder of its own is the natural place for a second MPI, since all MPIs call their library libmpi.
# Happens    bin/ and include/ arrive, lib/ does not: pip installs into a temporary home and then moves the folders that it knows. A
#            lib/ of data stands there beside lib/python, and is removed with the temporary home. pip ends with 0 and says nothing.
# Versions   mpich wheel 5.0.2, pip 25.3, Python 3.11.
# Seen       --target: mpiexec yes, libmpi no.   --prefix: mpiexec yes, libmpi yes.
# Matters    mpiexec of that folder runs and starts processes, and only the program that is started says that there is no libmpi, or
#            worse, finds the one of another MPI and runs as N single ranks.
# Instead    `pip install --prefix DIR mpich`, or a virtual environment of its own; look for lib/libmpi.so afterwards.
# Needs      Python 3.11 or later and a package index; 200 MB in a temporary folder, which is removed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install -qq pip==25.3
pip install -qq --no-deps --target "$work/target" mpich==5.0.2
pip install -qq --no-deps --prefix "$work/prefix" mpich==5.0.2
found() {  # whether a folder holds what matches a name
    if compgen -G "$1" > /dev/null; then echo yes; else echo no; fi
}
seen=""
for way in target prefix; do
    answer="mpiexec $(found "$work/$way/bin/mpiexec"), libmpi $(found "$work/$way/lib/libmpi.so*")"
    echo "--$way: $answer"
    seen="$seen$way: $answer; "
done
pip --version | cut -d' ' -f1,2
if [ "$seen" = "target: mpiexec yes, libmpi no; prefix: mpiexec yes, libmpi yes; " ]; then
    echo "as described"
else
    echo "CHANGED: --target and --prefix install other files than before"; exit 1
fi
