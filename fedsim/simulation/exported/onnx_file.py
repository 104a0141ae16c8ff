"""A network as an ONNX file: input `images` (batch, C, H, W), output `logits` (batch, classes), for any batch.

Its weights keep the names and, bit for bit, the values that they have in the torch module: nothing is folded into them, so that
what is pruned stays 0. Runtimes fold norms into convolutions by themselves when they load the file.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.errors import BadInput
from fedsim.nn.layers.input_gate import gates_of
from fedsim.simulation.exported.form import Facts, Form, Network

LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
SILENT = 4  # onnxruntime says fatal errors alone; others are raised as exceptions too
LEAST = 2  # images to follow a network by: torch.export takes a batch of one for a constant


def _ready() -> None:
    for name in LIBRARIES:
        try:
            import_module(name)
        except ImportError as error:
            raise BadInput(f"this form needs the extra `onnx` ({error}); pip install 'fedsim[onnx]'") from error


def refuse_random_gates(network: nn.Module) -> None:
    """BadInput for a network, not traced yet, whose gates draw channels at random."""
    drawing = [name for name, gate in gates_of(network).items() if gate.random and gate.keep is not None]
    if drawing:
        raise BadInput(
            f'{drawing[0]} draws the channels of an image at random (model.gate_choice = "random") from the last bits of its input,'
            " which another runtime rounds otherwise: its outputs would differ; --to torch writes it"
        )


def _content(module: nn.Module, images: Tensor, facts: Facts) -> bytes:
    with _quiet():
        model = _converted(_followed(module, images), module)
        model.metadata_props.update(facts)
        model.producer_name, model.producer_version = "fedsim", facts["fedsim.fedsim"]
        model.graph.name = facts["fedsim.run"]
        try:
            content: bytes = _proto(model).SerializeToString()
        except Exception as error:  # protobuf's own limit of 2 GB, an EncodeError in one version and a ValueError in another
            raise _reason("the file would be too large for ONNX", error) from error
    return content


def _followed(module: nn.Module, images: Tensor) -> Any:
    """The graph that torch.export makes of the module, for any number of images."""
    images = images if len(images) >= LEAST else images.expand(LEAST, *images.shape[1:]).contiguous()
    try:
        return torch.export.export(module, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False)
    except Exception as error:  # whatever a user's own forward raises when it is given no numbers
        raise _reason("torch.export cannot follow its forward", error) from error


def _converted(followed: Any, module: nn.Module) -> Any:
    """The graph in operators of ONNX; BadInput where one is missing, or where a weight would not be what it is in the module."""
    from onnxscript import ir, optimizer

    try:
        program = torch.onnx.export(followed, dynamo=True, input_names=["images"], output_names=["logits"], optimize=False, verbose=False)
    except Exception as error:
        raise _reason("torch.onnx has no translation of it", error) from error
    assert program is not None
    assert program.exported_program is not None
    if changed := sorted(program.exported_program.graph_signature.buffers_to_mutate.values()):
        raise BadInput(f"its forward changes {changed[0]}, and an ONNX network keeps nothing between two calls; --to torch writes it")
    model, values = program.model, module.state_dict()

    def reads_weights(node: Any) -> bool | None:
        return False if any(value is not None and value.name in values for value in node.inputs) else None

    optimizer.inline(model)
    optimizer.fold_constants(model, should_fold=reads_weights)
    optimizer.remove_unused_nodes(model)
    ir.passes.common.ClearMetadataAndDocStringPass()(model)  # the paths of this machine, node by node
    for name, value in model.graph.initializers.items():
        stored: Any = value.const_value
        if name in values and stored.tobytes() != values[name].numpy().tobytes():
            raise BadInput(f"torch.onnx would write other values of {name}; --to torch writes it")
    return model


def _proto(model: Any) -> Any:
    from onnxscript import ir

    return ir.to_proto(model)


def _read(path: Path, content: bytes, module: nn.Module) -> Network:
    onnxruntime: Any = import_module("onnxruntime")  # it has no types
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads, options.inter_op_num_threads = SILENT, torch.get_num_threads(), 1
    try:
        session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise _reason("onnxruntime cannot open what was written", error) from error

    def network(images: Tensor) -> Tensor:
        try:
            return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
        except Exception as error:
            raise _reason("onnxruntime cannot run what was written", error) from error

    return network


def _how(out: Path, module: nn.Module, why: str) -> str:
    return f'onnxruntime.InferenceSession("{out}").run(["logits"], {{"images": images}}), without fedsim and torch'


def _reason(what: str, error: Exception) -> BadInput:
    """With the first line of the error that says something."""
    line = next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), "no reason given")
    return BadInput(f"{what} ({type(error).__name__}: {line}); --to torch writes it")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What torch.onnx and its libraries print, log and warn of is about themselves; what matters they raise."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


FORM = Form(".onnx", _content, _read, _how, _ready)
