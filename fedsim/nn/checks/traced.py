"""Whether the graph that torch.fx traces of a module computes what the module computes: channels are cut by the graph."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

from fedsim.nn.checks.plain import first_line, without_dropout
from fedsim.nn.layers.gate_insertion import graph_of

CLOSE = 1e-4  # of the largest output


def fault(module: nn.Module, x: Tensor) -> str:
    """Why the graph cannot stand for the module on images x (B, C, H, W); empty where it can, or where there is no graph or no answer."""
    try:
        twin = without_dropout(module).train()
        graph = graph_of(twin)
    except Exception:  # who needs a graph says so
        return ""
    for train, name in ((True, "training"), (False, "evaluation")):
        whole = copy.deepcopy(twin).train(train)
        read = fx.GraphModule(copy.deepcopy(twin), copy.deepcopy(graph)).train(train)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            try:
                expected = whole(x)
            except Exception:  # `plain.faults` says so
                return ""
            try:
                found = read(x)
            except Exception as error:
                return f"what torch.fx traces of its forward fails in {name} mode ({first_line(error)})"
        if not isinstance(expected, Tensor):
            return ""  # as above
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=0, atol=CLOSE * float(expected.abs().max())):
            return (
                f"what torch.fx traces of its forward computes something else in {name} mode; leave out what depends on the mode or on"
                " the kind of an argument, such as isinstance(x, torch.Tensor)"
            )
    return ""
