"""Sparse LoRA: s(t) = s·(1 − (1 − (t − t0)/(t1 − t0))³) of A's and B's entries, or of the ranks, are zero at time t."""

import torch
from torch import Tensor, nn

from lorakit.adapters.attachment import adapter_layers
from lorakit.adapters.lora import LoRALayer
from lorakit.errors import LorakitError, require
from lorakit.settings import SparseSettings

FACTORS = {"both": ("lora_A", "lora_B"), "A": ("lora_A",), "B": ("lora_B",)}


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The LoRA layers by path.

    Raises:
        LorakitError: there are none.
    """
    if not (layers := {path: one for path, one in adapter_layers(model).items() if isinstance(one, LoRALayer)}):
        raise LorakitError(f"this {type(model).__name__} has no LoRA layers; call attach(model, 'sparse') first")
    return layers


def prunable_layers(model: nn.Module, settings: SparseSettings) -> dict[str, LoRALayer]:
    """The LoRA layers by path, which the sparsity that `settings` ask for fits.

    Raises:
        LorakitError: there are none.
        ParameterError: it leaves a matrix, or a layer, nothing at all, or rounds to no zero anywhere in it (named).
    """
    layers = lora_layers(model)
    if settings.l1 > 0 or settings.sparsity == 0:
        return layers
    for path, layer in layers.items():
        sizes = {f"entries of {path}.{name}": getattr(layer, name).numel() for name in FACTORS[settings.sparse_factors]}
        if settings.sparsify == "structured":
            sizes = {f"ranks of {path}": layer.settings.rank}
        for what, size in sizes.items():
            count = round(settings.sparsity * size)
            problem = f"prunes {'all' if count else 'none'} of the {size} {what}; at least one is to go and one to stay"
            require(0 < count < size, "sparsity", settings.sparsity, problem)
    return layers


def prox(values: Tensor, threshold: Tensor | float) -> Tensor:
    """argmin_x ½(x − p)² + τ|x| = sign(p)·max(|p| − τ, 0), elementwise; zeros are +0.

    τ is λ times the learning rate, once: SoRA's public code shrinks by twice that.
    """
    return values.sign() * (values.abs() - threshold).clamp_min(0) + 0.0  # −0 + 0 is +0, whose bits are all zero


def prune_smallest(scores: Tensor, pruned: Tensor, count: int) -> Tensor:
    """`pruned` grown to `count` entries, by those with the lowest `scores` ≥ 0; what is pruned stays so.

    By indices, not by a threshold: in a fresh B all scores are equal, and a threshold would take all of them or none.
    """
    lowest = scores.masked_fill(pruned, -torch.inf).flatten().topk(count, largest=False).indices
    return torch.zeros_like(pruned).flatten().index_fill_(0, lowest, True).view_as(pruned)


def has_path(A: Tensor, B: Tensor) -> Tensor:
    """Whether any rank has a living entry in both factors, a 0-dim bool: without one BA = 0, and its gradient too."""
    return ((A != 0).any(1) & (B != 0).any(0)).any()


def best_path(A: Tensor, B: Tensor, pruned_A: Tensor, pruned_B: Tensor) -> dict[str, Tensor]:
    """Flat indices, (1,), of one entry of A and one of B whose rank they share: the last that may go.

    The rank is that with the largest max|A_k|·max|B_k| among those with a living entry in both.
    """
    left_A, left_B = A.abs().masked_fill(pruned_A, -torch.inf), B.abs().masked_fill(pruned_B, -torch.inf)
    (most_A, column), (most_B, row) = left_A.max(1), left_B.max(0)
    rank = (most_A * most_B).masked_fill((most_A < 0) | (most_B < 0), -torch.inf).argmax().view(1)
    return {"lora_A": rank * A.shape[1] + column[rank], "lora_B": row[rank] * B.shape[1] + rank}
