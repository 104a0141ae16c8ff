"""The bare PyTorch loop: FedAvg as a careful author writes it by hand, `python bare.py WORK.npz ANSWER.npz`."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from work import Steps, Work, answer, asked


def one_round(work: Work, module: nn.Module, shared: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean of the cohort's weights, weighted by its images, each trained from `shared`."""
    cohort = torch.randperm(len(work.labels))[: work.cohort].tolist()
    total = {name: torch.zeros_like(value) for name, value in shared.items()}
    for client in cohort:
        module.load_state_dict(shared)
        optimiser = torch.optim.SGD(module.parameters(), work.lr)
        for x, y in work.batches(client):
            optimiser.zero_grad()
            F.cross_entropy(module(x), y).backward()
            optimiser.step()
        for name, value in module.state_dict().items():
            total[name] += len(work.labels[client]) * value
    n = len(cohort) * work.labels.shape[1]
    return {name: value / n for name, value in total.items()}


def main() -> None:
    work = asked()
    module, shared = work.module(), work.first
    steps, marks = Steps(work.lr), [time.perf_counter()]
    for _ in range(work.rounds):
        shared = one_round(work, module, shared)
        steps.close()
        marks.append(time.perf_counter())
    answer(marks, steps.count, shared)


if __name__ == "__main__":
    main()
