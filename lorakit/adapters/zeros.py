"""What zeros are worth: nnz(A), nnz(B), nnz(BA), erank(BA) = exp(−Σ p ln p) with p = σ/Σσ, bytes; and taking them out.

Compaction: BA = Σ_k B_k A_k, so the ranks whose term is zero are removed and the output stays what it was.
"""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from lorakit.adapters.attachment import attachment_of, require_unmerged
from lorakit.adapters.lora import LoRALayer
from lorakit.adapters.packed import stored_bytes
from lorakit.adapters.sparse import lora_layers
from lorakit.modules import replace_modules, unwrapping

COUNTED, RANKS = ("A", "B", "BA", "merged"), ("effective_rank", "numerical_rank")


@torch.no_grad()
@unwrapping
def sparsity_report(model: nn.Module) -> dict[str, Any]:
    """Zeros, ranks and sizes of the LoRA on `model`, however it was trained; JSON values.

    Returns:
        entries, nonzero: counts over all layers of A, B, BA and the merged weight W0 + s·BA.
        zeros: their share.
        effective_rank, numerical_rank: of BA, means over layers.
        bytes: of all A and B, without task head and file header: "dense", "packed", and "compacted" (zero ranks gone).
        layers: for each path the shares of zeros and the two ranks.

    Raises:
        LorakitError: there is no LoRA on `model`.
    """
    layers = lora_layers(model)
    counts = {path: _counts(layer) for path, layer in layers.items()}
    ranks = {path: _ranks(layer) for path, layer in layers.items()}
    factors = [factor for layer in layers.values() for factor in layer.adapter_parameters().values()]
    compacted = sum(len(living_ranks(la)) * (la.lora_A[0].nbytes + la.lora_B[:, 0].nbytes) for la in layers.values())
    sizes = {"dense": sum(f.nbytes for f in factors), "packed": sum(map(stored_bytes, factors)), "compacted": compacted}
    nonzero, entries = ({name: sum(c[name][i] for c in counts.values()) for name in COUNTED} for i in (0, 1))
    zeros = {name: 1 - nonzero[name] / entries[name] for name in COUNTED}
    means = {name: sum(own[name] for own in ranks.values()) / len(ranks) for name in RANKS}
    shares = {path: {name: 1 - left / whole for name, (left, whole) in own.items()} for path, own in counts.items()}
    told = {path: shares[path] | ranks[path] for path in layers}
    return {"entries": entries, "nonzero": nonzero, "zeros": zeros, **means, "bytes": sizes, "layers": told}


def _counts(layer: LoRALayer) -> dict[str, tuple[int, int]]:
    """Non-zero and all entries of each of `COUNTED`."""
    A, B = layer.lora_A != 0, layer.lora_B != 0
    # of BA: how many ranks add to each entry; a sum that cancels is not a zero
    matrices = {"A": A, "B": B, "BA": B.float() @ A.float(), "merged": layer.weight}
    return {name: (int(torch.count_nonzero(matrix)), matrix.numel()) for name, matrix in matrices.items()}


def _ranks(layer: LoRALayer) -> dict[str, float]:
    """Effective rank, and numerical: singular values above the largest times max(out, in) times the precision."""
    sigma = singular_values(layer.lora_A, layer.lora_B)
    rounding = sigma.max() * max(layer.out_features, layer.in_features) * torch.finfo(layer.lora_A.dtype).eps
    return {"effective_rank": effective_rank(sigma), "numerical_rank": int((sigma > rounding).sum())}


def singular_values(A: Tensor, B: Tensor) -> Tensor:
    """Those of BA that can be non-zero, (min(r, in, out),), float64: of R_B R_Aᵀ with B = Q_B R_B, Aᵀ = Q_A R_A."""
    R_A, R_B = (torch.linalg.qr(matrix.double()).R for matrix in (A.T, B))
    return torch.linalg.svdvals(R_B @ R_A.T)


def effective_rank(sigma: Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy & Vetterli 2007); 0 for the zero matrix."""
    if not sigma.any():
        return 0.0
    return float(torch.special.entr(sigma / sigma.sum()).sum().exp())


# compaction --------------------------------------------------------------------------------------------


@torch.no_grad()
@unwrapping
def compact(model: nn.Module) -> nn.Module:
    """Replace every LoRA layer by one without its zero ranks, in place, and return `model`; its output is the same.

    A rank adds nothing where its row of A or its column of B is all zeros. A layer with nothing else keeps one of them,
    as LoRA has no rank 0; a LoRA that was never trained (B = 0) therefore shrinks to rank 1. α changes with the rank,
    so that the scale α/r (rsLoRA: α/√r) does not. `save_adapter` writes the new ranks, and PEFT reads them.

    The factors are new parameters: an optimizer or a controller made before holds the old ones, make a new one.

    Raises:
        LorakitError: no LoRA is attached, or it is merged. The model is then as it was.
    """
    attachment, layers = attachment_of(model), lora_layers(model)
    require_unmerged(model)
    smaller = {path: _smaller(layer, living_ranks(layer)) for path, layer in layers.items()}
    replace_modules(model, {layer: smaller[path] for path, layer in layers.items()})
    ((common, _),) = Counter(layer.settings for layer in smaller.values()).most_common(1)  # what a file states once
    targets = {path: smaller[path].settings for path in attachment.targets}
    model.lorakit_attachment = replace(attachment, settings=common, targets=targets)
    return model


def living_ranks(layer: LoRALayer) -> Tensor:
    """Indices of the ranks that add something to BA; one, the largest, where none does."""
    A, B = layer.lora_A, layer.lora_B
    living = ((A != 0).any(1) & (B != 0).any(0)).nonzero().flatten()
    return living if len(living) else (A.norm(dim=1) + B.norm(dim=0)).argmax().view(1)


def _smaller(layer: LoRALayer, ranks: Tensor) -> LoRALayer:
    """`layer` with `ranks` alone, on the same frozen base."""
    settings, ratio = layer.settings, len(ranks) / layer.settings.rank
    alpha = settings.alpha * (math.sqrt(ratio) if settings.rslora else ratio)
    new = type(layer)(layer.base_layer, settings.but(rank=len(ranks), alpha=alpha), Generator())
    new.scaling = layer.scaling  # the same number, not one that rounds differently
    for name, dim in (("lora_A", 0), ("lora_B", 1)):
        old = getattr(layer, name)
        setattr(new, name, nn.Parameter(old.index_select(dim, ranks), requires_grad=old.requires_grad))
    return new
