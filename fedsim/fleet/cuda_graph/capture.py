"""Runs programs of fixed shapes: on CUDA as a graph that is captured once, elsewhere as plain Python; and copies on a side stream.

All that needs CUDA stands in `Cuda`; `Eager` is the same without it, in order and at once, which is how programs are tested.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol
from warnings import warn

import torch
from torch import Tensor
from torch.autograd.grad_mode import set_multithreading_enabled

WARM = 2  # runs before a capture, in which libraries choose their kernels and take their workspaces

Run = Callable[[], None]


class GraphCapture(Protocol):
    """Who runs programs on one device."""

    notes: dict[str, str]  # name of a program that could not be captured -> why

    def capture(self, name: str, program: Run, restore: Run) -> Run:
        """What runs `program` from now on. It may be run a few times here; `restore` undoes that."""
        ...

    @contextmanager
    def on_side_stream(self, *used: Tensor) -> Iterator[None]:
        """What is done inside waits for what was asked for before, but what is asked for afterwards does not wait for it."""
        ...

    def to_device(self, value: Tensor) -> Tensor: ...

    def to_host(self, value: Tensor) -> Tensor:
        """A copy on the host, complete once `event` has been waited for."""
        ...

    def event(self) -> Run:
        """Waits until all that was asked for up to now is done, also beside."""
        ...

    def release(self) -> None:
        """Gives memory that nothing holds back to the device."""
        ...


class Eager:
    """Without CUDA: every program as it is written, everything in order."""

    def __init__(self) -> None:
        self.notes: dict[str, str] = {}

    def capture(self, name: str, program: Run, restore: Run) -> Run:
        return program

    @contextmanager
    def on_side_stream(self, *used: Tensor) -> Iterator[None]:
        yield

    def to_device(self, value: Tensor) -> Tensor:
        return value

    def to_host(self, value: Tensor) -> Tensor:
        return value.clone()

    def event(self) -> Run:
        return lambda: None

    def release(self) -> None:
        pass


class Cuda:
    """CUDA graphs out of one shared pool of memory: nothing that a program makes outlives it, so programs may take turns there."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.notes: dict[str, str] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(self.device)
        self._side = torch.cuda.Stream(self.device)

    def capture(self, name: str, program: Run, restore: Run) -> Run:
        with torch.cuda.device(self.device), set_multithreading_enabled(False):
            self._warm(program)
            restore()
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    program()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.notes[name] = str(error).partition("\n")[0]
                warn(f"{name}: not captured as a CUDA graph, runs as it is written: {self.notes[name]}", RuntimeWarning, stacklevel=2)
                self._pool = torch.cuda.graph_pool_handle()  # what the broken capture took there is lost to it
                restore()
                return program
        return graph.replay

    def _warm(self, program: Run) -> None:
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM):
                program()
        current.wait_stream(self._stream)

    @contextmanager
    def on_side_stream(self, *used: Tensor) -> Iterator[None]:
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            yield
        for value in used:
            value.record_stream(self._side)

    def to_device(self, value: Tensor) -> Tensor:
        return value.pin_memory().to(self.device, non_blocking=True)

    def to_host(self, value: Tensor) -> Tensor:
        return torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)

    def event(self) -> Run:
        event = torch.cuda.Event()
        with torch.cuda.stream(self._side):
            self._side.wait_stream(torch.cuda.current_stream(self.device))
            event.record(self._side)
        return event.synchronize

    def release(self) -> None:
        gc.collect()
        self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()


def graph_capture(device: str) -> GraphCapture:
    """The one for a torch device."""
    return Cuda(device) if torch.device(device).type == "cuda" else Eager()
