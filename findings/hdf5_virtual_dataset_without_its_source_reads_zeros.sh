#!/usr/bin/env bash
# A virtual dataset of HDF5 whose source file is missing is read as zeros, without an error; so is one whose source has another name.
#
# Expected   A virtual dataset joins arrays of several files, such as the images of several sites. When one of the files was not
#            copied, reading the images of this site raises an error, as opening the missing file does.
# Happens    HDF5 reads the fill value, 0, in the place of every missing part. h5py, h5netcdf and xarray hand it on; shape and dtype
#            are as declared. The same happens when the file is there and its dataset has another name. The share of the data that is
#            missing can be seen by comparing with `virtual_sources()` alone.
# Versions   h5py 3.16.0 (HDF5 2.0.0), h5netcdf 1.8.2, xarray 2026.9.0, numpy 2.4.6, Python 3.11.
# Seen       all sources there      mean of site 1: 100.0, of site 2: 200.0   xarray: 200.0
#            site 2 not copied      mean of site 1: 100.0, of site 2: 0.0   xarray: 0.0
#            site 2 under "images"  mean of site 1: 100.0, of site 2: 0.0   xarray: 0.0
# Matters    Federated data lie in a file for each site, and a virtual dataset is the usual way to make one of them. A set that was
#            moved without one of its files trains on black images of whole clients, with the right labels, and ends with an accuracy
#            that looks like a hard partition.
# Instead    Look at every entry of `virtual_sources()` before reading: whether the file is there, and the dataset in it.
# Needs      Python 3.11 or later and a package index; 200 MB in a temporary folder, which is removed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check h5py==3.16.0 h5netcdf==1.8.2 xarray==2026.9.0 numpy==2.4.6
cd "$work"

cat > try.py <<'PY'
import sys
from pathlib import Path

import h5netcdf
import h5py
import numpy as np
import xarray

print("h5py", h5py.__version__, "HDF5", h5py.version.hdf5_version, "h5netcdf", h5netcdf.__version__, "xarray", xarray.__version__)
layout = h5py.VirtualLayout((2, 4, 3), "u1")
for site in (1, 2):
    with h5py.File(f"site{site}.h5", "w") as file:
        file["x"] = np.full((4, 3), 100 * site, np.uint8)
    layout[site - 1] = h5py.VirtualSource(f"site{site}.h5", "x", (4, 3))
with h5py.File("all.h5", "w") as file:
    file.create_virtual_dataset("x", layout)


def means():
    with h5py.File("all.h5") as file:
        by_h5py = [float(site.mean()) for site in file["x"][()]]
    with xarray.open_dataset("all.h5", engine="h5netcdf", phony_dims="sort") as data:
        return by_h5py, float(data.x[1].mean())


found = {"all sources there": means()}
Path("site2.h5").rename("kept.h5")
found["site 2 not copied"] = means()
with h5py.File("kept.h5") as old, h5py.File("site2.h5", "w") as new:
    new["images"] = old["x"][()]
found['site 2 under "images"'] = means()
for what, ((one, two), other) in found.items():
    print(f"{what:<22} mean of site 1: {one}, of site 2: {two}   xarray: {other}")
ok = list(found.values()) == [([100.0, 200.0], 200.0), ([100.0, 0.0], 0.0), ([100.0, 0.0], 0.0)]
print("as described" if ok else "CHANGED: what is missing is read in another way")
sys.exit(not ok)
PY
"$work/venv/bin/python" try.py
