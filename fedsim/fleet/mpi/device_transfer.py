"""How tensors pass to MPI: those on a GPU as they are where MPI knows CUDA, through pinned memory of the host where it does not."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.core.exact_sum import Sum
from fedsim.core.tree import Tree

LIBRARIES = ("libmpi.so.40", "libmpi.so.12", "libmpi.so")  # Open MPI, MPICH and its kin

Buffer = Any  # a numpy array on the host, or a tensor that MPI reads and writes where it is


def knows_cuda() -> bool:
    """Whether the MPI library of this process says that it takes buffers on a GPU (MPIX_Query_cuda_support, of Open MPI and MPICH)."""
    for name in LIBRARIES:
        try:
            library = ctypes.CDLL(name, mode=os.RTLD_NOLOAD)
            return bool(library.MPIX_Query_cuda_support())
        except (OSError, AttributeError):
            continue
    return False


@dataclass(frozen=True)
class DeviceTransfer:
    """Where the large buffers of a rank are when they are sent and received."""

    device: str = "cpu"
    direct: bool = False

    @classmethod
    def of(cls, device: str, wanted: str) -> DeviceTransfer:
        """wanted: "on", "off", or "auto", which asks MPI."""
        return cls(device, wanted == "on" or (wanted == "auto" and torch.device(device).type == "cuda" and knows_cuda()))

    def outgoing(self, value: Tensor) -> Buffer:
        """What MPI is handed for a flat tensor, complete."""
        if not self.direct:
            return pinned(value).numpy()
        if value.is_cuda:
            torch.cuda.current_stream(value.device).synchronize()
        return value

    def outgoing_sum(self, total: Sum) -> Buffer:
        """The same for partial sums, int64, keys in order."""
        parts = [total.parts[key].reshape(-1).to(self.device) for key in sorted(total.parts)]
        return self.outgoing(torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=self.device))

    def allocate(self, size: int) -> Buffer:
        """Where MPI puts `size` bytes."""
        return torch.empty(size, dtype=torch.uint8, device=self.device) if self.direct else np.empty(size, np.uint8)

    def incoming(self, buffer: Buffer) -> Tensor:
        """What MPI has brought, on the device."""
        return (buffer if isinstance(buffer, Tensor) else torch.from_numpy(buffer)).to(self.device)


def pinned(value: Tensor) -> Tensor:
    """The value on the host; from a GPU through memory that its copy engine reaches."""
    return torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value) if value.is_cuda else value


def seen_as(buffer: Buffer, dtype: str) -> Buffer:
    """The same bytes as numbers of another type."""
    return buffer.view(getattr(torch, dtype) if isinstance(buffer, Tensor) else np.dtype(dtype))


def joined(buffers: list[Buffer]) -> Buffer:
    """The buffers of one device, one after the other."""
    return torch.cat(buffers) if isinstance(buffers[0], Tensor) else np.concatenate(buffers)


def bytes_of(tree: Tree) -> Tensor:
    """All tensors of one device as one buffer of bytes there, as `flat.flat` lays them out."""
    parts = [value.detach().contiguous().flatten().view(torch.uint8) for value in tree.values()]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.uint8)
