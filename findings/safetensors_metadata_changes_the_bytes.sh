#!/usr/bin/env bash
# safetensors writes other bytes each time for the same tensors, once the metadata has more than one entry.
#
# Expected   save(tensors, metadata) is called 20 times in one process on the same two dictionaries. The 20 results are equal, byte for
#            byte, so a SHA-256 of the file names its content. Tensors are sorted by the format, which supports this.
# Happens    The library keeps the metadata in a hash map whose order is drawn anew for each call. With six entries nearly every
#            call writes another header. The tensors and the size of the file stay the same. Without metadata, or with one
#            entry, all results are equal: a test with one entry does not find it.
# Versions   safetensors 0.8.0, numpy 2.4.6, Python 3.11.
# Seen       no metadata  1 distinct file of 20      1 entry  1 of 20      6 entries  19 of 20 (by chance)
#            6 entries as one JSON text  1 of 20     sizes  one
# Matters    Rounds, seeds and mask densities are put into this metadata. Then a checkpoint that is compared by its hash "changed"
#            although a resumed run is equal to the bit, caches and stores that find equal files by hash keep every copy, and a
#            published hash cannot be made again.
# Instead    Hash the tensors and not the file; or put all metadata into one entry, as JSON with sorted keys; or keep it in a file of its own.
# Needs      Python 3.11 or later and a package index; 100 MB in a temporary folder, which is removed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
export OMP_NUM_THREADS=1

cat > "$work/try.py" <<'PY'
import json
import sys
from hashlib import sha256

import numpy as np
import safetensors
from safetensors.numpy import load, save

tensors = {"fc.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "fc.bias": np.zeros(2, np.float32)}
six = {"round": "12", "seed": "0", "density": "0.1", "method": "magnitude", "clients": "100", "dataset": "digits"}
cases = {
    "no metadata": None,
    "1 entry": {"round": "12"},
    "6 entries": six,
    "6 entries as one JSON text": {"about": json.dumps(six, sort_keys=True)},
}

print("safetensors", safetensors.__version__, "numpy", np.__version__)
distinct = {}
for name, metadata in cases.items():
    files = [save(tensors, metadata) for _ in range(20)]
    distinct[name] = len({sha256(file).hexdigest() for file in files})
    same_size = len({len(file) for file in files}) == 1
    same_tensors = all(np.array_equal(load(file)[key], tensors[key]) for file in files for key in tensors)
    print(f"{name:27} {distinct[name]:2} distinct of 20; one size: {same_size}; equal tensors: {same_tensors}")
as_described = distinct["6 entries"] > 1 and all(count == 1 for name, count in distinct.items() if name != "6 entries")
print("as described" if as_described else "CHANGED: the bytes no longer depend on the call")
sys.exit(not as_described)
PY
"$work/venv/bin/python" "$work/try.py"
