#!/usr/bin/env bash
# Flower's FedAvg strategy averages integer arrays to 0 and takes the union of boolean masks.
#
# Expected   Two clients with 100 and 300 images send float32 weights, an int64 counter as BatchNorm's num_batches_tracked, and a boolean
#            mask. FedAvg gives the weighted average of each: 25 and 35 for the counters, shares from 0 to 1 for the mask. At worst
#            it refuses what is not a float. The option `inplace`, which says how memory is used, changes no result.
# Happens    With inplace=True, the default, the share of a client (0.25, 0.75) is cast to the type of the array first. For integers it
#            becomes 0, and so does the average. For booleans it becomes True, multiplication becomes AND, addition becomes OR: the
#            new mask is the union of all masks. With inplace=False the same call gives the average, in float64.
# Versions   flwr 1.42.0 (flwr.server.strategy.FedAvg), numpy 2.4.6, Python 3.11.
# Seen                          inplace=True (default)          inplace=False
#            weight  float32    [2.5, 2.5]                      [2.5, 2.5]
#            counter int64      [0, 0]                          [25.0, 35.0] float64
#            mask    bool       [True, True, False]             [1.0, 0.25, 0.0] float64
# Matters    The usual client sends all values of state_dict(), the counters of BatchNorm among them. A BatchNorm with momentum=None
#            divides by that counter, so its running mean restarts every round. In federated pruning, clients of one sparse
#            model send their masks in the same list: the global mask grows to the union, and the density target is missed.
# Instead    Send floats only, and keep counters and masks out of the list; or use FedAvg(inplace=False) and cast or threshold afterwards.
# Needs      Python 3.11 or later and a package index; 300 MB in a temporary folder, which is removed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check flwr==1.42.0 numpy==2.4.6
export OMP_NUM_THREADS=1

cat > "$work/try.py" <<'PY'
import logging
import sys
import warnings
from importlib.metadata import version

import numpy as np

warnings.simplefilter("ignore")
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays  # noqa: E402
from flwr.server.client_proxy import ClientProxy  # noqa: E402
from flwr.server.strategy import FedAvg  # noqa: E402

logging.getLogger("flwr").setLevel(logging.ERROR)


class Client(ClientProxy):
    """Stands for a client; the strategy only asks for its results."""

    def get_properties(self, *args):
        raise NotImplementedError

    get_parameters = fit = evaluate = reconnect = get_properties


def result(name, images, weight, counter, mask):
    arrays = [np.array(weight, np.float32), np.array(counter, np.int64), np.array(mask, bool)]
    return Client(name), FitRes(Status(Code.OK, ""), ndarrays_to_parameters(arrays), images, {})


def averaged(inplace):
    results = [
        result("a", 100, [1, 1], [10, 20], [True, True, False]),
        result("b", 300, [3, 3], [30, 40], [True, False, False]),
    ]
    return parameters_to_ndarrays(FedAvg(inplace=inplace).aggregate_fit(1, results, [])[0])


print("flwr", version("flwr"), "numpy", np.__version__)
in_place, other = averaged(True), averaged(False)
for name, x, y in zip(("weight", "counter", "mask"), in_place, other, strict=True):
    print(f"{name:8} inplace=True {x.dtype} {x.tolist()}   inplace=False {y.dtype} {y.tolist()}")
as_described = (
    in_place[0].tolist() == other[0].tolist() == [2.5, 2.5]
    and in_place[1].tolist() == [0, 0]
    and in_place[2].tolist() == [True, True, False]
    and other[1].tolist() == [25, 35]
    and other[2].tolist() == [1, 0.25, 0]
)
print("as described" if as_described else "CHANGED: FedAvg treats integers or booleans in another way")
sys.exit(not as_described)
PY
"$work/venv/bin/python" "$work/try.py"
