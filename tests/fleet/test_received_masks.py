"""What masks cost a client that was away while they moved."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedsim.fleet.received_masks import ReceivedMasks


def keeping(*positions: int) -> dict[str, Tensor]:
    mask = torch.zeros(640, dtype=torch.bool)
    mask[list(positions)] = True
    return {"mask/a": mask}


def test_controls_pay_for_weights_that_were_pruned_and_kept_again_meanwhile() -> None:
    """Client 0 sees every mask, client 1 the first and the last: it can't see that weight 1 was pruned and is kept again."""
    received, plain = ReceivedMasks(), ReceivedMasks()
    rounds = [(keeping(1, 2, 3), (0, 1)), (keeping(2, 3, 4), (0,)), (keeping(2, 3, 1), (0,)), (keeping(1, 2, 5), (0, 1))]
    paid = []
    for masks, clients in rounds:
        received.version(masks)
        plain.version(masks)
        paid.append(list(zip(*(held.prices(np.array(clients), held is received).tolist() for held in (received, plain)), strict=True)))
    assert paid == [[(12, 12), (12, 12)], [(8, 8)], [(8, 8)], [(8, 8), (8 + 1, 8)]]  # a bit for each of three kept weights
    assert received.copy() == received
