"""pfl, Apple's pfl-research: `python with_pfl.py WORK.npz ANSWER.npz`, or under `torchrun` for several workers.

As its guide "Fast distributed simulations" asks for: data sets in memory (`Dataset`, which keeps the batches it has cut), no evaluation
between the rounds, workers started by torchrun.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from torch.nn import functional as F
from work import Steps, Work, answer, asked


class Client(nn.Module):
    """The network with the two functions that pfl looks for."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.network(x), y)

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        return {}


class Clock(TrainingProcessCallback):
    """The time at the start and after every round; ends the count of steps after the first one."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.marks: list[float] = []

    def on_train_begin(self, *, model: Any) -> Metrics:
        self.marks.append(time.perf_counter())
        return Metrics()

    def after_central_iteration(self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int) -> tuple[bool, Metrics]:
        self.steps.close()
        self.marks.append(time.perf_counter())
        return False, Metrics()


def backend(work: Work) -> SimulatedBackend:
    clients = [PyTorchTensorDataset((x, y)) for x, y in zip(work.images, work.labels, strict=True)]
    data = FederatedDataset(clients.__getitem__, get_user_sampler("minimize_reuse", range(len(clients))))
    return SimulatedBackend(data, data, postprocessors=[WeightByDatapoints()])


def whole(steps: int) -> int:
    """The steps of all workers."""
    count = torch.tensor(steps)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(count)
    return int(count)


def main() -> None:
    work = asked()
    client = Client(work.module())
    model = PyTorchModel(client, torch.optim.SGD, torch.optim.SGD(client.parameters(), lr=1.0))
    clock = Clock(Steps(work.lr))
    # evaluation is due when the round's number is a multiple of the frequency: round 0, which is dropped, has an empty one
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=work.rounds, evaluation_frequency=work.rounds, train_cohort_size=work.cohort, val_cohort_size=0
        ),
        backend(work),
        model,
        NNTrainHyperParams(local_batch_size=work.batch, local_num_epochs=work.epochs, local_learning_rate=work.lr),
        callbacks=[clock],
        send_metrics_to_platform=False,
    )
    steps = whole(clock.steps.count)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        answer(clock.marks, steps, client.network.state_dict())


if __name__ == "__main__":
    main()
