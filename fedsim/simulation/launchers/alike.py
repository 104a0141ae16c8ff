"""Ranks of one run must run the same software and have read the same job: what is not alike is named before anything is written."""

from __future__ import annotations

import json
import platform
import socket
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("fedsim", "torch", "numpy", "numba")  # whose versions may change an answer


def software() -> dict[str, str]:
    """What this rank runs; Python without its last number, which changes no answer."""
    return {"Python": ".".join(platform.python_version_tuple()[:2])} | {name: _version(name) for name in PACKAGES}


def facts_of_this_rank(facts: dict[str, str]) -> str:
    """The facts and the host, as a text that ranks exchange."""
    return json.dumps({"host": socket.gethostname(), **facts})


def difference(texts: Sequence[str]) -> str:
    """In which fact a rank is unlike rank 0, with their numbers and hosts; empty where all are alike. texts: by rank."""
    first, *others = [json.loads(text) for text in texts]
    for rank, other in enumerate(others, 1):
        for name, value in first.items():
            if name != "host" and other.get(name) != value:
                return f"{name} is {value} on rank 0 ({first['host']}) and {other.get(name)} on rank {rank} ({other['host']})"
    return ""


def blamed(messages: Sequence[str], hosts: Sequence[str]) -> str:
    """The first message that is not empty; with the rank and its host where rank 0 has nothing to complain of."""
    rank = next((rank for rank, message in enumerate(messages) if message), None)
    if rank is None:
        return ""
    return messages[0] or f"rank {rank} on {hosts[rank]}: {messages[rank]}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "not installed"
