"""Messages between ranks: broadcasts and sums along binomial trees, orders and replies, without pickle and without a busy wait."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from mpi4py import MPI

from fedsim.fleet.mpi.device_transfer import Buffer, DeviceTransfer, joined, seen_as
from fedsim.fleet.mpi.schedule import branches

OWN_TAG, REPLY_TAG, ROWS_TAG, GO_TAG, STOP_TAG, TOTAL_TAG, SHARED_TAG, LIST_TAG = range(1, 9)  # tags
HOST = DeviceTransfer()
SHORT, LONG = 50e-6, 2e-3  # seconds between two looks at a request
TEXT = 4096  # bytes of an error at the start
PIECE = 2**30  # bytes of a message at most: MPI counts them in 32 bits, and Open MPI refuses 2^31


@dataclass
class Communicator:
    """A communicator whose waiting does not burn a core."""

    comm: MPI.Intracomm
    clock: Callable[[], float]
    sleep: Callable[[float], None]
    messages: int = 0  # sent and received by this rank
    bytes: int = 0  # of them
    others: int = 0  # bytes that passed between other ranks on rank 0's behalf, as rank 0 knows
    transfer: DeviceTransfer = field(default_factory=DeviceTransfer)  # of models and totals
    mpi: str = ""  # the name and version of the MPI library
    silence: Callable[[Collection[int], float], None] = lambda ranks, seconds: None  # is called while these ranks are waited for

    def until(self, done: Callable[[], Any], asked: Callable[[], None] = lambda: None, ranks: Collection[int] = ()) -> Any:
        """Asks until `done` answers, ever more seldom: no wait is overslept by more than a fiftieth. ranks: those waited for."""
        begin = self.clock()
        while not (answer := done()):
            asked()
            waited = self.clock() - begin
            self.silence(ranks, waited)
            self.sleep(min(LONG, max(SHORT, waited / 50)))
        return answer

    def wait(self, request: MPI.Request, *buffers: np.ndarray | None, ranks: Collection[int] = ()) -> None:
        """Until the request is done; it is given its buffers, which must live that long."""
        self.until(request.Test, ranks=ranks)

    def reduce(self, mine: Buffer, ranks: int) -> Buffer:
        """The int64 sum over ranks 0 … `ranks`, on rank 0: pairs add, then pairs of pairs.

        MPI's own reduction comes in many small pieces, each of which would wait for the next look.
        """
        step, heard = 1, 0
        while step <= ranks:
            if self.rank & step:
                self.send({self.rank - step: seen_as(mine, "uint8")}, TOTAL_TAG)
                break
            if self.rank + step <= ranks:
                mine = mine + seen_as(self.receive(self.rank + step, TOTAL_TAG, self.transfer), "int64")
                heard += 1
            step *= 2
        self.others += mine.nbytes * (ranks - heard)
        return mine

    def send_order(self, header: dict[str, Any]) -> None:
        """Sends every rank what to do: {"do": "plan" | "run" | "end", …}."""
        self.broadcast(coded(header))

    def broadcast(self, buffer: Buffer | None, transfer: DeviceTransfer = HOST) -> Buffer:
        """The root's bytes, on every rank: each hands them on to its branches.

        MPI's own broadcast needs the size first, and sends long buffers along a chain of ranks in pieces, each of which
        would wait for the next look of every rank on its way.
        """
        held = self.receive(self.rank & (self.rank - 1), SHARED_TAG, transfer) if buffer is None else buffer
        below = branches(self.rank, self.ranks)
        self.send(dict.fromkeys(below, held), SHARED_TAG)
        self.others += held.nbytes * (self.ranks - 1 - len(below))
        return held

    def send(self, buffers: dict[int, Buffer], tag: int) -> None:
        """Bytes to each of some ranks, all under way together; in pieces, of which the last is shorter than PIECE and may be empty."""
        pieces = [(rank, buffer[at : at + PIECE]) for rank, buffer in buffers.items() for at in range(0, buffer.nbytes + 1, PIECE)]
        requests = [self.comm.Isend(piece, dest=rank, tag=tag) for rank, piece in pieces]
        for request, (rank, piece) in zip(requests, pieces, strict=True):
            self.wait(request, piece, ranks=(rank,))
            self._count(piece)

    def receive(self, rank: int, tag: int, transfer: DeviceTransfer = HOST) -> Buffer:
        """The bytes that a rank has sent, all pieces of them."""
        pieces = [self._piece(rank, tag, transfer)]
        while pieces[-1].nbytes == PIECE:
            pieces.append(self._piece(rank, tag, transfer))
        return pieces[0] if len(pieces) == 1 else joined(pieces)

    def _piece(self, rank: int, tag: int, transfer: DeviceTransfer) -> Buffer:
        status = MPI.Status()
        self.until(lambda: self.comm.Iprobe(source=rank, tag=tag, status=status), ranks=(rank,))
        buffer = transfer.allocate(status.Get_count(MPI.BYTE))
        self.wait(self.comm.Irecv(buffer, source=rank, tag=tag), buffer, ranks=(rank,))
        self._count(buffer)
        return buffer

    def _count(self, buffer: Buffer) -> None:
        self.messages += 1
        self.bytes += buffer.nbytes

    @property
    def moved(self) -> int:
        """Bytes between all ranks, on rank 0."""
        return self.bytes + self.others

    def allgather_text(self, mine: str) -> list[str]:
        """A text of every rank, on every rank; the first TEXT bytes of each."""
        row = np.zeros(TEXT, dtype=np.uint8)
        text = mine.encode()[:TEXT]
        row[: len(text)] = np.frombuffer(text, np.uint8)
        every = np.zeros((self.comm.size, TEXT), dtype=np.uint8)
        self.wait(self.comm.Iallgather(row, every), row, every)
        return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in every]

    def gathered(self, mine: list[Any]) -> list[Any]:
        """The lists of all ranks one after the other, on rank 0; on another rank its own. They hold what JSON can."""
        if self.rank:
            self.send({0: coded(mine)}, LIST_TAG)
            return mine
        others = (json.loads(self.receive(rank, LIST_TAG).tobytes()) for rank in range(1, self.ranks))
        return [each for part in (mine, *others) for each in part]

    @property
    def rank(self) -> int:
        return self.comm.rank

    @property
    def ranks(self) -> int:
        return self.comm.size

    def node_rank(self) -> int:
        """This rank's number among those of its machine, for choosing an accelerator."""
        return self.comm.Split_type(MPI.COMM_TYPE_SHARED).rank

    def abort(self, code: int) -> None:
        """Ends every rank at once."""
        self.comm.Abort(code)


def connect(clock: Callable[[], float], sleep: Callable[[float], None]) -> Communicator:
    return Communicator(MPI.COMM_WORLD, clock, sleep)


def coded(header: dict[str, Any] | list[Any]) -> np.ndarray:
    return np.frombuffer(json.dumps(header).encode(), np.uint8)
