"""The models a job can name, and its user's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from importlib import import_module
from importlib.metadata import EntryPoint
from math import prod
from typing import Any

import torch
from torch import nn

from fedsim.core import entry_points, rng
from fedsim.core.shared_generators import seeded
from fedsim.errors import BadInput
from fedsim.models import cnn, mobilenet_cifar, resnet, vgg_mobilenet
from fedsim.models.blueprint import Blueprint
from fedsim.models.settings import ModelSettings
from fedsim.models.width_matching import Matched, widest
from fedsim.nn.checks import traced
from fedsim.nn.checks.refusals import refusals
from fedsim.nn.layers.gate_insertion import insert_gates
from fedsim.nn.layers.input_gate import Gating
from fedsim.nn.profiler import profile

__all__ = ["FAMILIES", "Blueprint", "Family", "Matched", "ModelSettings", "build", "matched", "profile"]

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Family:
    """A model's maker, its own width, and the least height and width of an image."""

    make: Callable[[Blueprint], nn.Module]
    width: int  # channels of the first convolution
    least: int  # pixels


def _cifar_resnet(blocks: int) -> Callable[[Blueprint], nn.Module]:
    return lambda form: resnet.cifar_resnet(form, blocks)


FAMILIES: dict[str, Family] = {
    "cnn": Family(cnn.cnn, 32, 4),
    "simple_cnn": Family(cnn.simple_cnn, 32, 6),
    "lenet5": Family(cnn.lenet5, 6, 12),
    "resnet8": Family(_cifar_resnet(1), 16, 1),
    "resnet18": Family(resnet.resnet18, 64, 1),
    "resnet20": Family(_cifar_resnet(3), 16, 1),
    "resnet32": Family(_cifar_resnet(5), 16, 1),
    "resnet56": Family(_cifar_resnet(9), 16, 1),
    "vgg11": Family(vgg_mobilenet.vgg11, 64, 32),
    "vgg16": Family(vgg_mobilenet.vgg16, 64, 32),
    "mobilenet_v2": Family(vgg_mobilenet.mobilenet_v2, 32, 1),
    "mobilenet_v2_cifar": Family(mobilenet_cifar.mobilenet_v2_cifar, 32, 1),
}


def build(settings: ModelSettings, shape: Shape, classes: int, seed: int) -> nn.Module:
    """The model for images of `shape` (C, H, W), its first weights a function of the seed alone.

    BadInput for a name that does not exist, images that are too small, a match that cannot be met, or a factory that fails.
    """
    entry = None if settings.factory else _installed(settings)
    small = matched(settings, shape, classes) if settings.match else None
    with seeded(seed):
        if settings.factory is not None:
            module = _from_factory(
                f'model.factory = "{settings.factory}"', partial(_import, settings.factory), shape, classes, settings.factory
            )
        elif entry is not None:
            module = _from_factory(f'model.name = "{settings.name}": {entry_points.source(entry)}', entry.load, shape, classes)
        else:
            module = _make(settings, shape, classes, small.width, small.shrink) if small else _make(settings, shape, classes)
        return module if settings.gate_keep is None else _gated(settings, settings.gate_keep, module, shape)


def _gated(settings: ModelSettings, keep: float, module: nn.Module, shape: Shape) -> nn.Module:
    own = settings.factory is not None or settings.name not in FAMILIES
    if own and (why := traced.fault(module, rng.normal(rng.key(0, "images"), 4 * prod(shape)).view(4, *shape))):
        raise BadInput(f"[model] gate_keep: {why}")
    return insert_gates(module, _gating(settings, keep))


def parameters(settings: ModelSettings, shape: Shape, classes: int) -> int:
    """How many a model of fedsim has, without gates, for which no memory is taken."""
    with torch.device("meta"):
        return sum(value.numel() for value in _make(settings, shape, classes).parameters())


def _gating(settings: ModelSettings, keep: float) -> Gating:
    return Gating(keep, settings.gate_sigmoid, settings.gate_bias, settings.gate_l1, settings.gate_choice, settings.gate_place)


def matched(settings: ModelSettings, shape: Shape, classes: int) -> Matched:
    """How wide the model is, and its share of the full model's cost: parameters where nothing is matched."""
    full = settings.width or _family(settings, shape).width
    match, density = settings.match or "params", settings.match_density

    def make(width: int, shrink: Fraction) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            return _make(settings, shape, classes, width, shrink)

    return widest(make, full, match, density, shape)


def _make(settings: ModelSettings, shape: Shape, classes: int, width: int | None = None, shrink: Fraction = Fraction(1)) -> nn.Module:
    family = _family(settings, shape)
    width = width or settings.width or family.width
    form = Blueprint(shape, classes, width, settings.norm, settings.standardise, settings.detach_shortcut, shrink, settings.nsconv_over)
    module = family.make(form)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.constant_(layer.weight, settings.norm_weight)
    return module


def _family(settings: ModelSettings, shape: Shape) -> Family:
    if settings.factory is not None:
        raise BadInput(f"a model from a factory ({settings.factory}) has no width")
    if settings.name not in FAMILIES:
        raise _unknown(settings.name)
    family = FAMILIES[settings.name]
    if min(shape[1:]) < family.least:
        raise BadInput(f"{settings.name} needs images of at least {family.least}x{family.least}; these are {shape[1]}x{shape[2]}")
    return family


def _installed(settings: ModelSettings) -> EntryPoint | None:
    """The model that an installed package offers by the entry point `fedsim.models`; None: the name is one of fedsim's."""
    if settings.name in FAMILIES:
        return None
    entry = entry_points.find(entry_points.MODELS, settings.name, "[model] name")
    if entry is None:
        raise _unknown(settings.name)
    if given := settings.of_fedsim:
        raise BadInput(f"model.{given[0]} is for the models of fedsim; {settings.name} is {entry_points.source(entry)}")
    return entry


def _unknown(name: str) -> BadInput:
    known = [*FAMILIES, *entry_points.names(entry_points.MODELS)]
    return entry_points.unknown("[model] name", name, known, '; or give model.factory = "package.module:function"')


def _import(place: str) -> Any:
    where, _, name = place.partition(":")
    return getattr(import_module(where), name)


def _from_factory(title: str, load: Callable[[], Any], shape: Shape, classes: int, place: str = "") -> nn.Module:
    try:
        module = load()(shape=shape, classes=classes)
    except (Exception, SystemExit) as error:
        called = 'it is "package.module:function", called as function(shape=(C, H, W), classes=…)'
        called = entry_points.where_looked(error, place.partition(":")[0]) or f"; {called}"
        raise BadInput(f"{title} failed: {type(error).__name__}: {error}{called}") from error
    if not isinstance(module, nn.Module):
        raise BadInput(f"{title} gave a {type(module).__name__}; it should give a torch.nn.Module")
    if found := refusals(module):
        raise BadInput(f"{title}: {'; '.join(found)}")
    return module
