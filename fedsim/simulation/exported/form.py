"""The forms in which a network can be written: what is in the file, how it is read back, and how its reader opens it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from torch import Tensor, nn

from fedsim.config.job import Job
from fedsim.data.population import Population
from fedsim.storage.reader import RunReader

Network = Callable[[Tensor], Tensor]  # images (B, C, H, W), normalised -> logits (B, classes)
Facts = dict[str, str]
PIXELS = "pixel values / 255, minus mean, over std, of each channel"


@dataclass(frozen=True)
class Form:
    """One of the forms of `fedsim export --to`. Its functions raise BadInput, with the reason alone, where it cannot hold a network."""

    suffix: str
    content: Callable[[nn.Module, Tensor, Facts], bytes]  # of a module, with images (B, C, H, W) to follow it by
    read: Callable[[Path, bytes, nn.Module], Network]  # the network in a file; its content and the module as they were written
    how: Callable[[Path, nn.Module, str], str]  # how the file is opened; the last argument: why the module needs its class
    ready: Callable[[], None] = lambda: None  # BadInput where a library is missing


def facts_of(reader: RunReader, job: Job, population: Population, client: int | None, note: str) -> Facts:
    """Where a network comes from and what it expects, as text, for forms that have a place for it."""
    known, data, names = reader.attributes, population.train, reader.called("client")
    found = {
        "fedsim": version("fedsim"),
        "run": job.name,
        "method": job.method.name,
        "seed": str(job.seed),
        "weights_sha256": str(known["weights_sha256"]),
        "images": f"float32 (batch, channels, height, width): {PIXELS}",
        "shape": json.dumps(data.shape),
        "mean": json.dumps(data.mean),
        "std": json.dumps(data.std),
        "classes": json.dumps(reader.called("class") or list(map(str, range(data.classes)))),
    }
    if client is not None:
        found["client"] = names[client] if names else str(client)
    if note:
        found["note"] = note.removeprefix("note: ")
    return {f"fedsim.{name}": value.encode(errors="replace").decode() for name, value in found.items()}


def expects(population: Population) -> str:
    """What the images are that a network reads."""
    data = population.train
    mean, std = (", ".join(f"{value:.6g}" for value in values) for values in (data.mean, data.std))
    return f"it reads float32 images (batch, {', '.join(map(str, data.shape))}): {PIXELS}; mean {mean}; std {std}"
