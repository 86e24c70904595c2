"""What the tests of method "peft" share: models and options of each type."""

from __future__ import annotations

import gc

import pytest
import small_models
import torch

from lorakit.adapters import attach, quantize_nf4

# what a type needs on layers of 32 by 32
OPTIONS = {
    "ADALORA": {"total_step": 20},
    "ADAMSS": {"r": 8, "num_subspaces": 2},
    "C3A": {"block_size": 8},
    "CPT": {"cpt_token_ids": [3, 4, 5, 6], "cpt_mask": [1] * 4, "cpt_tokens_type_mask": [1, 2, 3, 4]},
    "FOURIERFT": {"n_frequency": 50},
    "OFT": {"oft_block_size": 4},
    "P_TUNING": {"encoder_hidden_size": 16},
    "ROAD": {"group_size": 8},
    "TRAINABLE_TOKENS": {"token_indices": [5, 6, 7]},
    "VBLORA": {"vector_length": 8, "num_vectors": 16},
    "WAVEFT": {"n_frequency": 50},
}


IN_THE_TRAINER = (
    *("DORA", "ADALORA", "VERA", "SHIRA", "IA3", "LOHA", "OFT", "BOFT", "FOURIERFT", "LN_TUNING", "POLY", "OSF"),
    *("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"),
)


@pytest.fixture
def build(build):
    """The small models, and one in 4 bits."""

    def nf4():
        pytest.importorskip("bitsandbytes")
        return quantize_nf4(build("bert", hidden_size=64, intermediate_size=128))

    return lambda kind, **overrides: nf4() if kind == "nf4" else build(kind, **overrides)


@pytest.fixture(scope="module", autouse=True)
def light_collections():
    """The trainer collects garbage twice a run, which takes a second with all that PEFT imports."""
    import peft  # noqa: F401

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def attached(model, peft_type, **given):
    options = {"peft_type": peft_type, "peft_options": OPTIONS.get(peft_type, {}), "seed": 0}
    return attach(model, "peft", **options | given)


def batch(model):
    inputs = small_models.batch()
    classifier = type(model).__name__.endswith("SequenceClassification")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return inputs | {"labels": torch.tensor([0, 1, 1, 0]) if classifier else labels}


def logits(model):
    with torch.no_grad():
        return model(**batch(model)).logits


def train(model, steps=3):
    """AdamW steps; the trained tensors that had no gradient, by name."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    model.train()
    for _ in range(steps):
        loss = model(**batch(model)).loss
        assert torch.isfinite(loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return [name for name, p in trained.items() if torch.equal(p, before[name])]
