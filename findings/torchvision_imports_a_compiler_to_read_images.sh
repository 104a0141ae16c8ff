#!/usr/bin/env bash
# TAKES ABOUT 5.5 GB of disk for a while: this script installs torch 2.14.1 with its CUDA libraries. It needs no GPU and no other data.
#
# A class of torchvision.datasets, which reads a file of bytes, brings torch's compiler and a computer algebra system with it.
#
# Expected   Reading the images of MNIST needs little beside torch and Pillow. torch.compile is imported when something is compiled.
# Happens    `from torchvision.datasets import MNIST` imports all of torchvision; of it torchvision.ops imports torch._dynamo, which imports
#            sympy and the tracer of symbolic shapes. Importing the data set takes four fifths of what torch itself took before.
# Versions   torch 2.14.1, torchvision 0.29.1, sympy 1.14.0, numpy 2.4.6, Python 3.11.
# Seen       modules after torch            1,190, sympy and torch._dynamo not among them
#            modules that the data set adds 1,079, sympy and torch._dynamo among them
#            processor time of the import   0.8 of torch's own (it differs a little from run to run, and is not part of the check)
# Matters    Every rank of a simulator that opens a data set through torchvision starts a second (or several) later, and holds some 160 MB
#            more: thousands of ranks on a cluster, and each of many short runs of a sweep.
# Instead    Read the files without torchvision where they are on disk: IDX files are a head of 16 bytes and then the pixels, CIFAR's are pickled
#            arrays, SVHN's are MAT files. Import torchvision inside the function that downloads.
# Needs      Python 3.11 or later and a package index; one to two minutes, nearly all of them for the installation.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check torch==2.14.1 torchvision==0.29.1 sympy==1.14.0 numpy==2.4.6
export OMP_NUM_THREADS=1

cat > "$work/try.py" <<'PY'
import struct
import sys
import tempfile
import time
from pathlib import Path

begin = time.process_time()
import torch

middle, before = time.process_time(), set(sys.modules)
from torchvision.datasets import MNIST

end, added = time.process_time(), set(sys.modules) - before
heavy = ("sympy", "torch._dynamo", "torch.fx.experimental.symbolic_shapes", "torchvision.models", "torchvision.ops")

with tempfile.TemporaryDirectory() as root:
    raw = Path(root, "MNIST", "raw")
    raw.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">HBB3I", 0, 8, 3, 2, 28, 28) + bytes(2 * 28 * 28))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">HBBI", 0, 8, 1, 2) + bytes([3, 4]))
    images = MNIST(root)

import torchvision

print("torch", torch.__version__, "torchvision", torchvision.__version__)
print("images read                    ", len(images), images.targets.tolist())
print("modules after torch            ", len(before), [name for name in heavy if name in before])
print("modules that the data set adds ", len(added), [name for name in heavy if name in added])
print("processor time over torch's own", round((end - middle) / (middle - begin), 2))

as_described = len(images) == 2 and not before & set(heavy) and set(heavy) <= added and len(added) > len(before) / 2
print("as described" if as_described else "CHANGED: torchvision.datasets imports other modules")
sys.exit(not as_described)
PY
"$work/venv/bin/python" "$work/try.py"
