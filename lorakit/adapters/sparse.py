"""Sparse LoRA: s(t) = s·(1 − (1 − (t − t0)/(t1 − t0))³) of A's and B's entries, or of the ranks, are zero at time t."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.adapters.attachment import adapter_layers
from lorakit.adapters.lora import LoRALayer
from lorakit.errors import LorakitError, require

KINDS = ("magnitude", "l1", "structured")
FACTORS = {"both": ("lora_A", "lora_B"), "A": ("lora_A",), "B": ("lora_B",)}


@dataclass(frozen=True)
class SparseSettings:
    """How zeros come into LoRA's factors while it trains; `lorakit.training.sparsify` puts them there.

    Args:
        kind: "magnitude" zeroes the smallest entries of each matrix; "l1" shrinks by the proximal step and freezes what
            is zero at `end`; "structured" zeroes whole ranks, which `compact` can remove.
        sparsity: share of zeros of each matrix (structured: of ranks) from `end` on, rounded to whole entries.
        factors: "both", "A" or "B"; structured takes both by nature.
        start, end: shares of the budget between which the zeros appear, by the cubic of Zhu & Gupta (2017).
        l1: the penalty λ of "l1", fixed; 0: found at each step, for each matrix, so that its zeros follow the cubic.
            With a fixed λ the share of zeros is an outcome, and `sparsity` is not used.

    Raises:
        ParameterError: out of range, under the name the parameter has in `lorakit.Params`.
    """

    kind: str = "magnitude"
    sparsity: float = 0.5
    factors: str = "both"
    start: float = 0.2
    end: float = 0.8
    l1: float = 0.0

    def __post_init__(self) -> None:
        require(self.kind in KINDS, "sparsify", self.kind, f"must be one of {', '.join(KINDS)}")
        require(_within(self.sparsity) and self.sparsity < 1, "sparsity", self.sparsity, "must be in [0, 1)")
        require(self.factors in FACTORS, "sparse_factors", self.factors, f"must be one of {', '.join(FACTORS)}")
        both = self.kind != "structured" or self.factors == "both"
        require(both, "sparse_factors", self.factors, "structured pruning takes a rank from both: must be 'both'")
        require(_within(self.start) and self.start < 1, "prune_start", self.start, "must be in [0, 1)")
        after = _within(self.end) and self.end > self.start
        require(after, "prune_end", self.end, f"must be after prune_start={self.start} and at most 1")
        require(_is_number(self.l1) and self.l1 >= 0, "l1", self.l1, "must be a number, at least 0")
        require(self.kind == "l1" or self.l1 == 0, "l1", self.l1, f"is for sparsify 'l1', not {self.kind!r}")

    @property
    def fixed_penalty(self) -> bool:
        """Whether λ is given, so that no share of zeros is aimed at."""
        return self.l1 > 0

    def target(self, share: float) -> float:
        """s(t): the share of zeros due when `share` of the budget is spent."""
        passed = min(max((share - self.start) / (self.end - self.start), 0.0), 1.0)
        return self.sparsity * (1 - (1 - passed) ** 3)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _within(value: object) -> bool:
    return _is_number(value) and 0 <= value <= 1


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The LoRA layers by path.

    Raises:
        LorakitError: there are none.
    """
    layers = {path: layer for path, layer in adapter_layers(model).items() if isinstance(layer, LoRALayer)}
    if not layers:
        raise LorakitError(f"this {type(model).__name__} has no LoRA layers; call attach(model, 'sparse') first")
    return layers


def zeros_due(target: float, size: int) -> int:
    """How many of `size` entries (or ranks) are to be zero, to the nearest."""
    return round(target * size)


def require_something_left(settings: SparseSettings, layers: Mapping[str, LoRALayer]) -> None:
    """Refuse a sparsity that leaves a matrix, or a layer, nothing at all, or that rounds to no zero anywhere in it.

    Raises:
        ParameterError: naming the matrix.
    """
    if settings.fixed_penalty or settings.sparsity == 0:
        return
    for path, layer in layers.items():
        sizes = {f"entries of {path}.{name}": getattr(layer, name).numel() for name in FACTORS[settings.factors]}
        if settings.kind == "structured":
            sizes = {f"ranks of {path}": layer.settings.rank}
        for what, size in sizes.items():
            count = zeros_due(settings.sparsity, size)
            problem = f"prunes {'all' if count else 'none'} of the {size} {what}; at least one is to go and one to stay"
            require(0 < count < size, "sparsity", settings.sparsity, problem)


def prox(values: Tensor, threshold: Tensor | float) -> Tensor:
    """argmin_x ½(x − p)² + τ|x| = sign(p)·max(|p| − τ, 0), elementwise; zeros are +0.

    τ is λ times the learning rate, once: SoRA's public code shrinks by twice that.
    """
    return values.sign() * (values.abs() - threshold).clamp_min(0) + 0.0  # −0 + 0 is +0, whose bits are all zero


def prune_smallest(scores: Tensor, pruned: Tensor, count: int) -> Tensor:
    """`pruned` grown to `count` entries, by those with the lowest `scores` ≥ 0; what is pruned stays so.

    By indices, not by a threshold: in a fresh B all scores are equal, and a threshold would take all of them or none.
    """
    lowest = scores.masked_fill(pruned, -1).flatten().topk(count, largest=False).indices
    return torch.zeros_like(pruned).flatten().index_fill_(0, lowest, True).view_as(pruned)


def rank_scores(A: Tensor, B: Tensor) -> Tensor:
    """‖A_k‖·‖B_k‖ of each rank k, (r,): the Frobenius norm of its term B_k A_k of BA; A is (r, in), B (out, r)."""
    return A.norm(dim=1) * B.norm(dim=0)


def has_path(A: Tensor, B: Tensor) -> Tensor:
    """Whether any rank has a living entry in both factors, a 0-dim bool: without one BA = 0, and its gradient too."""
    return ((A != 0).any(1) & (B != 0).any(0)).any()


def best_path(A: Tensor, B: Tensor, pruned_A: Tensor, pruned_B: Tensor) -> dict[str, Tensor]:
    """Flat indices, (1,), of one entry of A and one of B whose rank they share: the last that may go.

    The rank is that with the largest max|A_k|·max|B_k| among those with a living entry in both.
    """
    left_A, left_B = A.abs().masked_fill(pruned_A, -1), B.abs().masked_fill(pruned_B, -1)
    (most_A, column), (most_B, row) = left_A.max(1), left_B.max(0)
    dead = (most_A < 0) | (most_B < 0)
    rank = (most_A * most_B).masked_fill(dead, -1).argmax().view(1)
    return {"lora_A": rank * A.shape[1] + column[rank], "lora_B": row[rank] * B.shape[1] + rank}
