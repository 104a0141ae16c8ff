#!/usr/bin/env bash
# The rows of scikit-learn's load_digits lie in 14 blocks, one filled form after the other, so a random split shares handwriting.
#
# Expected   The 1,797 digits are in no order. A random fifth as test set says how well a model reads digits of people that it has not seen.
# Happens    The label sequence of the first 60 rows (0123456789 three times, then 30 fixed digits) comes back 14 times, about every
#            128 rows: the same form, filled in again. The data set's own text says that 13 people wrote it, and there is no column that
#            names them. More than half of all images have their nearest image in their own block; by chance it would be 7 %. With a
#            random split, every form is in the training part and in the test part, and the error comes out at less than a third.
# Versions   scikit-learn 1.9.1, numpy 2.4.6, scipy 1.17.1, Python 3.11.
# Seen       blocks 14, their starts 0, 130, 256, 386, 516, 646, 776, 905, 1029, 1157, 1287, 1415, 1543, 1667
#            nearest image in the same block   53 %, by chance 7 %
#            error of 1-NN, 5 folds            random 1.2 %, whole blocks 4.3 %
# Matters    The set comes with a package and needs no download, so demos and tests of federated learning use it. A new client is a new
#            hand, and a random split answers another question. The blocks are also natural clients, which most small sets lack.
# Instead    Find the blocks as this script does; deal whole blocks to clients, and hold whole blocks out (GroupKFold) to measure new clients.
# Needs      Python 3.11 or later and a package index; 350 MB in a temporary folder, which is removed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check scikit-learn==1.9.1 numpy==2.4.6 scipy==1.17.1
export OMP_NUM_THREADS=1

cat > "$work/try.py" <<'PY'
import sys

import numpy as np
import sklearn
from sklearn.datasets import load_digits
from sklearn.model_selection import GroupKFold, StratifiedKFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

bunch = load_digits()
x, y = bunch.data, bunch.target
alike = [int((y[i : i + 60] == y[:60]).sum()) for i in range(len(y) - 59)]
starts = [i for i, count in enumerate(alike) if count >= 40]  # some forms lack or double a digit, which shifts the rest
block = np.searchsorted(starts, np.arange(len(y)), side="right") - 1
nearest = NearestNeighbors(n_neighbors=2).fit(x).kneighbors(x)[1][:, 1]
same = float((block[nearest] == block).mean())
chance = float(np.mean((block[:, None] == block).sum(1) - 1) / (len(y) - 1))
model = KNeighborsClassifier(1)
random = 1 - cross_val_score(model, x, y, cv=StratifiedKFold(5, shuffle=True, random_state=0)).mean()
whole = 1 - cross_val_score(model, x, y, cv=GroupKFold(5), groups=block).mean()

print("scikit-learn", sklearn.__version__, "numpy", np.__version__)
print(len(starts), "blocks, starts", starts)
print("the text speaks of 13 people:", "different 13" in bunch.DESCR, "| keys of the set:", sorted(bunch))
print(f"nearest image in the same block: {same:.0%}, by chance {chance:.0%}")
print(f"error of 1-NN, 5 folds: random {random:.1%}, whole blocks {whole:.1%}")
as_described = len(starts) == 14 and same > 0.5 and chance < 0.1 and whole > 2 * random
print("as described" if as_described else "CHANGED: the rows are in another order")
sys.exit(not as_described)
PY
"$work/venv/bin/python" "$work/try.py"
