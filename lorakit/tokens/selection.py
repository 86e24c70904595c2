"""FLoRA: score every prediction without a graph, keep a share of them, and backpropagate their losses only.

With all of them kept it is the exact loss, whose logits never exist at once.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lorakit.adapters.switch import disabled
from lorakit.errors import require, require_finite
from lorakit.head import Head, ambient_autocast, by_sequence, find_head, fullest_row, require_words, rows
from lorakit.modules import evaluating, set_until
from lorakit.seams import Inputs, Look, Selected, check_state
from lorakit.settings import Gating, TokenSettings
from lorakit.tokens.choice import Chosen, Plan, Shares
from lorakit.tokens.head_loss import KEPT, HeadLoss, cheapest, likelihoods, require_plain_loss, words
from lorakit.tokens.kept_logits import BestLogits, Held, SeenLogits, with_gradient
from lorakit.tokens.scores import TokenScore


class TokenGate:
    """A token selection (`TokenSelection`) in mode "gather": the whole batch through the layers, a backward through the
    head for the chosen. The gradient is exactly that of the chosen predictions' summed loss.

    Args:
        settings: what to choose and how; method "baseline" keeps all.
        model: a causal or masked language model; kind: "causal" (the state at t predicts the label at t + 1), "masked".
        loss: which of the chosen, and how many logits at once; smoothing: of the labels.
        seed: of sketch and draws; rank: of this process, whose draws are its own.

    Raises:
        ParameterError: kind "classify": one prediction per example leaves nothing to choose; see `HeadLoss`.
        LorakitError: the model has no linear output head.
    """

    two_pass, makes_loss = False, True

    def __init__(
        self,
        settings: Gating,
        model: nn.Module,
        kind: str,
        *,
        loss: TokenSettings,
        seed: int = 0,
        rank: int = 0,
        smoothing: float = 0.0,
    ):
        require(kind in ("causal", "masked"), "gating.method", settings.method, refused(kind))
        self.settings, self.kind, self.selective, self.model = settings, kind, settings.selective, model
        self.shares = Shares(settings, kind, seed=seed, rank=rank)
        self.head: Head = find_head(model, kind)
        self.smoothing, self.loss = smoothing, HeadLoss(self.head, loss, smoothing)
        self.score = TokenScore(settings, self.head, model, seed)
        self._same = True  # whether what is scored is what gets the backward, so that its logits serve both
        self.seen = {"predictions": 0, "chosen": 0}
        self._dry: Plan | None = None

    # a trainer's interface -----------------------------------------------------------------------------

    def select(self, model: Callable[..., Any], inputs: Inputs, labels: Tensor, look: Look | None = None) -> Selected:
        """See `TokenSelection`.

        Raises:
            ParameterError: labels outside the vocabulary, or logits that are not finite.
        """

        def take(hidden: Tensor) -> tuple[Chosen, tuple[Tensor, torch.autocast]]:
            states = words(hidden, labels)
            chosen = self.choose(states, labels, look)
            return chosen, (states[chosen.where], ambient_autocast(hidden.device))

        with self._scoring(model, inputs, labels):
            chosen, *made = self.head.reached(model, inputs, take)
        return self._selected(chosen, lambda: self._loss_of(chosen, made.pop), None)

    def _loss_of(self, chosen: Chosen, run: Callable[[], tuple[Tensor, torch.autocast]]) -> Tensor:
        """Σ of the chosen losses; `run` gives what the head would be given (k, H), and under which autocast."""
        if chosen.held is None:
            states, autocast = run()
            with autocast:
                return self.loss(states, chosen.targets, chosen.weights)
        losses, gradient = chosen.held.take(chosen, self.loss)  # before a second pass: its memory is freed
        return with_gradient(losses, run()[0], gradient)

    def _scoring(self, model: Callable[..., Any], inputs: Inputs, labels: Tensor) -> contextlib.ExitStack:
        """While inside, the model's forward leaves what the score is made of."""
        if self.score.excess:  # the base's own losses first
            where, targets = self._rows(labels)
            with disabled(self.model), torch.no_grad():
                losses = lambda hidden: self.loss.nll(words(hidden, labels)[where], targets)  # noqa: E731
                self.score.base = self.head.reached(model, inputs, losses)
        return self.score.watching()

    @torch.no_grad()
    def statistics(self, model: Callable[..., Any], inputs: Inputs, labels: Tensor) -> Tensor:
        where, targets = rows(labels, self.kind)

        def take(hidden: Tensor) -> Tensor:
            return by_sequence(self.loss.losses(words(hidden, labels)[where], targets), where, labels.shape)

        return self.head.reached(model, inputs, take)

    def verify(self, model: nn.Module, inputs: Inputs, labels: Tensor) -> None:
        """Try on the batch's row with most predictions whether the model does what the selection relies on.

        Raises:
            LorakitError: its logits are not its head's linear map, its own loss not their cross-entropy.
        """
        single, own = fullest_row(inputs, labels, self.kind)
        with evaluating(model), torch.no_grad():  # without dropout: every pass is the same
            self._try(model, single, own)

    def _try(self, model: nn.Module, inputs: Inputs, labels: Tensor) -> None:
        require_plain_loss(self.loss, model, inputs, labels, self.kind)

    def divisor(self, labels: Tensor) -> int:
        groups = self.shares.groups(labels)
        return sum(groups if self.settings.weighted else self.shares.quotas(groups))

    def sizes(self, labels: Tensor, look: Look | None = None) -> tuple[int, ...]:
        """Predictions that the head runs for to look at them, those whose gradient it makes then, and its chunks."""
        groups = self.shares.groups(labels)
        looked = sum(groups) if self.scores(look) else 0
        now = looked if self._plan_of(looked, sum(self.shares.quotas(groups)), look) == "now" else 0
        return (looked, now, self._chunks(looked))

    def _chunks(self, count: int) -> int:
        """They count where the head does something once a call, as an adapter of W0's size does."""
        return 0 if self.head.is_fixed else -(-count // self.loss.chunk)

    def report(self) -> dict[str, Any]:
        return {"gating": self.settings.model_dump(), **self.seen} if self.selective else {}

    def state_dict(self) -> dict[str, Any]:
        return {"draws": self.shares.draws, "seen": dict(self.seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_state(state, self.state_dict(), f"tokens ({self.settings.method})")
        self.shares.draws, self.seen = state["draws"], dict(state["seen"])

    # choosing ------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def dry(self, inputs: Inputs, labels: Tensor) -> Iterator[list[Tensor]]:
        """While inside, `select` works on inputs without data; of the real `labels` it chooses as many as ever.

        What it gives is what `select` would make and hold, and here finds made: the masks of a second pass.
        """
        with contextlib.ExitStack() as stack:
            set_until(stack, self.shares, draws=self.shares.draws)
            set_until(stack, self, seen=self.seen, _dry=self._plan(inputs, labels))
            yield tree_leaves(self._dry.masks)

    def _plan(self, inputs: Inputs, labels: Tensor) -> Plan:
        where, targets = rows(labels, self.kind)
        picked = self.shares.pick(torch.ones(len(where)), self.shares.groups(labels), self.shares.generator())
        return Plan(where, targets, _chosen(where, targets, *picked))

    def _rows(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        return rows(labels, self.kind) if self._dry is None else (self._dry.where, self._dry.targets)

    @torch.no_grad()
    def choose(self, hidden: Tensor, labels: Tensor, look: Look | None = None) -> Chosen:
        """Score hidden states (B, T, H) against labels (B, T) and keep a share; logits exist a chunk at a time."""
        where, targets = self._rows(labels)
        if self._dry is not None:
            chosen = self._dry.chosen
            if not self.scores(look):
                return chosen
            held = self._held(len(where), len(chosen.where), None, look)
            self.scored(hidden, where, targets, look, held)
            return replace(chosen, held=held)
        groups = self.shares.groups(labels)
        pick = functools.partial(self.shares.pick, groups=groups, generator=self.shares.generator())
        require_words(targets, self.head.outputs)
        of_layers = None if self.score.updates is None else words(self.score.updates, labels)[where].cpu()
        if not len(where) or not self.scores(look):
            return _chosen(where, targets, *pick(of_layers))
        held = self._held(len(where), sum(self.shares.quotas(groups)), lambda scores: pick(scores)[0], look)
        scores, losses = self.scored(hidden, where, targets, look, held)
        require_finite(bool(torch.isfinite(losses).all()), "logits", "non-finite loss")
        scores = scores.cpu() if of_layers is None else of_layers
        index, weights = (held.places, None) if isinstance(held, BestLogits) else pick(scores)
        chosen = _chosen(where, targets, index, weights)
        return replace(chosen, held=held, loss_sum=self.loss.weighed(losses).double().sum())

    def _plan_of(self, looked: int, used: int, look: Look | None) -> str:
        """How the gradient of those used comes about, see `cheapest`; the head must be a formula for any but "again".

        What waits for a gate's decision is used as often as the gate accepts.
        """
        if not (looked and self._same and self.loss.is_fixed):
            return "again"
        best = not self.selective or self.settings.method == "flora" and not self.settings.weighted and self.score.seen
        size = (used if self.selective else looked) * self.head.outputs * self.head.module.weight.element_size()
        return cheapest(used * getattr(look, "rate", 1.0), looked, size if best else torch.inf, KEPT * self.loss.room)

    def _held(self, looked: int, used: int, pick: Callable[[Tensor], Tensor] | None, look: Look | None) -> Held | None:
        """What keeps something of the predictions that are looked at, until their loss is made."""
        if (plan := self._plan_of(looked, used, look)) == "again":
            return None
        return BestLogits(pick, looked, used) if plan == "keep" and self.selective else SeenLogits(plan == "now")

    def scores(self, look: Look | None) -> bool:
        """Whether all predictions go through the head: to be scored, or for a batch gate to look at."""
        return self.score.seen or look is not None

    @torch.no_grad()
    def scored(
        self, hidden: Tensor, where: Tensor, targets: Tensor, look: Look | None = None, held: Held | None = None
    ) -> tuple[Tensor, Tensor]:
        """Scores and losses (N,) of the predictions at `where` (N,) of flattened hidden states; `held` keeps some."""
        found: list[tuple[Tensor, Tensor]] = []
        run, _ = self.loss.runner(hidden.device)
        for h, y in self.loss.parts(hidden.flatten(0, -2)[where], targets):
            raw = run(h)
            logits = self.head.capped(raw.float())
            if held is None:
                raw = None  # its memory is free for what the scores need
            elif logits is raw and self.score.overwrites:
                raw = raw.clone()
            losses = None
            if look is not None:
                losses, *maxima = likelihoods(logits, y, grouped=getattr(look, "grouped", False))
                look(h, logits, y, losses, *maxima)
            smoothed = likelihoods(logits, y, self.smoothing)[0] if self.smoothing else None
            scores, losses = self.score(h, logits, y, losses, len(found) * self.loss.chunk)
            found.append((scores, smoothed if self.smoothing else losses))
            logits = None
            if held is not None:
                held.add(scores, raw, y, self.loss)
            raw = None  # before the next chunk's
        return tuple(map(torch.cat, zip(*found, strict=True)))

    def _selected(
        self, chosen: Chosen, finish: Callable[[], Tensor], backpropagated: int | None, ran: tuple[int, ...] = ()
    ) -> Selected:
        now = {"predictions": chosen.predictions, "chosen": (kept := len(chosen.where))}
        self.seen = {name: self.seen[name] + count for name, count in now.items()}
        made = "" if chosen.held is None else chosen.held.made
        told = {"made": made, "ran": ran, "head": (kept, self._chunks(kept)), "loss_sum": chosen.loss_sum}
        flops = self.score.flops(chosen.predictions, chosen.loss_sum is not None)
        return Selected(finish, **now, backpropagated=backpropagated, **told, flops=flops)


def _chosen(where: Tensor, targets: Tensor, index: Tensor, weights: Tensor | None) -> Chosen:
    index, weights = index.to(where.device), None if weights is None else weights.to(where.device)
    return Chosen(where[index], targets[index], len(where), index, weights)


def refused(kind: str) -> str:
    """Why token selection does not go with this kind of task."""
    return f"needs a language model: a task of kind {kind!r} has one prediction per example and nothing to choose among"
