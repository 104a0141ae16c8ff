"""The grammar of the keys of a tree. This file alone knows it; everything else asks here.

A key is `PREFIX/NAME`. The prefix says what the tensor is and what it costs on the air (`costs.communication` counts):

| prefix | what it is | bytes on the air |
|---|---|---|
| `w/` | a weight of the model, `w/conv1.weight` | 4 · ones of its mask (or of the gate, see `Work.compact`), 4 · size without one |
| `buf/` | running statistics of a norm, and other buffers | 4 · size |
| `mask/` | (bool) which entries of the weight of the same name are kept | the cheapest of 4 · changed, 4 · ones, ⌈N / 8⌉; all ones: 0 |
| `gate/` | (n,) gates of channels: hard (bool) or soft (float) | ⌈n / 8⌉ a row when hard, 4 · n when soft |
| `opt/` | state of an optimiser or an aggregation, `opt/momentum/conv1.weight` | as `w/` |
| `grad/` `loss/` `own/` | gradients, sums of losses or scores, what a client keeps of its own (it does not travel) | 4 · size |
| `byte/` `scale/` | a tensor in 8 bits an entry (uint8), `byte/w/conv1.weight`; its unit and the entry that is 0, (2,) | size; 4 · size |
| `top/` `index/` | largest entries and their positions; positions | 4 · size (int32, float32) |
| `n/` | counts: a few numbers beside the rest | 0 up to 16 numbers; 4 · size for more |
| `vote/` `seed/` | counts and keys of randomness, which the receiver knows or can compute | 0 |
"""

from __future__ import annotations

# ---- prefixes
WEIGHTS = "w/"
BUFFERS = "buf/"
MASKS = "mask/"
GATES = "gate/"
OPTIMISER = "opt/"
MOMENTUM, FIRST_MOMENT, SECOND_MOMENT = "opt/momentum/", "opt/first/", "opt/second/"  # of SGD; of Adam
GRADIENTS = "grad/"  # summed over the cohort to 2^-68, whatever their size
LOSSES = "loss/"
OWN = "own/"
TOP = "top/"
TOP_INDEX = "top/index"  # of these, the positions
INDICES = "index/"
COUNTS = "n/"
VOTES = "vote/"
BYTES, SCALES = "byte/", "scale/"
SEEDS = "seed/"

FREE = (COUNTS, VOTES, SEEDS)
PRICED = (WEIGHTS, OPTIMISER, BUFFERS, GRADIENTS, LOSSES, MASKS, TOP, INDICES, GATES, OWN, BYTES, SCALES)
KNOWN = PRICED + FREE

# ---- what clients count
COUNT = "n/images"  # total: the divisor of weighted sums; () float64
CORRECT = "n/correct"  # total: images classified correctly
LOSS_SUM = "loss/sum"  # total: the loss summed over images
CORRECT_IMAGES = "n/correct_images"  # each: (images,) 1 where an image is classified correctly
LOSS_IMAGES = "loss/images"  # each: (images,) its loss
ADAM_STEPS = "n/steps"  # () float64
REAL_IMAGES = "n/real"  # (K, B), handed over beside the weights where a batch is padded
VISITS = "n/visits"  # of a client to the server's hypernetworks
EPOCHS_DONE = "n/epochs"  # that a client trained in all its visits
NONZERO = "n/nonzero"  # each: weights of a client that are not 0

# ---- aggregation
FEDNOVA_WEIGHT = "n/weight"  # images or steps, by train.fednova_weights
FEDNOVA_PATH = "opt/steps"  # the weighted a_k; on the air the number of steps that it follows from, 4 bytes
FEDNOVA_MOVE = "opt/move/"  # NAME -> the weighted d_k; like all that is not in the broadcast it is summed to 2^-68
SCAFFOLD_CONTROL = "opt/control/"  # NAME -> c, in the server's memory and the broadcast
SCAFFOLD_OWN = "opt/own/"  # NAME -> c_k, kept by its client
SCAFFOLD_CHANGE = "opt/change/"  # NAME -> c_k' - c_k
SCAFFOLD_SINCE = "n/since/"  # NAME -> since which turn a weight is kept without a break, int32; -1: pruned
SCAFFOLD_TURN = "n/turn"  # () int64: which training of a cohort this is, from 0
SCAFFOLD_VISIT = "n/visit"  # () int64: the turn of a client's last visit

# ---- gates and hypernetworks
GATE = "gate/channels"  # (n,) the gates of a network, hard or soft
GATE_VALUES = "gate/values"  # (n,) float: constants in the place of dynamic gates (ADP, 3.4, folded)
GATE_STEPS = "gate/steps"  # (S, n): the gates of every step
GATE_GRADIENT = "grad/gates"
BASE_NETWORK, CLIENT_NETWORK, EMBEDDING = "w/base/", "w/client/", "w/embedding"  # theta_b, theta_d, the embedding of a client
SEED_KEYS, SEED_DRAW, SEED_BASE = "seed/keys", "seed/z", "seed/base"
TARGET = "n/target"  # p_d of a client
ENERGY = "loss/energy"  # (n,) total: sum of |activation|^power of every channel

# ---- channel frequency (ADP) and marked weights (FedMef)
FREQUENCY, MEAN_GATE, FOLDED_GATE = "own/frequency", "own/gate", "own/values"
FREQUENCY_SUM, GATE_SUM = "loss/frequency", "loss/gate"
VARYING_CHANNELS = "n/varying"  # total: share of channels that some of a client's images open and others do not, times its images
ACTIVE_CONVS = "n/active_convs"  # total: convolutions' multiply-adds in use, as shares of all of them, summed over images
MARKED = "index/marked/"  # LAYER -> (K_l,) int64

SELECTED = "n/selected"  # () bool, each: where it is False, nothing of the client's report travels
THRESHOLD, LAST_LOSS = "own/threshold", "loss/last"  # () of a client's last upload, and of its last batch

# ---- nested widths (HeteroFL)
WIDTH_RATE = "n/rate"  # () float64: r_k, of which a client's gate follows
OWNED_CLASSES = "n/classes"  # (classes,) bool: of which a client has training images
COVER = "n/cover/"  # KEY -> total: the clients that have an entry of this tensor, by their weight in the mean

WORKED_OUT = (SCAFFOLD_SINCE, COVER)  # under n/, of the size of a weight, and free: it follows from masks and rates that are paid for


def weight(layer: str) -> str:
    """The key of a layer's weight.

    >>> weight("conv1")
    'w/conv1.weight'
    """
    return f"{WEIGHTS}{layer}.weight"


def mask(layer: str) -> str:
    """The key of a layer's mask.

    >>> mask("conv1")
    'mask/conv1.weight'
    """
    return f"{MASKS}{layer}.weight"


def gradient(layer: str) -> str:
    """The key of the dense gradient of a layer's weight."""
    return f"{GRADIENTS}{layer}.weight"


def score(layer: str) -> str:
    """The key of the scores of a layer's weights, which clients send.

    >>> score("conv1")
    'loss/score/conv1.weight'
    """
    return f"{LOSSES}score/{layer}.weight"


def gain(layer: str) -> str:
    """The key of the gain of a normalised convolution."""
    return f"{WEIGHTS}{layer}.gain"


def removed(layer: str) -> str:
    """The key of what cuts removed from the sums of a standardised convolution's filters."""
    return f"{BUFFERS}{layer}.removed"


def top_index(layer: str) -> str:
    """The key of the positions of a layer's largest entries."""
    return f"{TOP}index/{layer}"


def top_value(layer: str) -> str:
    """The key of the values of a layer's largest entries."""
    return f"{TOP}value/{layer}"


def name_of(key: str) -> str:
    """The key without its prefix: the tensor's name in the module. `opt/KIND/` counts as one prefix.

    >>> name_of("opt/momentum/conv1.weight")
    'conv1.weight'
    """
    prefix, _, name = key.partition("/")
    return name.partition("/")[2] if prefix == "opt" else name


def layer_of(key: str) -> str:
    """The layer whose weight, mask, gradient or momentum the key names.

    >>> layer_of("mask/layer1.0.conv1.weight")
    'layer1.0.conv1'
    """
    return name_of(key).removesuffix(".weight")


def mask_of(key: str) -> str:
    """The key of the mask that belongs to a weight, a gradient or a momentum.

    >>> mask_of("w/conv1.weight"), mask_of("opt/momentum/conv1.weight")
    ('mask/conv1.weight', 'mask/conv1.weight')
    """
    return MASKS + name_of(key)


def weight_of(key: str) -> str:
    """The key of the weight that belongs to a mask, a gradient or a momentum.

    >>> weight_of("mask/conv1.weight")
    'w/conv1.weight'
    """
    return WEIGHTS + name_of(key)
