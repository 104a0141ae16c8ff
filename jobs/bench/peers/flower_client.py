"""Flower's client side: a ClientApp that trains the client whose partition its node has."""

from __future__ import annotations

from functools import cache

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn
from torch.nn import functional as F
from work import Steps, Work, read

app = ClientApp()


@cache
def held(path: str) -> tuple[Work, nn.Module]:
    """The work and one module, read and built once in each of Ray's processes and not for every client."""
    work = read(path)
    return work, work.module()


@app.train()
def train(message: Message, context: Context) -> Message:
    config = message.content["config"]
    work, module = held(str(config["work"]))
    module.load_state_dict(message.content["arrays"].to_torch_state_dict())
    client = int(context.node_config["partition-id"])
    steps = Steps(work.lr) if config["server-round"] == 1 else None
    optimiser = torch.optim.SGD(module.parameters(), work.lr)
    for x, y in work.batches(client):
        optimiser.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimiser.step()
    metrics = MetricRecord({"num-examples": len(work.labels[client]), "steps": steps.close() if steps else 0})
    content = RecordDict({"arrays": ArrayRecord(module.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)
