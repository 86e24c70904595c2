"""What the tests of HiRA share: models, batches, perturbed adapters."""

from __future__ import annotations

import pytest
import torch

from lorakit.adapters.attachment import trained_tensors


@pytest.fixture
def build(tiny_bert, tiny_gpt2, tiny_gemma):
    """`build(kind)`: the same small model at every call."""
    factories = {"bert": tiny_bert, "gpt2": tiny_gpt2, "gemma": tiny_gemma}

    def build(kind, **overrides):
        torch.manual_seed(7)
        return factories[kind](initializer_range=0.2, **overrides).eval()  # HiRA's update is as large as W0 lets it be

    return build


def perturb(model):
    """Adapters as after training: BA of the order of 0.3, the head moved."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in trained_tensors(model).items():
            spread = 1.0 if "hira_B" in name else 0.1
            tensor.add_(spread * torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype))
    return model


def batch(rows=4, length=9):
    ids = torch.randint(3, 99, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def logits(model):
    with torch.no_grad():
        return model(**batch()).logits


def backward(model):
    """Logits, after the backward of a fixed random projection of them."""
    output = model(**batch()).logits
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.dtype)
    (output * weights).sum().backward()
    return output.detach()
