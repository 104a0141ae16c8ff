"""Trees of every dtype that a model's buffers may have pass between ranks as they are."""

from __future__ import annotations

import pytest
import torch

from fedsim.fleet.mpi.tree_buffer import flat, layout, size_of, unflat

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WHOLE = (torch.bool, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


@pytest.mark.parametrize("dtype", [*FLOATS, *WHOLE])
def test_a_buffer_comes_back_as_it_was(dtype) -> None:
    tree = {
        "buf/odd": torch.tensor([1, 0, 1], dtype=torch.uint8),
        "buf/count": torch.tensor(1).to(dtype),
        "buf/none": torch.zeros(0, 2).to(dtype),
    }
    rows = layout(tree)
    found = unflat(rows, flat(tree))
    assert size_of(rows) == len(flat(tree)) == 3 + dtype.itemsize
    assert all(found[key].dtype == value.dtype and torch.equal(found[key], value) for key, value in tree.items())
