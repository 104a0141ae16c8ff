"""The check of a user's own model at the start of a run: what is wrong everywhere, and which plans it leaves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedsim.config.job import Job
from fedsim.core.types import Data
from fedsim.data import digest
from fedsim.data.population import opened
from fedsim.errors import BadInput
from fedsim.models import FAMILIES, ModelSettings
from fedsim.nn.checks import plain, ways
from fedsim.nn.checks.refusals import called
from fedsim.nn.layers.input_gate import WEIGHTED

IMAGES = 4
LISTED = 3  # layers that a note names
Images = tuple[Tensor, Tensor, int]  # x (B, C, H, W), y (B,), classes


def is_own(settings: ModelSettings) -> bool:
    """Whether the model is not one of fedsim's, which the tests check."""
    return settings.factory is not None or settings.name not in FAMILIES


def title(settings: ModelSettings) -> str:
    return f'model.factory = "{settings.factory}"' if settings.factory else f'model.name = "{settings.name}"'


def images_of(data: Data) -> Images:
    """A few training images from all over the set, normalised."""
    index = torch.linspace(0, len(data) - 1, IMAGES).long()
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (data.mean, data.std))
    return data.images(index).float().div(255).sub(mean).div(std), data.labels(index), data.classes


def refuse_wrong(settings: ModelSettings, module: nn.Module, images: Images) -> None:
    """BadInput where a module cannot be simulated at all: its first fault, and what to do."""
    x, y, classes = images
    if faults := plain.faults(module, x, y, classes):
        raise BadInput(f"{title(settings)}: {'; '.join(faults)}")
    found = ways.attempted(ways.ONE, lambda: ways.compared(ways.ONE, ways.one_by_one, module, x, y))
    if not found.right:
        raise BadInput(f"{title(settings)}: {found.why}")


def refuse_other_weights(settings: ModelSettings, module: nn.Module, again: nn.Module) -> None:
    """BadInput where the factory gave other values when it was called `again`: no run could be repeated, and ranks would differ."""
    one, other = values(module), values(again)
    unlike = [name for name in sorted({*one, *other}) if name not in one or name not in other or not _equal(one[name], other[name])]
    if unlike:
        raise BadInput(
            f"{title(settings)} gives another {unlike[0]} each time it is called; draw it by torch.randn, numpy.random.randn or random,"
            " which fedsim seeds before the call, or by a generator with a seed of its own: numpy.random.default_rng(0)"
        )


def refuse_other_images(job: Job, sha256: str) -> None:
    """BadInput where `data.factory` gives other images or labels when it is called again: no run could be repeated, and ranks would differ.

    sha256: of what it gave the first time.
    """
    if job.data.factory is not None and digest.digest(*opened(job.data, job.seed)) != sha256:
        raise BadInput(
            f'data.factory = "{job.data.factory}" gives other images, labels or users each time it is called; draw them by torch.randn,'
            " numpy.random.randn or random, which fedsim seeds before the call, or by a generator with a seed of its own:"
            " numpy.random.default_rng(0)"
        )


def values(module: nn.Module) -> dict[str, Tensor]:
    """Its parameters and buffers."""
    return {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether all values are the same, not-a-numbers too."""
    return one.shape == other.shape and one.dtype == other.dtype and bool(torch.equal(one.nan_to_num(), other.nan_to_num()))


def uncounted(settings: ModelSettings, module: nn.Module) -> str:
    """A note about weights that have no part in FLOPs and masks; empty where there are none."""
    if not is_own(settings):
        return ""
    kinds = (*WEIGHTED, nn.Embedding, nn.EmbeddingBag)
    others = [
        called(name, layer)
        for name, layer in module.named_modules()
        if not isinstance(layer, kinds) and any(value is not None and value.dim() > 1 for value in layer._parameters.values())
    ]
    more = f" and {len(others) - LISTED} more" if len(others) > LISTED else ""
    which = f"{', '.join(others[:LISTED])}{more}"
    return f"FLOPs and masks are of convolutions and linear layers alone, not of the weights of {which}" if others else ""


def not_stacked(settings: ModelSettings, module: nn.Module, data: Data) -> str:
    """Why clients of this model cannot be stacked; empty where they can."""
    if not is_own(settings):
        return ""
    x, y, _ = images_of(data)
    return ways.attempted(ways.STACKED, lambda: ways.compared(ways.STACKED, ways.stacked, module, x, y)).why


def not_sparse(settings: ModelSettings, module: nn.Module, data: Data) -> str:
    """Why its masked layers cannot run on sparse kernels; empty where they can."""
    if not is_own(settings):
        return ""
    x, y, _ = images_of(data)
    found = ways.attempted(ways.SPARSE, lambda: ways.sparse(module, x, y))
    return "" if found.right else found.why
