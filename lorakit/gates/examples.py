"""The best rows of a larger batch: gates of batches, asked about rows one by one, and the best of these taken.

A candidate batch has r times as many rows as a step trains on. One forward of all of them, without a graph, scores
them; the best then get a forward and a backward of their own. Selective Backprop (Jiang et al. 2019) takes large
losses, RHO-LOSS (Mindermann et al. 2022) those that a reference model does not have, GREATS (Wang et al. 2024) and UDS
look at gradients, InfoBatch (Qin et al. 2024) leaves out small losses and rescales. "No Train No Gain" (Kaddour et al.
2023): at equal cost Selective Backprop and RHO-LOSS gained nothing there, so what is compared here has an equal cost.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.switch import disabled
from lorakit.errors import require
from lorakit.gates.log import GateLog
from lorakit.head import HeadInput
from lorakit.seams import Candidate, Gate, Inputs

Statistics = Callable[[nn.Module, Inputs, Tensor], tuple[Tensor, Tensor | None]]  # (B, 4), perhaps logits
Total = Callable[[Tensor], Tensor]


class BestRows(Gate):
    """Chooses one of `candidates` rows, those that `gate` prefers: exactly so many, so no threshold has to be found.

    Args:
        gate: measures rows, and learns from the chosen ones of a batch as from one batch.
        candidates: r, rows looked at for each that is trained on, 2 or more.
    """

    kept = ("gate",)

    def __init__(self, gate: Gate, candidates: int):
        require(type(candidates) is int and candidates > 1, "candidates", candidates, "must be 2 rows or more")
        self.gate, self.candidates, self.target_rate = gate, candidates, 1 / candidates
        for name in ("name", "needs_hidden", "scores_novelty", "of_examples", "m", "k", "d_hidden", "vocab_size"):
            setattr(self, name, getattr(gate, name, None))

    @torch.no_grad()
    def look(self, model: nn.Module, inputs: Inputs, statistics: Statistics) -> tuple[Tensor, Tensor | None]:
        """The loss of each row (N,), the mean over its own labels, and logits where they are held, of one forward.

        Args:
            inputs: with labels; statistics: of a batch, see `training.loss.example_statistics`.

        Raises:
            ParameterError: no labels, or such that a gate which scores them cannot: floating-point ones.
        """
        inputs = dict(inputs)
        labels = inputs.pop("labels", None)
        fine = labels is not None and not (self.gate.looks and labels.is_floating_point())
        told = f"gate {self.name!r} of examples needs classes or words: no regression, no sets, no spans"
        require(fine, "labels", getattr(labels, "dtype", None), told)
        if not self.gate.looks:
            return torch.zeros(len(labels)), None
        found, logits = statistics(model, inputs, labels)
        if self.of_examples:
            with disabled(model):
                found[:, 0] -= statistics(model, inputs, labels)[0][:, 0]
        return found[:, 0] / found[:, 1].clamp_min(1), logits

    def rows(self, losses: Tensor, logits: Tensor | None, labels: Tensor, head: HeadInput | None) -> list[Candidate]:
        """Each row as a batch of one; `head` kept what the head was given in `look`, where the gate asks for it."""
        if head is None:
            return [Candidate(loss, None, None) for loss in losses]
        parts = (losses, logits.split(1), labels.split(1), head.take(logits).split(1))
        return [Candidate(*row, softcap=head.head.softcap) for row in zip(*parts, strict=True)]

    def choose(self, inputs: Inputs, rows: list[Candidate], log: GateLog, total: Total) -> dict[str, Tensor]:
        """The chosen rows of `inputs`, one of `candidates` but at least one, cut to the longest of them.

        Args:
            rows: what is known of them; log: told of every decision; total: sums a vector over all processes.
        """
        measured = [self.gate.measure(row) for row in rows]
        scores = [self.gate.score(each) for each in measured]
        preferred = torch.tensor([*map(self.gate.preference, scores, measured)], dtype=torch.float64)
        chosen = sorted(preferred.sort(descending=True, stable=True)[1][: len(rows) // self.candidates or 1].tolist())
        self.gate.learn(total(sum(measured[row] for row in chosen)))
        for row, score in enumerate(scores):
            log.decided(row in chosen, score)
        kept = {name: value[chosen] for name, value in inputs.items()}
        if (mask := kept.get("attention_mask")) is None:
            return kept
        longest = int(mask.any(0).nonzero().max()) + 1
        return {name: v[:, :longest] if v.shape == mask.shape else v for name, v in kept.items()}

    def flops(self, candidate: Candidate) -> float:
        return self.gate.flops(candidate)

    def report(self) -> dict[str, Any]:
        return self.gate.report() | {"level": "example", "candidates": self.candidates}
