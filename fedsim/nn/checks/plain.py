"""The plain torch module on a batch: what it answers, whether it can be trained, and whether it answers the same again."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from fedsim.core import shared_generators
from fedsim.nn.checks import changes, record
from fedsim.nn.checks.record import Record, unlike
from fedsim.nn.checks.refusals import called, refusals
from fedsim.nn.checks.trail import Trail, following
from fedsim.nn.layers.input_gate import InputGate

LINE = 200  # characters of another library's message
UNLIKE = "so fleets would give different results"


def without_dropout(module: nn.Module) -> nn.Module:
    """A copy whose dropout layers let everything pass, and whose gates choose by size: draws are not those of another call."""
    module = copy.deepcopy(module)
    for layer in module.modules():
        if isinstance(layer, nn.modules.dropout._DropoutNd):
            layer.p = 0.0
        elif isinstance(layer, InputGate):
            layer.random = False
    return module


def faults(module: nn.Module, x: Tensor, y: Tensor, classes: int) -> list[str]:
    """What is wrong with a module for images x (B, C, H, W) with labels y (B,), a line each; empty where it can be simulated."""
    if found := refusals(module):
        return found
    try:
        module = without_dropout(module)
    except Exception as error:
        return [f"the model cannot be copied ({first_line(error)}): every client trains a copy of it"]
    with torch.random.fork_rng(devices=[]):
        for train, name in ((True, "training"), (False, "evaluation")):
            if fault := _answer(module.train(train), x, classes, name):
                return [fault]
        if fault := _one_image(module, x, classes) or _drawn(module, x) or changes.fault(module, x) or _trained(module, x, y):
            return [fault]
    return []


def recorded(module: nn.Module, x: Tensor, y: Tensor, masks: dict[str, Tensor] | None = None) -> Record:
    """`record.of_module` without a trace of it in torch's generator."""
    with torch.random.fork_rng(devices=[]):
        return record.of_module(module, x, y, masks)


def _called(module: nn.Module, x: Tensor) -> tuple[Any, Trail, BaseException | None]:
    """What a copy of the module answers, which layers it called, and the error that ended it."""
    twin = copy.deepcopy(module)
    with following(twin) as trail, torch.no_grad():
        try:
            return twin(x.clone()), trail, None
        except (Exception, SystemExit) as error:
            return None, trail, error


def _answer(module: nn.Module, x: Tensor, classes: int, mode: str) -> str:
    answer, trail, error = _called(module, x)
    if error is not None:
        return f"in {mode} mode {_failed(module, trail)} fails on images of shape {tuple(x.shape)}: {first_line(error)}"
    return _of_logits(answer, len(x), classes, mode)


def _of_logits(answer: Any, images: int, classes: int, mode: str) -> str:
    """What is wrong with what a forward gave."""
    if not isinstance(answer, Tensor):
        what = f"a {type(answer).__name__}" + (f" of {', '.join(map(repr, answer))}" if isinstance(answer, dict) else "")
        return f"forward gives {what} in {mode} mode; it should give the logits alone, one tensor (images, classes), so return only these"
    shape, wanted = tuple(answer.shape), f"(images, classes) = ({images}, {classes})"
    if answer.dtype != torch.float32:
        return f"the logits are {str(answer.dtype).removeprefix('torch.')} in {mode} mode; they should be float32, as by .float()"
    if len(shape) != 2 or shape[0] != images:
        return f"the logits have the shape {shape} for {images} images in {mode} mode; it should be {wanted}"
    if shape[1] < classes:
        return f"the model has {shape[1]} outputs, and the data have {classes} classes; its last layer needs {classes}"
    if not answer.isfinite().all():
        return f"the logits are not finite in {mode} mode (NaN or infinite) before any training; look at its first weights"
    return ""


def _one_image(module: nn.Module, x: Tensor, classes: int) -> str:
    """A batch may have one image: squeeze() then drops the axis of images. Norms that refuse one image are replaced by fedsim's."""
    for train, mode in ((True, "training"), (False, "evaluation")):
        answer, _, error = _called(module.train(train), x[:1])
        if error is None and (fault := _of_logits(answer, 1, classes, mode)) and "shape" in fault:
            return f"{fault}; a last batch may have one image, whose axis squeeze() drops"
    return ""


class _Drawing(TorchFunctionMode):
    """Notes the first function of torch that moved torch's generator."""

    def __init__(self) -> None:
        super().__init__()
        self.found = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = torch.get_rng_state()
        answer = func(*args, **(kwargs or {}))
        if not self.found and not torch.equal(before, torch.get_rng_state()):
            self.found = str(resolve_name(func) or func)
        return answer


def _drawn(module: nn.Module, x: Tensor) -> str:
    """What is drawn in a forward: it moves a shared generator, if only now and then to any effect, or a second copy answers otherwise."""
    for train in (True, False):
        before = shared_generators.states()
        (mine, one, _), (theirs, other, _) = (_called(module.train(train), x) for _ in range(2))
        if (differs := unlike(mine, theirs)) or shared_generators.moved(before):
            name = one.fork(other, unlike)
            with _Drawing() as drawing:
                _called(module, x)
            reach = f"; its draws reach {called(name, module.get_submodule(name))}" if differs else ""
            return f"{_advised(drawing.found, bool(shared_generators.moved(before)))}{reach}"
    return ""


def _advised(function: str, moved: bool) -> str:
    """What is wrong with draws by this function of torch, and what to do. moved: whether a shared generator has."""
    if not function and not moved:
        what = "two equal copies of it give different logits for the same images"
        return f"{what}, {UNLIKE}: by random numbers of a generator of its own, or by a value that stands outside of the module"
    if not function:
        return f"the forward draws random numbers outside of torch, {UNLIKE}; torch.nn.Dropout layers may draw, nothing else"
    fix = "make it a torch.nn.Dropout layer" if "dropout" in function else "leave it out; torch.nn.Dropout layers may draw, nothing else"
    fix = "call it with dropout_p=0.0" if "dot_product" in function else fix
    return f"the forward draws random numbers by {function}, {UNLIKE}; {fix}"


def _trained(module: nn.Module, x: Tensor, y: Tensor) -> str:
    """Whether a backward pass and a second step work."""
    twin = copy.deepcopy(module).train()
    try:
        logits = twin(x.clone())
        if not logits.requires_grad:
            return "the logits do not depend on any parameter that is trained: is something detached, or computed under no_grad?"
        record.of_module(module, x, y)
    except Exception as error:
        return f"the model cannot be trained by torch: {first_line(error)}"
    return ""


def _failed(module: nn.Module, trail: Trail) -> str:
    name = trail.inside[-1] if trail.inside else ""
    return called(name, module.get_submodule(name))


def first_line(error: BaseException) -> str:
    """An error in one line, as long as its message says."""
    text = str(error).strip()
    first = text.splitlines()[0] if text else ""
    return f"{type(error).__name__}: {first if len(first) <= LINE else first[:LINE] + ' …'}".rstrip(": ")
