"""FLoRA: score every prediction without a graph, keep a share of them, and backpropagate their losses only."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.errors import LorakitError, require
from lorakit.gates.head import ROWS_CHECKED, Head, HeadCheck, find_head
from lorakit.gates.simple import check_state
from lorakit.gates.tokens import policies
from lorakit.gates.tokens.chosen import Chosen, Plan
from lorakit.gates.tokens.protocol import Look, Selected
from lorakit.gates.tokens.scores import TokenScore
from lorakit.gating import Gating
from lorakit.sketches.head_gradient import chunk_of, rows


class TokenGate:
    """A token selection (`TokenSelection`) in mode "gather": the whole batch through the layers, the chosen through the
    head. The gradient is exactly that of the chosen predictions' summed loss.

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
        self.settings, self.kind, self.seed, self.rank = settings, kind, seed, rank
        self.head: Head = find_head(model, kind)
        self.score = TokenScore(
            settings.score if settings.method == "flora" else "none",
            self.head,
            sketch_dim=settings.sketch_dim,
            topk_logits=settings.topk_logits,
            seed=seed,
        )
        self.draws = 0
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
        kept: list[Chosen] = []

        def replace(hidden: Tensor) -> Tensor:
            kept.append(self.choose(hidden.detach(), labels, look))
            return hidden.flatten(0, -2)[kept[0].where][None]

        with self._head_input(replace):
            outputs = model(**inputs)
        loss = kept[0].total(self.losses(outputs.logits, kept[0].targets))
        return self._selected(kept[0], lambda: loss, None, ())

    def verify(self, model: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> None:
        """Try on the batch's row with most predictions whether the model does what the selection relies on.

        Raises:
            LorakitError: its logits are not its head's linear map.
        """
        row = max(range(len(labels)), key=self._counts(labels).__getitem__)
        single = {
            name: value[row : row + 1] if torch.is_tensor(value) and len(value) == len(labels) else value
            for name, value in inputs.items()
        }
        training = model.training
        model.eval()  # without dropout: every pass is the same
        try:
            with torch.no_grad():
                self._try(model, single, labels[row : row + 1])
        finally:
            model.train(training)

    def _try(self, model: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> None:
        with self._head_input(lambda hidden: hidden[:, :ROWS_CHECKED]) as given:
            outputs = model(**inputs)
        if not given:
            raise LorakitError("the model's forward did not call its output head: there is nothing to select")
        HeadCheck(self.head)(given[0], outputs.logits)

    def divisor(self, labels: Tensor) -> int:
        return len(self._predictions(labels)[0]) if self.settings.weighted else sum(self.quotas(labels))

    def signature(self, labels: Tensor) -> Hashable:
        return (self.settings.mode, len(self._predictions(labels)[0]), sum(self.quotas(labels)))

    def report(self) -> dict[str, Any]:
        return {"gating": self.settings.model_dump(), **self.seen}

    def state_dict(self) -> dict[str, Any]:
        return {"draws": self.draws, "seen": dict(self.seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_state(state, self.state_dict(), f"tokens ({self.settings.method})")
        self.draws, self.seen = state["draws"], dict(state["seen"])

    # choosing ------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def dry(self, inputs: Mapping[str, Any], labels: Tensor) -> Iterator[None]:
        """While inside, `select` works on inputs without data; of the real `labels` it chooses as many as ever."""
        before = self.draws, dict(self.seen)
        self._dry = self._plan(inputs, labels)
        try:
            yield
        finally:
            self._dry = None
            self.draws, self.seen = before

    def _plan(self, inputs: Mapping[str, Any], labels: Tensor) -> Plan:
        where, targets = self._predictions(labels)
        index, weights = self._draw(torch.ones(len(where)), labels)
        return Plan(where, targets, Chosen(where[index], targets[index], len(where), weights))

    @torch.no_grad()
    def choose(self, hidden: Tensor, labels: Tensor, look: Look | None = None) -> Chosen:
        """Score hidden states (B, T, H) against labels (B, T) and keep a share; logits exist a chunk at a time."""
        if self._dry is not None:
            if self.scores(look):
                self.scored(hidden, self._dry.where, self._dry.targets, look)
            return self._dry.chosen
        where, targets = self._predictions(labels)
        if len(where):
            low, high = (int(bound) for bound in targets.aminmax())
            require(low >= 0 and high < self.head.outputs, "labels", (low, high), f"must be below {self.head.outputs}")
        scored = self.scored(hidden, where, targets, look) if self.scores(look) and len(where) else None
        index, weights = self._draw(None if scored is None else scored[0].cpu(), labels)
        index = index.to(where.device)
        weights = None if weights is None else weights.to(where.device)
        chosen = Chosen(where[index], targets[index], len(where), weights)
        if scored is not None:
            losses = scored[1]
            require(bool(torch.isfinite(losses).all()), "logits", "non-finite loss", "must be finite")
            chosen.loss_sum, chosen.chosen_sum = losses.double().sum(), chosen.total(losses[index]).double()
        return chosen

    def scores(self, look: Look | None) -> bool:
        """Whether all predictions go through the head: to be scored, or for a batch gate to look at."""
        return self.score.name != "none" or look is not None

    @torch.no_grad()
    def scored(self, hidden: Tensor, where: Tensor, targets: Tensor, look: Look | None = None) -> tuple[Tensor, Tensor]:
        """Scores and losses (N,) of the predictions at `where` (N,) of the flattened hidden states."""
        # the chosen ones' own loss will need as many rows of logits; large products are faster
        chunk = max(chunk_of(self.head.outputs), policies.quota(len(where), self.settings.topk_tokens))
        flat, found = hidden.flatten(0, -2), []
        for places, labels in zip(where.split(chunk), targets.split(chunk), strict=True):
            h = flat[places]
            logits = self.head.logits(h)
            if look is not None:
                look(h, logits, labels, F.cross_entropy(logits, labels, reduction="none"))
            found.append(self.score(h, logits, labels))
        scores, losses = zip(*found, strict=True)
        return torch.cat(scores), torch.cat(losses)

    def quotas(self, labels: Tensor) -> list[int]:
        """How many predictions are kept: one number for the batch, or one per sequence."""
        counts = self._counts(labels)
        groups = [sum(counts)] if self.settings.per == "batch" else counts
        return [policies.quota(count, self.settings.topk_tokens) for count in groups]

    def _counts(self, labels: Tensor) -> list[int]:
        """Predictions of each sequence."""
        shifted = labels[:, 1:] if self.kind == "causal" else labels
        return (shifted != -100).sum(1).tolist()

    def _predictions(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        return rows(labels, self.kind)

    def _draw(self, scores: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Places (k,) among the batch's predictions, and the weights of sampled ones."""
        counts = self._counts(labels)
        groups = [sum(counts)] if self.settings.per == "batch" else counts
        generator = self._generator()
        places, weights, first = [], [], 0
        for count, k in zip(groups, self.quotas(labels), strict=True):
            if k:
                mine = None if scores is None else scores[first : first + count]
                index, weight = self._pick(mine, count, k, generator)
                places.append(first + index)
                weights.append(weight)
            first += count
        index = torch.cat(places) if places else torch.zeros(0, dtype=torch.long)
        return index, torch.cat(weights) if places and self.settings.weighted else None

    def _pick(
        self, scores: Tensor | None, count: int, k: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        if self.settings.method == "random":
            return policies.uniform(count, k, generator), None
        if not self.settings.weighted:
            return policies.largest(scores, k), None
        index, probabilities = policies.proportional(scores, k, generator)
        return index, (1 / probabilities).float()

    def _generator(self) -> torch.Generator:
        """Drawn from (seed, rank, how many batches were seen), so that a checkpoint of one rank serves all."""
        drawn = random.Random(f"{self.seed}/{self.rank}/{self.draws}").getrandbits(63)
        self.draws += 1
        return torch.Generator().manual_seed(drawn)

    # the model's head ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _head_input(self, replace: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
        """While inside, the head is given `replace(hidden)` for its first input; what it was given is collected."""
        given: list[Tensor] = []

        def hook(_: nn.Module, arguments: tuple) -> tuple | None:
            if given:
                return None  # `replace` itself asks the head for logits
            given.append(arguments[0])
            given[0] = replace(arguments[0])
            return (given[0], *arguments[1:])

        handle = self.head.module.register_forward_pre_hook(hook)
        try:
            yield given
        finally:
            handle.remove()

    @staticmethod
    def losses(logits: Tensor, targets: Tensor) -> Tensor:
        """(k,) of logits (1, k, V) and targets (k,)."""
        return F.cross_entropy(logits.flatten(0, -2).float(), targets, reduction="none")

    def _selected(
        self, chosen: Chosen, finish: Callable[[], Tensor], backpropagated: int | None, key: Hashable
    ) -> Selected:
        predictions, kept = chosen.predictions, len(chosen.where)
        self.seen = {"predictions": self.seen["predictions"] + predictions, "chosen": self.seen["chosen"] + kept}
        return Selected(
            finish=finish,
            predictions=predictions,
            chosen=kept,
            backpropagated=backpropagated,
            key=key,
            loss_sum=chosen.loss_sum,
            chosen_sum=chosen.chosen_sum,
            flops=self.score.flops(predictions) if chosen.loss_sum is not None else 0.0,
        )


def refused(kind: str) -> str:
    """Why token selection does not go with this kind of task."""
    return f"needs a language model: a task of kind {kind!r} has one prediction per example and nothing to choose among"
