"""FLoRA: score every prediction without a graph, keep a share of them, and backpropagate their losses only."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.errors import LorakitError, require, require_finite
from lorakit.head import (
    IGNORED,
    ROWS_CHECKED,
    Head,
    HeadCheck,
    find_head,
    replaced_input,
    rows,
    same_loss,
    shifted,
    takes_labels,
)
from lorakit.modules import evaluating
from lorakit.seams import Look, Selected, check_state
from lorakit.settings import Gating
from lorakit.sketches.head_gradient import chunk_of
from lorakit.tokens.choice import Chosen, Plan, Shares, quota
from lorakit.tokens.kept_logits import BestLogits, with_gradient
from lorakit.tokens.scores import TokenScore


class TokenGate:
    """A token selection (`TokenSelection`) in mode "gather": the whole batch through the layers, a backward through the
    head for the chosen. The gradient is exactly that of the chosen predictions' summed loss.

    Args:
        settings: what to choose and how.
        model: a causal or masked language model; kind: "causal" (the state at t predicts the label at t + 1), "masked".
        seed: of sketch and draws; rank: of this process, whose draws are its own.

    Raises:
        ParameterError: kind "classify": one prediction per example leaves nothing to choose.
        LorakitError: the model has no linear output head.
    """

    selective, two_pass = True, False

    def __init__(self, settings: Gating, model: nn.Module, kind: str, *, seed: int = 0, rank: int = 0):
        require(kind in ("causal", "masked"), "gating.method", settings.method, refused(kind))
        self.settings, self.kind = settings, kind
        self.shares = Shares(settings, kind, seed=seed, rank=rank)
        self.head: Head = find_head(model, kind)
        self.score = TokenScore(
            settings.score if settings.method == "flora" else "none",
            self.head,
            sketch_dim=settings.sketch_dim,
            topk_logits=settings.topk_logits,
            seed=seed,
        )
        self._keeps = settings.method == "flora" and not settings.weighted
        self.seen = {"predictions": 0, "chosen": 0}
        self._dry: Plan | None = None

    # a trainer's interface -----------------------------------------------------------------------------

    def select(
        self, model: Callable[..., Any], inputs: Mapping[str, Any], labels: Tensor, look: Look | None = None
    ) -> Selected:
        """See `TokenSelection`.

        Raises:
            ParameterError: labels outside the vocabulary, or logits that are not finite.
        """
        made: list[tuple[Chosen, Tensor]] = []

        def chosen_only(hidden: Tensor) -> Tensor:
            chosen = self.choose(hidden.detach(), labels, look)
            made.append((chosen, hidden.flatten(0, -2)[chosen.where]))
            return made[0][1][None] if chosen.best is None else hidden[:, :0]

        with replaced_input(self.head, chosen_only):
            outputs = model(**inputs)
        chosen, states = made[0]
        if chosen.best is not None:
            return self._selected(chosen, lambda: self._kept_loss(chosen, states), None)
        loss = chosen.total(self.losses(outputs.logits, chosen.targets))
        return self._selected(chosen, lambda: loss, None)

    def _kept_loss(self, chosen: Chosen, states: Tensor) -> Tensor:
        """Σ of the chosen losses, from the logits that were kept; states (k, H): what the head would be given."""
        losses, gradient = chosen.best.take(chosen.targets, self.head)
        return with_gradient(losses.sum(), states, gradient)

    def verify(self, model: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> None:
        """Try on the batch's row with most predictions whether the model does what the selection relies on.

        Raises:
            LorakitError: its logits are not its head's linear map, its own loss not their cross-entropy.
        """
        row = int((shifted(labels, self.kind) != IGNORED).sum(1).argmax())
        single = {
            name: value[row : row + 1] if torch.is_tensor(value) and len(value) == len(labels) else value
            for name, value in inputs.items()
        }
        with evaluating(model), torch.no_grad():  # without dropout: every pass is the same
            self._try(model, single, labels[row : row + 1])

    def _try(self, model: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> None:
        own = {"labels": torch.arange(ROWS_CHECKED, device=labels.device)[None]} if takes_labels(model) else {}
        with replaced_input(self.head, lambda hidden: hidden[:, :ROWS_CHECKED]) as given:
            outputs = model(**inputs, **own)
        if not given:
            raise LorakitError("the model's forward did not call its output head: there is nothing to select")
        HeadCheck(self.head)(given[0], outputs.logits)
        if own and outputs.loss is not None:
            where, targets = rows(own["labels"], self.kind)
            mean = self.losses(outputs.logits.flatten(0, 1)[where], targets).mean()
            if not same_loss(outputs.loss, mean):
                raise LorakitError(
                    f"{type(model).__name__}: its own loss is {float(outputs.loss):.4g}, the mean cross-entropy of its "
                    f"labels {float(mean):.4g}: chosen tokens know the latter only; take off what it adds or "
                    "puts in its place (loss_function, router losses)"
                )

    def divisor(self, labels: Tensor) -> int:
        groups = self.shares.groups(labels)
        return sum(groups if self.settings.weighted else self.shares.quotas(groups))

    def sizes(self, labels: Tensor, look: Look | None = None) -> tuple[int, ...]:
        """Predictions scored and chunks they come in; chosen ones, where the head runs for them again.

        Chunks count where the head does something once a call, as an adapter of W0's size does.
        """
        groups = self.shares.groups(labels)
        scored = sum(groups) if self.scores(look) else 0
        fixed = self._head_is_fixed()
        again = 0 if self.two_pass or (self._keeps and fixed and scored) else sum(self.shares.quotas(groups))
        return (scored, 0 if fixed else -(-scored // self._chunk(scored)), again)

    def report(self) -> dict[str, Any]:
        return {"gating": self.settings.model_dump(), **self.seen}

    def state_dict(self) -> dict[str, Any]:
        return {"draws": self.shares.draws, "seen": dict(self.seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_state(state, self.state_dict(), f"tokens ({self.settings.method})")
        self.shares.draws, self.seen = state["draws"], dict(state["seen"])

    # choosing ------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def dry(self, inputs: Mapping[str, Any], labels: Tensor) -> Iterator[None]:
        """While inside, `select` works on inputs without data; of the real `labels` it chooses as many as ever."""
        before = self.shares.draws, dict(self.seen)
        self._dry = self._plan(inputs, labels)
        try:
            yield
        finally:
            self._dry = None
            self.shares.draws, self.seen = before

    def _plan(self, inputs: Mapping[str, Any], labels: Tensor) -> Plan:
        where, targets = rows(labels, self.kind)
        picked = self.shares.pick(torch.ones(len(where)), self.shares.groups(labels), self.shares.generator())
        return Plan(where, targets, _chosen(where, targets, *picked))

    @torch.no_grad()
    def choose(self, hidden: Tensor, labels: Tensor, look: Look | None = None) -> Chosen:
        """Score hidden states (B, T, H) against labels (B, T) and keep a share; logits exist a chunk at a time."""
        if self._dry is not None:
            where, targets, chosen = self._dry.where, self._dry.targets, self._dry.chosen
            if not self.scores(look):
                return chosen
            best = self._best(len(where), len(chosen.where), None)
            self.scored(hidden, where, targets, look, best)
            return replace(chosen, best=best)
        where, targets = rows(labels, self.kind)
        groups = self.shares.groups(labels)
        pick = functools.partial(self.shares.pick, groups=groups, generator=self.shares.generator())
        if len(where):
            low, high = (int(bound) for bound in targets.aminmax())
            require(low >= 0 and high < self.head.outputs, "labels", (low, high), f"must be below {self.head.outputs}")
        if not self.scores(look) or not len(where):
            return _chosen(where, targets, *pick(None))
        best = self._best(len(where), sum(self.shares.quotas(groups)), lambda scores: pick(scores)[0])
        scores, losses = self.scored(hidden, where, targets, look, best)
        require_finite(bool(torch.isfinite(losses).all()), "logits", "non-finite loss")
        index, weights = pick(scores.cpu()) if best is None else (best.places, None)
        chosen = _chosen(where, targets, index, weights)
        chosen_sum = chosen.total(losses[index.to(losses.device)]).double()
        return replace(chosen, best=best, loss_sum=losses.double().sum(), chosen_sum=chosen_sum)

    def _best(self, count: int, kept: int, pick: Callable[[Tensor], Tensor] | None) -> BestLogits | None:
        """What keeps the logits of the chosen, where their loss needs no more than those.

        A batch that waits for a gate's decision holds them, (k, V), until then.
        """
        return BestLogits(pick, count, kept) if self._keeps and self._head_is_fixed() else None

    def _head_is_fixed(self) -> bool:
        head = self.head.module
        return type(head) is nn.Linear and not any(p.requires_grad for p in head.parameters())

    def _chunk(self, count: int) -> int:
        """Of so many predictions, how many at a time: as many rows as the chosen ones' logits have, which are needed
        in any case, or more; large products are faster."""
        return max(chunk_of(self.head.outputs), quota(count, self.settings.topk_tokens))

    def scores(self, look: Look | None) -> bool:
        """Whether all predictions go through the head: to be scored, or for a batch gate to look at."""
        return self.score.name != "none" or look is not None

    @torch.no_grad()
    def scored(
        self, hidden: Tensor, where: Tensor, targets: Tensor, look: Look | None = None, best: BestLogits | None = None
    ) -> tuple[Tensor, Tensor]:
        """Scores and losses (N,) of the predictions at `where` (N,) of the flattened hidden states.

        Args:
            best: keeps the chosen ones' logits meanwhile.
        """
        chunk = self._chunk(len(where))
        flat, found = hidden.flatten(0, -2), []
        for places, labels in zip(where.split(chunk), targets.split(chunk), strict=True):
            h = flat[places]
            raw = self.head.module(h)
            logits = self.head.capped(raw.float())
            if best is None:
                raw = None  # its memory is free for what the scores need
            elif logits is raw and self.score.overwrites:
                raw = raw.clone()
            if look is not None:
                look(h, logits, labels, F.cross_entropy(logits, labels, reduction="none"))
            found.append(self.score(h, logits, labels))
            if best is not None:
                best.add(found[-1][0], raw)
            raw = logits = None  # before the next chunk's
        scores, losses = zip(*found, strict=True)
        return torch.cat(scores), torch.cat(losses)

    @staticmethod
    def losses(logits: Tensor, targets: Tensor) -> Tensor:
        """(k,) of logits (1, k, V) and targets (k,)."""
        return F.cross_entropy(logits.flatten(0, -2).float(), targets, reduction="none")

    def _selected(
        self, chosen: Chosen, finish: Callable[[], Tensor], backpropagated: int | None, ran: tuple[int, ...] = ()
    ) -> Selected:
        predictions, kept = chosen.predictions, len(chosen.where)
        self.seen = {"predictions": self.seen["predictions"] + predictions, "chosen": self.seen["chosen"] + kept}
        return Selected(
            finish=finish,
            predictions=predictions,
            chosen=kept,
            backpropagated=backpropagated,
            kept=chosen.best is not None,
            ran=ran,
            loss_sum=chosen.loss_sum,
            chosen_sum=chosen.chosen_sum,
            flops=self.score.flops(predictions) if chosen.loss_sum is not None else 0.0,
        )


def _chosen(where: Tensor, targets: Tensor, index: Tensor, weights: Tensor | None) -> Chosen:
    index = index.to(where.device)
    return Chosen(where[index], targets[index], len(where), None if weights is None else weights.to(where.device))


def refused(kind: str) -> str:
    """Why token selection does not go with this kind of task."""
    return f"needs a language model: a task of kind {kind!r} has one prediction per example and nothing to choose among"
