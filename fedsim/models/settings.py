"""The [model] section of a job."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from fedsim.core import entry_points
from fedsim.errors import BadInput
from fedsim.kernels.nsconv import OVER

NORMS = ("batch", "group", "none", "nsconv")
PLACES = ("norm", "affine")
CHOICES = ("saliency", "random")
GATE_FIELDS = ("gate_sigmoid", "gate_bias", "gate_l1", "gate_choice", "gate_place")
MATCHES = ("params", "flops", "memory")
OF_FEDSIM = ("match", "norm", "nsconv_over", "standardise", "norm_weight", "detach_shortcut")


@dataclass(frozen=True)
class ModelSettings:
    """The section [model]: the network that all clients train."""

    name: str = "cnn"  # cnn | simple_cnn | lenet5 | resnet8/18/20/32/56 | vgg11 | vgg16 | mobilenet_v2 | mobilenet_v2_cifar
    width: int | None = None  # channels of the first convolution, all others in proportion; None: the model's own
    norm: str = "batch"  # batch | group (one group: all channels of an image) | none | nsconv (normalised sparse convolutions, no norms)
    nsconv_over: str = "all"  # entries that a normalised filter's statistics are of: all (pruned ones as 0) | kept
    standardise: bool = False  # weight-standardised convolutions
    norm_weight: float = 1.0  # where the scales of norms start
    detach_shortcut: bool = False  # no gradient through the down-sampling shortcuts of resnet8/20/32/56
    match: str | None = None  # a small dense model whose params | flops | memory are at most match_density of the full one's
    match_density: float = 1.0  # of match: the share that the small model costs at most
    gate_keep: float | None = None  # d: dynamic gates leave this share of a convolution's channels open for an image; None: no gates
    gate_sigmoid: bool | None = None  # of the pooled input that a gate reads; None: on; off in networks with additions and group norms
    gate_bias: float | None = None  # where the biases of gates start; None: 1, in networks with additions 0
    gate_l1: float = 0.0  # times the sum of an image's gates, added to the loss
    gate_choice: str = "saliency"  # the channels that stay: those of the largest gates, or for each image random ones
    gate_place: str = "norm"  # a gate multiplies behind the norm, or in the place of the norm's scale: affine
    factory: str | None = None  # "package.module:function", called as function(shape=(C, H, W), classes=…), in place of name

    def __post_init__(self) -> None:
        self._check_gates()
        if self.norm not in NORMS:
            raise entry_points.unknown("[model] norm", self.norm, NORMS)
        if self.nsconv_over not in OVER:
            raise entry_points.unknown("[model] nsconv_over", self.nsconv_over, OVER)
        if self.norm != "nsconv" and self.nsconv_over != "all":
            raise BadInput(f'model.nsconv_over = {self.nsconv_over!r} needs model.norm = "nsconv"; it is {self.norm!r}')
        if self.norm == "nsconv" and self.standardise:
            raise BadInput('model.standardise is for other norms: model.norm = "nsconv" normalises its filters by itself')
        if self.match is not None and self.match not in MATCHES:
            raise entry_points.unknown("[model] match", self.match, MATCHES)
        if not 0 < self.match_density <= 1:
            raise BadInput(f"[model] match_density = {self.match_density}: should be above 0 and at most 1")
        if self.match is None and self.match_density != 1:
            raise BadInput(f"model.match_density = {self.match_density} needs model.match: one of {', '.join(MATCHES)}")
        if not isfinite(self.norm_weight) or self.norm_weight <= 0:
            raise BadInput(f"[model] norm_weight = {self.norm_weight}: should be above 0")
        if self.factory is not None and not all(self.factory.partition(":")):
            raise BadInput(f'model.factory = "{self.factory}" should be "package.module:function"')
        if self.factory is not None and (given := self.of_fedsim):
            raise BadInput(f"model.{given[0]} is for the models of fedsim, and model.factory makes its own; leave it out")
        if self.width is not None and self.width < 1:
            raise BadInput(f"[model] width = {self.width}: should be at least 1")

    @property
    def of_fedsim(self) -> list[str]:
        """The fields given that only fedsim's own models read."""
        return [name for name in OF_FEDSIM if getattr(self, name) != getattr(ModelSettings, name)]

    def _check_gates(self) -> None:
        for name, known in {"gate_place": PLACES, "gate_choice": CHOICES}.items():
            if getattr(self, name) not in known:
                raise entry_points.unknown(f"[model] {name}", getattr(self, name), known)
        if self.gate_l1 < 0 or not isfinite(self.gate_l1):
            raise BadInput(f"[model] gate_l1 = {self.gate_l1}: should be at least 0")
        if self.gate_keep is None:
            given = [name for name in GATE_FIELDS if getattr(self, name) != getattr(ModelSettings, name)]
            if given:
                raise BadInput(f"model.{given[0]} is a setting of dynamic gates, which need model.gate_keep; it is not given")
        elif self.match is not None:
            raise BadInput("model.match cannot narrow a network with dynamic gates; give model.width instead")
        elif self.gate_bias is not None and not isfinite(self.gate_bias):
            raise BadInput(f"[model] gate_bias = {self.gate_bias}: should be a finite number")
        elif not 0 < self.gate_keep <= 1:
            raise BadInput(f"[model] gate_keep = {self.gate_keep}: should be a share of the channels, above 0 and at most 1")
