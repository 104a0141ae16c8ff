"""What two ranks of a node tell each other before MPI: a line of JSON, and open files."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Sequence
from typing import Any

MOST = 250  # open files in one message: Linux takes 253
CREDENTIALS = struct.Struct("3i")  # process, user, group


def send(link: socket.socket, message: dict[str, Any], files: Sequence[int] = ()) -> None:
    """Sends a message, and files with its first byte. OSError where the other has ended."""
    line = json.dumps(message).encode() + b"\n"
    if len(files) > MOST:
        raise OSError(f"{len(files)} open files: a message takes {MOST}")
    socket.send_fds(link, [line[:1]], list(files))
    link.sendall(line[1:])


def receive(link: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """A message, and its files. EOFError where the other has ended."""
    data, files, _, _ = socket.recv_fds(link, 1, MOST)
    while data and not data.endswith(b"\n"):
        more = link.recv(1 << 16)
        if not more:
            data = b""
        data += more
    if not data:
        raise EOFError
    return json.loads(data), list(files)


def peer(link: socket.socket) -> tuple[int, int]:
    """The process at the other end, and its user, as the kernel tells."""
    process, user, _ = CREDENTIALS.unpack(link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
    return process, user
