"""The chosen predictions' logits, kept while all are scored: their loss and its gradient need no second product."""

from collections.abc import Callable

import torch
from torch import Tensor

from lorakit.head import Head
from lorakit.sketches.head_gradient import error_in_place


class BestLogits:
    """The head's results for the best predictions so far, in its own precision.

    Args:
        pick: of scores (N,) the places (k,) to keep, ascending; −∞ is the score of those not yet seen, or given up.
            None: nothing is picked, for a run without data.
        count: N; kept: k.
    """

    def __init__(self, pick: Callable[[Tensor], Tensor] | None, count: int, kept: int):
        self.pick, self.seen = pick, 0
        self.scores = torch.full((count,), -torch.inf)
        self.held = torch.full((kept,), -1)  # which prediction each row of `raw` belongs to; −1: none yet
        self.raw: Tensor | None = None  # (k, V)

    def add(self, scores: Tensor, raw: Tensor) -> None:
        """The next predictions' scores (n,) and the head's results (n, V), which may be kept as they are."""
        start, self.seen = self.seen, self.seen + len(raw)
        if self.raw is None:
            self.raw = raw if len(raw) == len(self.held) else raw.new_empty((len(self.held), raw.shape[1]))
        if self.pick is None:
            self.held = torch.arange(len(self.held))
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

    def take(self, targets: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        """Losses (k,) and their gradients by what the head was given (k, H), both in the order of `places`; only once.

        Args:
            targets: (k,), in that order.
        """
        order = self.held.argsort().to(targets.device)
        raw, self.raw = self.raw, None
        dtype, weight = raw.dtype, head.module.weight
        logits = head.capped(raw.float())
        del raw
        here = torch.empty_like(targets).index_put((order,), targets)
        error, scale, losses = error_in_place(logits, here, head.softcap)
        if dtype == torch.float16:  # in which s·e may be too large
            error, scale = error / scale[:, None], torch.ones_like(scale)
        gradient = (error.to(dtype) @ weight.to(dtype)).float() / scale[:, None]
        return losses[order], gradient[order]


def with_gradient(value: Tensor, states: Tensor, gradient: Tensor) -> Tensor:
    """`value` (), whose gradient by `states` (k, H) is to be `gradient` (k, H)."""
    return value + ((states.float() - states.detach().float()) * gradient).sum()
