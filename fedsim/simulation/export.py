"""Writes the network that a run ended with, or the smaller one of a client, in a form that other tools read, and checks the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from fedsim.core import keys
from fedsim.core.tree import under
from fedsim.costs import flops
from fedsim.errors import BadInput, naming_path, reason
from fedsim.simulation import subnetworks
from fedsim.simulation.exported import accuracy, onnx_file, safetensors_file, torch_file
from fedsim.simulation.exported.form import Form, Network, expects, facts_of
from fedsim.simulation.exported.network import Final, final, module_of, traced
from fedsim.storage import disk_room
from fedsim.storage.reader import RunReader

__all__ = ["FORMS", "export", "module_of"]

FORMS: dict[str, Form] = {"torch": torch_file.FORM, "onnx": onnx_file.FORM, "safetensors": safetensors_file.FORM}
COMPARED = 16  # test images by which the file and the module are compared
SAME = 1e-5  # of logits, as a share of the largest


def export(path: Path, client: int | None, out: Path | None, console: Console, form: str = "torch") -> None:
    """Writes the final model of the run at `path`, or of one of its clients; evaluates what it wrote, and says what that is.

    form: one of FORMS. BadInput where the form cannot hold the network; then nothing is written.
    """
    if form not in FORMS:
        raise BadInput(f"--to {form}: a network is written as {', '.join(FORMS)}")
    how = FORMS[form]
    out = out or path.with_suffix(how.suffix if client is None else f".client{client}{how.suffix}")
    with naming_path(out, "; choose another --out"):
        taken = out.exists() and (out.is_dir() or out.samefile(path))
    if taken:
        raise BadInput(f"--out {out}: {'a folder' if out.is_dir() else 'the run file itself'} cannot be written over; choose another")
    with _naming(path, form):
        how.ready()
    for line in _written(path, client, out, form):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _written(path: Path, client: int | None, out: Path, form: str) -> list[str]:
    """Writes the file; what is said of it."""
    found, job, population = final(path, client)
    network, reader = found.module, RunReader(path)
    module, why = traced(network)
    images = partial(accuracy.batches, population, job.seed, job.evaluate.batch, client)
    x = next((x for x, _ in images()), None)
    some = torch.zeros(2, *population.train.shape) if x is None else x[:COMPARED]
    with _naming(path, form):
        if form == "onnx":
            onnx_file.refuse_random_gates(network)
        content = FORMS[form].content(module, some, facts_of(reader, job, population, client, found.note))
    with _aside(content, out) as aside, _naming(path, form):
        written = FORMS[form].read(aside, content, module)
        _check(found, module, written, x)
        scored = accuracy.measured(written, images(), job.execution.dtype)
    lines = _summary(found, module) + accuracy.lines_of(scored, accuracy.recorded(reader, client), client, found.note)
    lines += [found.note] if found.note else []
    return [*lines, f"wrote {out}: {FORMS[form].how(out, module, why)}", expects(population)]


@contextmanager
def _naming(path: Path, form: str) -> Iterator[None]:
    """A BadInput inside begins with the run file and the form."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{path} cannot be exported --to {form}: {error}") from error


@contextmanager
def _aside(content: bytes, out: Path) -> Iterator[Path]:
    """Gives a file beside `out` with the content, which gets its name at the end if nothing is wrong."""
    aside = out.with_name(out.name + ".new")
    try:
        disk_room.put(aside, content, "give the same command again", out)
    except OSError as error:
        raise BadInput(f"{out} cannot be written: {reason(error)}; choose another --out") from None
    try:
        yield aside
        aside.rename(out)
    finally:
        aside.unlink(missing_ok=True)


def _check(found: Final, module: nn.Module, written: Network, x: Tensor | None) -> None:
    """BadInput where a file does not give what the module gives for some images (B, C, H, W), one, three and all of them at a time,
    or what the run's network gives."""
    if x is None:
        return
    chooses = found.net.has_dynamic_gates and keys.GATE not in found.tree
    with torch.no_grad():
        batches = [x[:count] for count in sorted({1, min(3, len(x)), min(COMPARED, len(x))})]
        logits, expected = (torch.cat([network(batch) for batch in batches]) for network in (written, module))
        if apart := accuracy.differs(logits, expected, chooses, SAME):
            raise BadInput(f"the file does not give what the torch module gives, and nothing was written: {apart}")
        if found.note:
            return
        if apart := accuracy.differs(written(x), found.net(found.tree, x)[0], chooses):
            raise BadInput(f"the exported module is not the run's network, and nothing was written: {apart}")


def _summary(found: Final, module: nn.Module) -> list[str]:
    """Parameters and FLOPs."""
    count, whole = sum(value.numel() for value in module.parameters()), found.model_profile.parameters
    full = flops.forward_flops(found.model_profile)
    masked = ""
    if under(found.tree, keys.MASKS):
        kept = subnetworks.parameters(found.net, found.tree)
        masked = f"; masks keep {kept:,} ({kept / whole:.1%}), the others are 0"
    return [
        f"{count:,} of {whole:,} parameters ({count / whole:.1%}){masked}",
        f"{found.flops:,} of {full:,} FLOP an image ({found.flops / full:.1%})",
    ]
