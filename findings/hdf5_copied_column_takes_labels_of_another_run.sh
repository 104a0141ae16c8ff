#!/usr/bin/env bash
# An HDF5 group that is copied into the file of another run keeps its labels, but its column points at the labels of the other run.
#
# Expected   Two run files have the same layout: a group with a dimension scale "round" and a column "loss" attached to it. h5py's
#            Group.copy copies the whole group of run B into the file of run A. The copied column is attached to the copied scale, as
#            both came along in one call.
# Happens    The attachment is an object reference, which is a place in the file. The copy keeps the place and not the object. In a file
#            with the same layout, run A's own scale stands at that place: loss.dims[0] of run B gives the rounds of run A. No error is
#            raised, and expand_refs=True changes nothing. h5netcdf finds the scale by its name instead and gives B's rounds, so two readers
#            of one file disagree. In a file with another layout, the reference leads to nothing and both readers raise an error.
# Versions   h5py 3.16.0, h5netcdf 1.8.2, numpy 2.4.6, Python 3.11.
# Seen       rounds of B in its own file       [100, 200, 300]   scale /run/round
#            after the copy, by h5py           [0, 1, 2]         scale /run/round, which is A's
#            after the copy, by h5netcdf       [100, 200, 300]
#            attached again, by h5py           [100, 200, 300]   scale /other/round
# Matters    Sweeps write one file per run, all in one layout, and are merged into one file for the archive. This is the case in which the
#            wrong labels come without an error. A curve over rounds or clients is then drawn over the axis of the first run.
# Instead    After the copy, delete DIMENSION_LIST of the columns and REFERENCE_LIST of the scale, and attach the copied scale again;
#            or keep one file per run, or use external links.
# Needs      Python 3.11 or later and a package index; 150 MB in a temporary folder, which is removed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check h5py==3.16.0 h5netcdf==1.8.2 numpy==2.4.6
export OMP_NUM_THREADS=1

cat > "$work/try.py" <<'PY'
import sys
from pathlib import Path

import h5netcdf
import h5py
import numpy as np

folder = Path(sys.argv[1])


def make(name, rounds):
    with h5py.File(folder / name, "w") as file:
        group = file.create_group("run")
        scale = group.create_dataset("round", data=np.array(rounds))
        scale.make_scale("round")
        group.create_dataset("loss", data=np.ones(len(rounds))).dims[0].attach_scale(scale)


def by_h5py(name, group):
    """The labels of the column, and where they stand."""
    with h5py.File(folder / name) as file:
        scale = file[group]["loss"].dims[0][0]
        return scale[:].tolist(), scale.name


def by_h5netcdf(name, group):
    with h5netcdf.File(folder / name) as file:
        return file[group][file[group]["loss"].dimensions[0]][:].tolist()


def merge(expand):
    make("A.h5", [0, 1, 2])
    make("B.h5", [100, 200, 300])
    with h5py.File(folder / "B.h5") as b, h5py.File(folder / "A.h5", "a") as a:
        b.copy("run", a, name="other", expand_refs=expand)


print("h5py", h5py.__version__, "HDF5", h5py.version.hdf5_version, "h5netcdf", h5netcdf.__version__, "numpy", np.__version__)
merge(expand=True)
expanded = by_h5py("A.h5", "other")
merge(expand=False)
before, after, named = by_h5py("B.h5", "run"), by_h5py("A.h5", "other"), by_h5netcdf("A.h5", "other")
with h5py.File(folder / "A.h5", "a") as file:
    column, scale = file["other/loss"], file["other/round"]
    del column.attrs["DIMENSION_LIST"], scale.attrs["REFERENCE_LIST"]
    column.dims[0].attach_scale(scale)
again = by_h5py("A.h5", "other")
print("rounds of B in its own file  ", *before)
print("after the copy, by h5py      ", *after)
print("  with expand_refs=True      ", *expanded)
print("after the copy, by h5netcdf  ", named)
print("attached again, by h5py      ", *again)
as_described = after == expanded == ([0, 1, 2], "/run/round") and named == before[0] and again == ([100, 200, 300], "/other/round")
print("as described" if as_described else "CHANGED: the copied column points elsewhere")
sys.exit(not as_described)
PY
"$work/venv/bin/python" "$work/try.py" "$work"
