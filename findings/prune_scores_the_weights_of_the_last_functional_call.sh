#!/usr/bin/env bash
# TAKES ABOUT 5.5 GB of disk for a while: this script installs torch 2.14.1 with its CUDA libraries. It needs no GPU and no other data.
#
# torch.nn.utils.prune after torch.func.functional_call: the next pruning step ranks the weights of the other model that was passed in.
#
# Expected   functional_call(net, weights, x) computes with other weights for this one call and leaves net as it was. So
#            prune.l1_unstructured(net, ...) drops the smallest weight of net, whatever was computed before.
# Happens    A pruned layer holds weight_orig and weight_mask; its attribute `weight` is no parameter but their product, written by a
#            hook before each forward. functional_call swaps weight_orig and puts it back, but the hook has written `weight` from the
#            swapped values, and nothing puts that back. The next pruning step scores `weight`. After a call with the weights
#            of a client it prunes by the client's values: another mask, and no error. After a call under vmap, `weight` is a tensor
#            that left its vmap, and every use of it raises RuntimeError.
# Versions   torch 2.14.1, numpy 2.4.6, Python 3.11.
# Seen       net 1, 2, 3, masked 1 0 1; client 9, 9, 0.1
#            net.weight before                [[1.0, 0.0, 3.0]]
#            after functional_call            [[9.0, 0.0, 0.1]]     weight_orig [[1.0, 2.0, 3.0]]
#            next mask, without the call      [[0.0, 0.0, 1.0]]     drops 1, the smallest of net
#            next mask, after the call        [[1.0, 0.0, 0.0]]     drops 3, the largest of net
#            next step after a vmap           RuntimeError
# Matters    A simulator keeps one module and gives it the weights of each client by functional_call, or of all clients by vmap. A global
#            magnitude pruning step on the server then prunes by the last client of the round, and the order of clients decides.
# Instead    Run one forward of the net itself before pruning; or keep masks as tensors of your own; or use
#            torch.nn.utils.parametrize, which computes `weight` at each access and stays right.
# Needs      Python 3.11 or later and a package index; one to two minutes, nearly all of them for the installation.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile --disable-pip-version-check torch==2.14.1 numpy==2.4.6
export OMP_NUM_THREADS=1

cat > "$work/try.py" <<'PY'
import sys

import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.utils import parametrize, prune

MASK = torch.tensor([[1.0, 0.0, 1.0]])
CLIENT = torch.tensor([[9.0, 9.0, 0.1]])
X = torch.ones(1, 3)


class Masked(nn.Module):
    def forward(self, weight):
        return weight * MASK


def layer():
    net = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
    return net


def pruned():
    net = layer()
    prune.custom_from_mask(net, "weight", MASK)
    return net


def next_mask(net):
    prune.l1_unstructured(net, "weight", amount=1)  # one weight more
    return net.weight_mask.tolist()


def shown(tensor):
    return [[round(value, 3) for value in row] for row in tensor.tolist()]


torch.set_num_threads(1)
print("torch", torch.__version__)
net = pruned()
before = shown(net.weight)
functional_call(net, {"weight_orig": CLIENT}, (X,))
after, kept = shown(net.weight), shown(net.weight_orig)
called, untouched = next_mask(net), next_mask(pruned())

again = pruned()
functional_call(again, {"weight_orig": CLIENT}, (X,))
again(X)
repaired = next_mask(again)

mapped = pruned()
vmap(lambda weight: functional_call(mapped, {"weight_orig": weight}, (X,)).sum())(torch.stack([CLIENT, CLIENT]))
try:
    escaped = str(next_mask(mapped))
except RuntimeError as error:
    escaped = type(error).__name__

other = layer()
parametrize.register_parametrization(other, "weight", Masked())
functional_call(other, {"parametrizations.weight.original": CLIENT}, (X,))
parametrized = shown(other.weight)

print("net.weight before              ", before)
print("after functional_call          ", after, "  weight_orig", kept)
print("next mask, without the call    ", untouched)
print("next mask, after the call      ", called)
print("  and after a forward of net   ", repaired)
print("next step after a vmap         ", escaped)
print("parametrize, after the call    ", parametrized)
as_described = (
    after == [[9, 0, 0.1]] and kept == [[1, 2, 3]] and untouched == repaired == [[0, 0, 1]] and called == [[1, 0, 0]]
    and escaped == "RuntimeError" and parametrized == before == [[1, 0, 3]]
)  # fmt: skip
print("as described" if as_described else "CHANGED: functional_call and prune work together in another way")
sys.exit(not as_described)
PY
"$work/venv/bin/python" "$work/try.py"
