"""DWFNP: "Device-Wise Federated Network Pruning", CVPR 2024. What no client needs is cut; each client runs its own part of the rest.

Two hypernetworks draw gates for the channels: one for the base network, which all clients share, and one, fed with an embedding per
client, for the client's own sub-network. They and the weights are trained in turn (co-training); then the base is cut for good, and
the smaller network is fine-tuned under the clients' gates. Every client runs a FLOPs share `client_flops_share` of the whole.

Paper -> code:  W -> w,  v -> base, u_i -> choice, m_i = v * u_i -> gate,  z -> z, e_i -> embedding,  theta_b, theta_d -> hyper,
                p -> flops_share, p_d -> client_flops_share,  T -> HypernetTraining.flops,  r_W -> train.steps,  E0 -> warmup
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, Literal

from torch import Tensor

from fedsim.core import keys
from fedsim.core.keys import GATE, GATE_GRADIENT, GATE_STEPS
from fedsim.core.tree import Tree, under
from fedsim.core.types import Data, Feed
from fedsim.core.validation import TINY, read_where, within
from fedsim.errors import BadInput
from fedsim.federated.averaged_round import AveragedState, trained
from fedsim.federated.protocol import ClientInput, Fleet, Method, Setting
from fedsim.nn.net import Net
from fedsim.pruning.cut_and_finetune import MAX_JUDGES, CutAndFinetune, all_seen, held_out_accuracy
from fedsim.pruning.flops_constraint import FlopsConstraint
from fedsim.pruning.gate_controller import GateController, GateState
from fedsim.pruning.hypernet_training import HypernetTraining


@dataclass(frozen=True)
class Best:
    shared: Tree
    masks: GateState
    accuracy: float  # on held-out images


@dataclass(frozen=True)
class State(AveragedState):
    masks: GateState
    kept: Tree = field(default_factory=dict)  # group -> positions of the channels that the cut has left; empty before it
    best: Best | None = None  # with checkpoint_choice = "best"


@dataclass(frozen=True)
class DWFNP(CutAndFinetune, Method[State]):
    """Prunes channels by a base network for all and a sub-network for each client."""

    flops_share: float = 0.8  # p, FLOPs share of the gated layers that the base keeps
    client_flops_share: float | tuple[float, ...] | dict[str, float] = 0.5  # p_d, what a client uses; or for each client or kind of device
    personal: bool = True  # false: the base alone ("static"), no sub-networks of clients
    freeze_weights: bool = False  # no weight steps between warm-up and cut ("one-shot"): masks are learned on a trained, frozen network
    hypernet: Literal["server", "client"] = "server"  # client: until the cut clients train copies, which are averaged (the authors' way)
    warmup: int | None = None  # E0, rounds of weights alone; None: a tenth of the rounds before the cut
    hyper_interval: int = 5  # local steps: until the cut masks learn in rounds whose number of steps is a multiple
    hyper_steps: int = 1  # steps of the hypernetworks in such a round
    hyper_split: Literal["held", "overlap"] = "held"  # images that masks learn from: held out, or a tenth of those weights see too
    hyper_lr: float = 1e-3  # AdamW, of theta_b (a tenth of it in the second half of co-training), theta_d and the embeddings
    hyper_decay: float = 1e-2  # AdamW's decoupled weight decay
    embed_sync: Literal["owner", "mean"] = "owner"  # with hypernet = "client"; mean: the table is averaged, a change divided by the clients
    tau: float = 0.4  # temperature of the Gumbel-sigmoid
    bias: float = 3.0  # b, added to the logits: at the start every channel is kept
    regulariser: Literal["two_sided", "one_sided"] = "two_sided"  # whether the FLOPs are also pulled up to the target
    slope: float = 1.0  # s, of the regulariser below its target (the authors: 10 for MobileNetV2)
    depthwise: Literal["squared", "true"] = "squared"  # FLOPs of depth-wise layers: c^2 / C as in the authors' code, or c
    mask_eval: Literal["mean", "sample"] = "mean"  # gates for cut and evaluation: noise replaced by its mean, or one hard draw
    finetune: Literal["dynamic", "static"] = "dynamic"  # after the cut theta_d goes on learning, or the clients' gates stay
    unseen_clients: Literal["refuse", "accept"] = "refuse"  # clients in no cohort while masks are learned, and so with untrained embeddings
    checkpoint_choice: Literal["last", "best"] = "last"  # best: by accuracy on held-out images in the second half of fine-tuning

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, flops_share=(TINY, 1), tau=(TINY, inf), hyper_interval=(1, inf), hyper_steps=(1, inf), hyper_lr=(0, inf))
        within(self, hyper_decay=(0, inf), warmup=(0, inf), slope=(0, inf), bias=(-inf, inf))

    def unread(self) -> dict[str, str]:
        of_clients = read_where(self, "personal", (True,), "client_flops_share", "unseen_clients", "finetune")
        return read_where(self, "regulariser", ("two_sided",), "slope") | of_clients

    def init(self, setting: Setting, public: Data | None) -> State:
        self.check(setting)
        self._check(setting)
        shared = under(setting.net.initial, keys.WEIGHTS, keys.BUFFERS)
        return State.begin(setting, shared, masks=self.controller(setting).begin())

    def round(self, setting: Setting, state: State, fleet: Fleet, r: int) -> tuple[State, dict[str, float]]:
        controller = self.controller(setting)
        found: dict[str, float] = {}
        if r == 0:
            if self.personal and self.unseen_clients == "refuse":
                all_seen(setting, fleet, (later for later in range(1, self.cut_after(setting) + 1) if self.learns(setting, later)))
            return state, found
        last, cohort = self.cut_after(setting), fleet.pick(setting.cohort, r)
        if self.learns(setting, r):
            learn = controller.step_on_clients if self.hypernet == "client" else controller.step_on_server
            lr = self.hyper_lr * (0.1 if 2 * (r - 1) >= last else 1.0)
            for j in range(self.hyper_steps):
                state = replace(state, masks=learn(state.masks, fleet, state.shared, cohort, (r, j), self._feed(setting), lr))
        if not (self.freeze_weights and self.warm(setting) < r <= last):
            state, found = self._trained(setting, state, fleet, cohort, r)
        if r == last:
            state = self._cut(setting, state)
        if self.checkpoint_choice == "best" and 2 * (r - last) > setting.rounds - last:
            state = self._better(setting, state, fleet)
        return state, found | controller.shares((state.best or state).masks, cohort)

    def deploy(self, setting: Setting, state: State, fleet: Fleet, cohort: Sequence[int]) -> tuple[Tree, Tree, Net | None]:
        controller, model = self.controller(setting), state.best or state
        shared, masks = under(model.shared, keys.WEIGHTS, keys.BUFFERS), model.masks
        own = {GATE: self._left(state, controller.choices(masks, cohort))} if self.personal and len(cohort) else {}
        if state.kept:
            return shared, own, setting.net.cut(state.kept)
        return shared | {GATE: controller.base(masks)}, own, None

    def model_of(self, net: Net, sent: ClientInput) -> Tree:
        held = sent.tree({})
        return held | {GATE: held[GATE].float()} if GATE in held and self.norm_over == "all" else held

    # ---- phases

    def warm(self, setting: Setting) -> int:
        """E0: the last round in which weights are trained alone."""
        return self.cut_after(setting) // 10 if self.warmup is None else self.warmup

    def learns(self, setting: Setting, r: int) -> bool:
        """Whether round `r` has a step of the hypernetworks beside the weights' (after the cut the weights' own steps are theirs)."""
        return self.warm(setting) < r <= self.cut_after(setting) and r * setting.train.steps % self.hyper_interval == 0

    def _trained(self, setting: Setting, state: State, fleet: Fleet, cohort: list[int], r: int) -> tuple[State, dict[str, float]]:
        """Local training under hard gates, drawn anew for every step; after the cut under soft ones, which go on learning."""
        controller, work, masks = self.controller(setting), self.training(setting, r), state.masks
        own, net = {}, setting.net.cut(state.kept) if state.kept else None
        if not state.kept and r > self.warm(setting):
            own = {GATE_STEPS: controller.steps(masks, cohort, r, setting.train.steps)}
        elif state.kept and self.personal:
            gate = controller.soft(masks, cohort, r) if self.finetune == "dynamic" else controller.choices(masks, cohort)
            own = {GATE: self._left(state, gate)}
        state, reply = trained(setting, fleet, state, r, work, own, net)
        if GATE_GRADIENT in reply.each:
            masks = controller.step_in_finetuning(masks, reply.clients or cohort, r, reply.each[GATE_GRADIENT])
        return replace(state, masks=masks), {"lr": work.lr}

    def _cut(self, setting: Setting, state: State) -> State:
        """The base for good: a smaller network, whose optimiser begins afresh."""
        base = self.controller(setting).base(state.masks)
        kept = setting.net.channels.kept(base)
        shared = self.cut(setting, state.shared, kept)
        masks = replace(state.masks, base=base, cut=True)
        return self.begun(setting, state, State.begin(setting, shared, masks=masks, kept=kept), kept)

    def _left(self, state: State, gate: Tensor) -> Tensor:
        """(…, n') of (…, n): the gates of the channels that the cut has left."""
        return gate[..., state.masks.base] if state.kept else gate

    def _better(self, setting: Setting, state: State, fleet: Fleet) -> State:
        """With the model of this round, if it classifies more held-out images rightly than the best before."""
        judges = fleet.pick(None, 0)[:MAX_JUDGES]
        model = self.deploy(setting, replace(state, best=None), fleet, judges)
        accuracy = held_out_accuracy(self, self._feed(setting), fleet, judges, model)
        better = state.best is None or accuracy > state.best.accuracy
        return replace(state, best=Best(model[0], state.masks, accuracy)) if better else state

    # ---- what it is made of

    def controller(self, setting: Setting) -> GateController:
        """How gates are drawn and learned."""
        flops = FlopsConstraint.of(setting.net.channels, setting.model_profile, self.depthwise == "squared")
        rule = HypernetTraining(flops, self.tau, self.bias, self.flops_share, self.slope, self.regulariser == "two_sided")
        given: Any = self.client_flops_share
        targets = tuple(given.values()) if isinstance(given, dict) else given if hasattr(given, "__len__") else (given,)
        sample, averaged = self.mask_eval == "sample", self.embed_sync == "mean"
        return GateController(rule, setting.seed, targets, self.personal, self.hyper_lr, self.hyper_decay, sample, averaged, setting.server)

    def _feed(self, setting: Setting) -> Feed:
        """A batch of the images that masks learn from."""
        overlap = self.hyper_split == "overlap"
        share, split = (0.1, "probe") if overlap else (1.0, "held")
        return Feed(split, steps=1, batch=setting.train.batch, augment=setting.train.augment, share=share, cost="inputs")

    def _check(self, setting: Setting) -> None:
        """BadInput for phases without rounds, masks without images, and budgets that cannot be met."""
        last, warm = self.cut_after(setting), self.warm(setting)
        if not setting.train.steps:
            raise BadInput("[train] dwfnp draws gates for every local step: set train.steps = 5, in place of epochs")
        if not any(self.learns(setting, r) for r in range(warm + 1, last + 1)):
            steps = f"no round from {warm + 1} to {last} has a number of steps divisible by hyper_interval = {self.hyper_interval}"
            early = f"the cut comes after round {last}; take warmup < {last}, not {warm}"
            raise BadInput(f"[method] the hypernetworks would never be trained: {early if warm >= last else steps}")
        if self.hyper_split == "held" and not setting.holdout:
            raise BadInput('dwfnp learns its masks on held-out images: set partition.holdout = 0.1, or hyper_split = "overlap"')
        if self.embed_sync == "mean" and self.hypernet == "server":
            raise BadInput('[method] embed_sync = "mean" needs hypernet = "client": on the server every embedding has its own row')
        if self.checkpoint_choice == "best" and last == setting.rounds:
            raise BadInput('[method] checkpoint_choice = "best" chooses among the rounds after the cut: take cotrain < rounds')
        self.controller(setting).check(setting.clients)
