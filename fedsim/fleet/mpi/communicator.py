"""Messages between ranks: broadcasts and sums along binomial trees, orders and replies, without pickle and without a busy wait."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from mpi4py import MPI

from fedsim.fleet.mpi.device_transfer import Buffer, DeviceTransfer, joined, seen_as
from fedsim.fleet.mpi.schedule import branch, branches
from fedsim.fleet.mpi.waiting import Waiting

ORDER_TAG, SHARED_TAG, OWN_TAG, REPLY_TAG, ROWS_TAG, FAULT_TAG, STOP_TAG, TOTAL_TAG, LIST_TAG = range(1, 10)  # tags
HOST = DeviceTransfer()
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
    stops: int = 0  # how often rank 0 has told all ranks to stop; on another rank how often it has read so
    transfer: DeviceTransfer = field(default_factory=DeviceTransfer)  # of models and totals
    mpi: str = ""  # the name and version of the MPI library
    waiting: Waiting = field(default_factory=Waiting)
    silence: Callable[[Collection[int], float], None] = lambda ranks, seconds: None  # is called while these ranks are waited for

    def until(
        self, done: Callable[[], Any], asked: Callable[[], None] = lambda: None, ranks: Collection[int] = (), kind: object = None
    ) -> Any:
        """Asks until `done` answers, ever more seldom (`waiting.py`). ranks: those waited for. kind: what is waited for."""
        begin, waited = self.clock(), 0.0
        while not (answer := done()):
            asked()
            waited = self.clock() - begin
            self.silence(ranks, waited)
            self.sleep(self.waiting.pause(kind, waited))
        self.waiting.ended(kind, waited)
        return answer

    def wait(self, request: MPI.Request, *buffers: np.ndarray | None, ranks: Collection[int] = ()) -> None:
        """Until the request is done; it is given its buffers, which must live that long."""
        self.until(request.Test, ranks=ranks)

    @property
    def parent(self) -> int:
        """The rank through which this one is sent what all are sent, and through which it answers."""
        return self.rank & (self.rank - 1)

    def add(self, mine: Buffer | None, whose: Collection[int]) -> Buffer | None:
        """`mine` and the totals of other ranks as one int64 sum. None where it has none to add to; the others' are then dropped.

        MPI's own reduction comes in many small pieces, each of which would wait for the next look.
        """
        for rank in whose:
            more = seen_as(self.receive(rank, TOTAL_TAG, self.transfer), "int64")
            mine = None if mine is None else more if not mine.nbytes else mine + more
        return mine

    def send_order(self, header: dict[str, Any], parts: Sequence[np.ndarray] = ()) -> None:
        """Sends every rank what to do: {"do": "plan" | "run" | "end", …}; and to ranks 1, 2, … a part each that is its own."""
        text, parts = coded(header | {"stops": self.stops}), [np.zeros(0, np.uint8), *parts] if parts else []
        parts += [parts[0]] * (self.ranks - len(parts)) if parts else []
        sent = self._hand_on(text, parts)
        sizes = [(8 + part.nbytes) * rank.bit_count() for rank, part in enumerate(parts)]
        self.others += (self.ranks - 1) * (16 + text.nbytes) + sum(sizes) - sent

    def receive_order(self) -> tuple[dict[str, Any], np.ndarray]:
        """What this rank is to do, and the part of it that is its own; its branches have been sent theirs."""
        buffer = self.receive(self.parent, ORDER_TAG)
        length, count = buffer[:16].view(np.int64).tolist()
        sizes = buffer[16 : 16 + 8 * count].view(np.int64)
        text = buffer[16 + 8 * count : 16 + 8 * count + length]
        parts = np.split(buffer[16 + 8 * count + length :], np.cumsum(sizes[:-1])) if count else []
        self._hand_on(text, parts)
        return json.loads(text.tobytes()), parts[0] if parts else np.zeros(0, np.uint8)

    def _hand_on(self, text: np.ndarray, parts: list[np.ndarray]) -> int:
        """Sends an order to this rank's branches, with the parts of the ranks on each, from this rank's on; how many bytes."""
        messages = {}
        for rank in branches(self.rank, self.ranks):
            mine = [parts[each - self.rank] for each in branch(rank, self.ranks)] if parts else []
            head = np.array([text.nbytes, len(mine), *(part.nbytes for part in mine)], np.int64)
            messages[rank] = np.concatenate([head.view(np.uint8), text, *mine])
        self.send(messages, ORDER_TAG)
        return sum(message.nbytes for message in messages.values())

    def broadcast(self, buffer: Buffer | None, transfer: DeviceTransfer = HOST) -> Buffer:
        """The root's bytes, on every rank: each hands them on to its branches.

        MPI's own broadcast needs the size first, and sends long buffers along a chain of ranks in pieces, each of which
        would wait for the next look of every rank on its way.
        """
        held = self.receive(self.parent, SHARED_TAG, transfer) if buffer is None else buffer
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
        self.until(lambda: self.comm.Iprobe(source=rank, tag=tag, status=status), ranks=(rank,), kind=tag)
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
