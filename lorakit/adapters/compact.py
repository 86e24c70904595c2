"""Compaction: BA = Σ_k B_k A_k, so the ranks whose term is zero are removed and the output stays what it was."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import torch
from torch import Generator, Tensor, nn

from lorakit.adapters.attach import Attachment, attachment_of, is_merged, replace_modules
from lorakit.adapters.layer import AdapterSettings
from lorakit.adapters.lora import LoRALayer
from lorakit.adapters.sparse import lora_layers
from lorakit.errors import LorakitError


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
    if is_merged(model):
        raise LorakitError("the adapter is merged into the base weights; unmerge(model) before compact(model)")
    smaller = {path: _smaller(layer, living_ranks(layer)) for path, layer in layers.items()}
    replace_modules(model, {layer: smaller[path] for path, layer in layers.items()})
    model.lorakit_attachment = _with_settings(attachment, {path: layer.settings for path, layer in smaller.items()})
    return model


def living_ranks(layer: LoRALayer) -> Tensor:
    """Indices of the ranks that add something to BA; one, the largest, where none does."""
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    living = ((A != 0).any(1) & (B != 0).any(0)).nonzero().flatten()
    return living if len(living) else (A.norm(dim=1) + B.norm(dim=0)).argmax().view(1)


def _smaller(layer: LoRALayer, ranks: Tensor) -> LoRALayer:
    """`layer` with `ranks` alone, on the same frozen base."""
    new = type(layer)(layer.base_layer, _rescaled(layer.settings, len(ranks)), Generator())
    new.scaling = layer.scaling  # the same number, not one that rounds differently
    for name, dim in (("lora_A", 0), ("lora_B", 1)):
        old = getattr(layer, name)
        kept = old.detach().index_select(dim, ranks).contiguous()
        setattr(new, name, nn.Parameter(kept, requires_grad=old.requires_grad))
    return new.train(layer.training)


def _rescaled(settings: AdapterSettings, rank: int) -> AdapterSettings:
    ratio = rank / settings.rank
    return replace(settings, rank=rank, alpha=settings.alpha * (math.sqrt(ratio) if settings.rslora else ratio))


def _with_settings(attachment: Attachment, targets: dict[str, AdapterSettings]) -> Attachment:
    """`attachment` with each layer's own settings, and the commonest of them as those a file states once."""
    ((common, _),) = Counter(targets.values()).most_common(1)
    ordered = {path: targets[path] for path in attachment.targets}
    return replace(attachment, settings=common, targets=ordered)


def compacted_bytes(layer: LoRALayer) -> int:
    """Bytes of the layer's factors after `compact`."""
    rows = layer.in_features + layer.out_features
    return torch.numel(living_ranks(layer)) * rows * layer.lora_A.element_size()
