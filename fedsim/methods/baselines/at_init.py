"""Pruning at initialisation: masks are made before training by one of five scores, and stay; then averaging as in FedAvg.

Magnitude of the first or of server-pretrained weights; random; SNIP (Lee et al., ICLR 2019, arXiv:1810.02340), on the server's public
images or by the clients (SSFL: Ohib et al., TMLR 2024, arXiv:2405.09037); SynFlow (Tanaka et al., NeurIPS 2020, arXiv:2006.05467), without
data; GraSP (Wang et al., ICLR 2020, arXiv:2002.07376). In a job "magnitude", "random", "snip", "synflow" and "grasp" name this method with
its score.
`fedsim estimate`, whose clients score nothing, cannot know which layers SSFL keeps: it takes the first ones, whose FLOPs are the most.

Paper -> code:  w -> w,  m -> mask,  c -> "mask/",  kappa / n and d -> density,  |w g|, S -> saliency,  T of SynFlow -> iterations,
                T of GraSP's loss -> temperature,  D^b -> images_per_class,  p_k -> n_k / sum of n_k,  s -> the sum of "loss/score/"
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal

import torch

from fedsim.core import keys
from fedsim.core.keys import COUNT
from fedsim.core.tree import Tree, under, weigh
from fedsim.core.types import Batch, Data, Feed
from fedsim.core.validation import MAX_COHORT, TINY, within
from fedsim.costs import flops
from fedsim.errors import BadInput
from fedsim.federated import pretraining
from fedsim.federated.averaged_round import AveragedState
from fedsim.federated.protocol import ClientInput, Fleet, Report, Setting, Work
from fedsim.nn.net import Net
from fedsim.pruning.sparsity import layer_densities, saliency
from fedsim.pruning.sparsity.masked_averaging import MaskedAveraging, empty_layers, masked
from fedsim.pruning.sparsity.saliency import Budget, Scores

BY_GRADIENT = ("snip", "grasp")  # scores that read images
READ_BY = {"temperature": ("grasp",), "images_per_class": BY_GRADIENT}  # fields that some scores alone read


@dataclass(frozen=True)
class Sensitivity(Work):
    """|w g| of one batch of a client's images; total: n · |w g| of the `layers`, and n. Running statistics stay as they are."""

    feeds: tuple[Feed, ...]
    layers: tuple[str, ...] = ()

    def init_state(self, net: Net, sent: ClientInput) -> Tree:
        return {keys.score(layer): torch.zeros_like(sent.shared[keys.weight(layer)]) for layer in self.layers}

    def step(self, net: Net, sent: ClientInput, state: Tree, batch: Batch) -> tuple[Tree, torch.Tensor]:
        loss, gradient, _, _ = net.gradient(sent.shared, batch)
        return {keys.score(layer): s for layer, s in saliency.sensitivity(sent.shared, gradient, self.layers).items()}, loss

    def finish(self, net: Net, sent: ClientInput, state: Tree) -> Report:
        return Report(weigh(sent.n, under(state, keys.LOSSES)) | {COUNT: sent.n.double()})


@dataclass(frozen=True)
class AtInit(MaskedAveraging):
    """Prunes once, before training, and averages under masks that never move."""

    follows_rounds = False
    asynchronous = True

    score: Literal["magnitude", "random", "snip", "synflow", "grasp"] = "magnitude"  # the weights of largest score are kept
    scope: Literal["global", "layer"] | None = None  # one ranking of all layers, or one a layer by sharing; None: as published
    data: Literal["server", "clients"] = "server"  # who scores for SNIP: the server by public images, or the clients (SSFL)
    scoring_clients: int | None = None  # clients that score for SSFL; None: all
    iterations: int | None = None  # T, steps of d^(tau/T), each with new scores; None: 100 for SynFlow, 1 for the others
    images_per_class: int = 10  # public images of each class, at most, that SNIP and GraSP score by
    temperature: float = 200.0  # T of GraSP, by which it divides the logits
    pretrain_epochs: int = 0  # of the server on its public images (partition.public) before it scores; 0: the initial weights
    class_weights: int = 0  # weights that every output of the classifier keeps at least, within the same density; 0: as scored

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, scoring_clients=(1, inf), iterations=(1, inf), images_per_class=(1, inf), temperature=(TINY, inf))
        within(self, pretrain_epochs=(0, inf), class_weights=(0, inf))
        for name, scores in READ_BY.items():
            if self.score not in scores and getattr(self, name) != getattr(AtInit, name):
                raise BadInput(f"[method] {name} = {getattr(self, name)}: read for {' and '.join(scores)} alone; leave it out")
        if self.data == "clients" and self.score != "snip":
            raise BadInput(f'[method] data = "clients": clients score for "snip" alone, not for {self.score!r}; leave data out')
        if self.data == "server" and self.scoring_clients is not None:
            raise BadInput(f'[method] scoring_clients = {self.scoring_clients}: clients score where data = "clients" alone; leave it out')
        if self.data == "clients" and (self.iterations or 1) > 1:
            raise BadInput(f'[method] iterations = {self.iterations}: clients score once; take iterations = 1, or data = "server"')

    def init(self, setting: Setting, public: Data | None) -> AveragedState:
        self._check(setting, public)
        try:
            steps = self.steps(setting.net)
            self._check_outputs(setting.net, steps[-1])
            shared = setting.net.initial
            if public is not None and self.pretrain_epochs:
                shared = pretraining.pretrained(setting, public, self.pretrain_epochs)
            if self.data == "clients":
                saliency.check(setting.net.trained(shared), self.layers(setting.net))
                return AveragedState.begin(setting, shared)  # dense until the clients have scored, in round 0
            seen = public if self.score in BY_GRADIENT else None
            batches = [] if seen is None else pretraining.balanced(setting, seen, self.images_per_class)
            held = self.pruned(shared, lambda tree: self.scores(setting, tree, batches), steps, setting.net)
        except ValueError as error:
            raise error if isinstance(error, BadInput) else BadInput(f"[method] {error}") from error
        return AveragedState.begin(setting, masked(shared, held))

    def round(self, setting: Setting, state: AveragedState, fleet: Fleet, r: int) -> tuple[AveragedState, dict[str, float]]:
        if r > 0:
            return super().round(setting, state, fleet, r)
        if self.data == "clients":
            scores = self.of_clients(setting, state.shared, fleet)
            held = self.pruned(state.shared, lambda tree: scores, self.steps(setting.net), setting.net)
            state = AveragedState.begin(setting, masked(state.shared, held))
        return state, {"empty_layers": empty_layers(state.shared)}

    def plain(self, setting: Setting, r: int) -> dict[str, float] | None:
        return {} if r > 0 else None

    # ---- scores

    def scores(self, setting: Setting, tree: Tree, batches: Sequence[Batch]) -> Scores:
        """What the server makes of a model with its masks, on the server's bill: all passes are dense."""
        net, layers = setting.net.without_activation_pruning(), self.layers(setting.net)
        if self.score == "magnitude":
            return saliency.magnitude(tree, layers)
        if self.score == "random":
            return saliency.random(net, [group for group, _ in self.steps(net)[-1]], setting.seed)
        seen, each = sum(len(batch.y) for batch in batches), saliency.GRASP_PASSES if self.score == "grasp" else 1
        passes = 1 if self.score == "synflow" else seen * each  # forward and backward, of one image
        setting.server.charge("scoring", flops.feed_flops(setting.model_profile, passes).total)
        if self.score == "synflow":
            return saliency.synflow(net, tree, layers, setting.image_shape)
        if self.score == "snip":
            return saliency.snip(net, tree, layers, batches)
        return saliency.grasp(net, tree, layers, batches, self.temperature)

    def of_clients(self, setting: Setting, shared: Tree, fleet: Fleet) -> Scores:
        """sum of n_k |w g|, one local batch a client."""
        layers = self.layers(setting.net)
        feed = Feed("train", steps=1, batch=setting.train.batch, augment=False, dense_gradient_layers=layers)
        total = fleet.run(Sensitivity((feed,), layers), fleet.pick(self.scoring_clients, 0), shared).total
        return {layer: total[keys.score(layer)] for layer in layers}

    # ---- masks

    def pruned(self, tree: Tree, score: saliency.Score, steps: Sequence[Budget], net: Net) -> Tree:
        """The masks after all steps."""
        return saliency.pruned(tree, score, steps, list(net.sizes)[-1], self.class_weights)

    def steps(self, net: Net) -> list[Budget]:
        """What each step keeps. ValueError for a density that leaves less than one weight a layer."""
        count, layers = self.iterations or (100 if self.score == "synflow" else 1), self.layers(net)
        if (self.scope or ("layer" if self.score in ("magnitude", "random") else "global")) == "global":
            least = layer_densities.budget(net, layers, self.density)  # first, so that a message names the density of the job
            return [[(layers, max(least, layer_densities.budget(net, layers, d)))] for d in saliency.densities(self.density, count)]
        last = self.counts(net)
        every = [layer_densities.kept_counts(net, layers, d, self.sharing) for d in saliency.densities(self.density, count)]
        return [[((layer,), max(k, last[layer])) for layer, k in counts.items()] for counts in every]

    def _check(self, setting: Setting, public: Data | None) -> None:
        """BadInput where images or clients are missing."""
        if public is None and self.score in BY_GRADIENT and self.data == "server":
            other = ', or method.data = "clients"' if self.score == "snip" else ""
            raise BadInput(f"{self.score} scores weights by public images: set partition.public = 10 (a class){other}")
        if public is None and self.pretrain_epochs:
            raise BadInput("[method] pretrain_epochs needs public images: set partition.public = 10 (a class), or pretrain_epochs = 0")
        most = min(setting.clients, MAX_COHORT)
        if self.data == "clients" and (self.scoring_clients or setting.clients) > most:
            raise BadInput(f"[method] scoring_clients: of {setting.clients:,} clients at most {most:,} can score")

    def _check_outputs(self, net: Net, last: Budget) -> None:
        """ValueError where the outputs of the classifier would keep more weights than there are for it."""
        layer = list(net.sizes)[-1]
        outputs, each = net.shapes[layer][0], net.sizes[layer] // net.shapes[layer][0]
        count = next((count for layers, count in last if layer in layers), net.sizes[layer])
        if outputs * min(self.class_weights, each) > count:
            what = f"class_weights = {self.class_weights} for {outputs} outputs of {layer}, whose ranking keeps {count:,} weights"
            raise ValueError(f"{what}; take at most {count // outputs}")
