"""The grammar of the keys of a tree: every prefix with its meaning and its price on the air, and every key with a name of its own."""

from __future__ import annotations

COUNT = "n/images"  # the total that weighted sums are divided by
FEDNOVA_WEIGHT = "n/weight"  # FedNova's, images or steps
FEDNOVA_PATH = "opt/steps"  # the weighted a_k, in UNITs; on the air the number of steps that it follows from, 4 bytes
FEDNOVA_MOVE = "opt/move/"  # NAME -> the weighted d_k; like all that is not in the broadcast it is summed to 2^-68
SCAFFOLD_CONTROL = "opt/control/"  # NAME -> c, in the server's memory and the broadcast
SCAFFOLD_OWN = "opt/own/"  # NAME -> c_k, kept by its client
SCAFFOLD_CHANGE = "opt/change/"  # NAME -> c_k' - c_k
EMBEDDING = "w/embedding"
VISITS = "n/visits"
ADAM_STEPS = "n/steps"  # of Adam, () float64

MARKED = "index/marked/"  # LAYER -> (K_l,) int64

FREQUENCY, MEAN_GATE, FOLDED_GATE = "own/frequency", "own/gate", "own/values"
OWN = "own/"
VARYING_CHANNELS = "n/varying"  # total: the share of channels that some of a client's images open and others do not, times its images
ACTIVE_CONVS = "n/active_convs"  # total: convolutions' multiply-adds in use, as shares of all of them, summed over images

GATE_STEPS = "gate/steps"
GATE_GRADIENT = "grad/gates"
FINE_SUM = "grad/"  # before the keys of what is summed to 2^-68

GATE = "gate/channels"
GATE_VALUES = "gate/values"  # (n,) float: what gates by the image are, where it does not depend on the image (ADP, 3.4, folded)
REAL_IMAGES = "n/real"  # (K, B), among the weights where a batch is padded


def key_of(key: str) -> str:
    """The mask of a tensor: "w/conv.weight", "opt/momentum/conv.weight" and "grad/conv.weight" all have "mask/conv.weight"."""
    prefix, _, name = key.partition("/")
    return "mask/" + (name.partition("/")[2] if prefix == "opt" else name)


FREE = ("n/", "vote/", "seed/")
PRICED = ("w/", "opt/", "buf/", "grad/", "loss/", "mask/", "top/", "index/", "gate/", "own/")


CORRECT = "n/correct"
