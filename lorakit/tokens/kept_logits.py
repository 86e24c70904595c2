"""What is kept of predictions while all are looked at, so that their loss and its gradient need no second product."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lorakit.head import weighted
from lorakit.tokens.head_loss import HeadLoss


class BestLogits:
    """The head's results for the best predictions so far, in its own precision.

    Args:
        pick: of scores (N,) the places (k,) to keep, ascending; −∞ is the score of those not yet seen, or given up.
            None: nothing is picked, for a run without data.
        count: N; kept: k.
    """

    made = "keep"

    def __init__(self, pick: Callable[[Tensor], Tensor] | None, count: int, kept: int):
        self.pick, self.seen = pick, 0
        self.scores = torch.full((count,), -torch.inf)
        # which prediction each row of `raw` belongs to; −1: none yet
        self.held = torch.arange(kept) if pick is None else torch.full((kept,), -1)
        self.raw: Tensor | None = None  # (k, V)

    def add(self, scores: Tensor, raw: Tensor, *_: object) -> None:
        """The next predictions' scores (n,) and the head's results (n, V), which may be kept as they are."""
        start, self.seen = self.seen, self.seen + len(raw)
        if self.raw is None:
            self.raw = raw if len(raw) == len(self.held) else raw.new_empty((len(self.held), raw.shape[1]))
        if self.pick is None:
            return
        self.scores[start : self.seen] = scores.cpu()
        best = self.pick(self.scores)
        best = best[~self.scores[best].isneginf()]
        self.scores = torch.full_like(self.scores, -torch.inf).index_put((best,), self.scores[best])
        entering = best[best >= start]
        free = (~torch.isin(self.held, best)).nonzero().squeeze(1)[: len(entering)]
        self.held[free] = entering
        for slot, row in zip(free.tolist(), (entering - start).tolist(), strict=True):
            if self.raw is not raw or slot != row:  # in `raw` itself rows move up, in order: none is lost
                self.raw[slot] = raw[row]

    @property
    def places(self) -> Tensor:
        """(k,) what was kept, ascending."""
        return self.held.sort().values

    def take(self, chosen: Any, loss: HeadLoss) -> tuple[Tensor, Tensor]:
        """Σ of the losses () of `choice.Chosen` ones, and its gradient by what the head was given (k, H); only once."""
        order = self.held.argsort().to(chosen.targets.device)
        raw, self.raw = self.raw, None
        here = torch.empty_like(chosen.targets).index_put((order,), chosen.targets)
        losses, gradient = _gradients([raw], here, loss)
        return losses.sum(), gradient[order]


class SeenLogits:
    """Of every prediction the head's results, or at once the gradient that they give.

    Args:
        at_once: the latter.
    """

    def __init__(self, at_once: bool):
        self.made, self.parts = "now" if at_once else "keep", []

    def add(self, scores: Tensor, raw: Tensor, targets: Tensor, loss: HeadLoss) -> None:
        """See `BestLogits.add`; targets: (n,)."""
        self.parts.append(_gradients([raw], targets, loss) if self.made == "now" else raw)

    def take(self, chosen: Any, loss: HeadLoss) -> tuple[Tensor, Tensor]:
        """See `BestLogits.take`."""
        if self.made == "keep":
            losses, gradient = _gradients(self.parts, chosen.targets, loss)
        else:
            losses, gradient = (torch.cat(part)[chosen.index] for part in zip(*self.parts, strict=True))
        self.parts = []
        return weighted(losses, chosen.weights).sum(), weighted(gradient, chosen.weights)


Held = BestLogits | SeenLogits


def _gradients(parts: list[Tensor], targets: Tensor, loss: HeadLoss) -> tuple[Tensor, Tensor]:
    """Losses (k,) and gradients (k, H) of the head's results, in parts, which are given up."""
    words, made = [*targets.split([len(raw) for raw in parts])], []
    weight = loss.head.module.weight.to(parts[0].dtype)
    while parts:
        made.append(loss.gradient(parts.pop(), words.pop(), weight))
    made.reverse()
    return torch.cat([losses for losses, _ in made]), torch.cat([gradient for _, gradient in made])


def with_gradient(value: Tensor, states: Tensor, gradient: Tensor) -> Tensor:
    """`value` (), whose gradient by `states` (k, H) is to be `gradient` (k, H)."""
    return value + ((states.float() - states.detach().float()) * gradient).sum()
