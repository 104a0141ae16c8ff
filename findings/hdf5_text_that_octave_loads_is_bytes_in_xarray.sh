#!/usr/bin/env bash
# No text in an HDF5 file is read by Octave's `load`, by `ncdump` and by xarray alike: each takes a form that another does not.
#
# Expected   Names along an axis, such as those of layers, are text of HDF5. One of its forms is read by everybody: of variable length, of
#            fixed length, or single characters along a second axis.
# Happens    Octave 7.3 `load -hdf5` takes text of fixed length in ASCII alone. At any other it stops with a warning, and what comes after
#            it by the alphabet is not loaded; so text at /layer hides /rounds. Soft links are followed, so they do not help.
#            Text of fixed length is bytes in xarray by h5netcdf, where `sel(layer="fc1")` finds nothing. With the attribute _Encoding xarray
#            decodes it, and then xarray by netCDF4, which has text already, raises AttributeError.
#            ncdump 4.9.0 (Debian 12) shows the first of several texts of fixed length, and NIL for the others.
# Versions   h5py 3.16.0 (HDF5 2.0.0), h5netcdf 1.8.2, xarray 2026.9.0, netCDF4 1.7.4, numpy 2.4.6, Python 3.11; Octave 7.3.0, ncdump 4.9.0.
# Seen       variable length            h5netcdf: fc1          netCDF4: fc1
#            fixed length               h5netcdf: b'fc1'       netCDF4: fc1
#            fixed length, _Encoding    h5netcdf: fc1          netCDF4: AttributeError
#            Octave, fixed length: layer and zero; variable length: nothing
# Matters    A file that is to be read by other programs has to choose. Each choice works in the program that one tries.
# Instead    Text of variable length, which the netCDF family and R read. For Octave and MATLAB a MAT file.
# Needs      Python 3.11 or later and a package index; 200 MB in a temporary folder, which is removed. Octave, where it is installed, is tried too.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check h5py==3.16.0 h5netcdf==1.8.2 xarray==2026.9.0 netCDF4==1.7.4 numpy==2.4.6
cd "$work"

cat > try.py <<'PY'
import sys

import h5netcdf
import h5py
import netCDF4
import numpy as np
import xarray

print("h5py", h5py.__version__, "h5netcdf", h5netcdf.__version__, "xarray", xarray.__version__, "netCDF4", netCDF4.__version__)
FORMS = {
    "variable length": (h5py.string_dtype(), {}),
    "fixed length": ("S6", {}),
    "fixed length, _Encoding": ("S6", {"_Encoding": "utf-8"}),
}


def second(path, engine):
    try:
        with xarray.open_dataset(path, engine=engine) as data:
            return str(data.layer.values.tolist()[1])
    except AttributeError:
        return "AttributeError"


found = []
for i, (what, (dtype, attributes)) in enumerate(FORMS.items()):
    with h5py.File(f"{i}.h5", "w") as file:
        layer = file.create_dataset("layer", data=np.array([b"conv1", b"fc1"], dtype=dtype))
        layer.make_scale("layer")
        layer.attrs.update(attributes)
        file["zero"] = np.zeros(2)
        file["zero"].dims[0].attach_scale(layer)
    found.append((second(f"{i}.h5", "h5netcdf"), second(f"{i}.h5", "netcdf4")))
    print(f"{what:<26} h5netcdf: {found[-1][0]:<12} netCDF4: {found[-1][1]}")
ok = found == [("fc1", "fc1"), ("b'fc1'", "fc1"), ("fc1", "AttributeError")]
print("as described" if ok else "CHANGED: text is read in another way")
sys.exit(not ok)
PY
"$work/venv/bin/python" try.py
if command -v octave >/dev/null; then
    for file in 0 1; do
        octave --no-gui --quiet --no-init-file --eval "try, disp(fieldnames(load('-hdf5', '$file.h5'))'), catch, end" 2>/dev/null || true
    done
fi
