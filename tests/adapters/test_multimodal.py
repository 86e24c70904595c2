"""Of a model of images and text, text trains, packs and counts the language model alone."""

from __future__ import annotations

import pytest
import torch
import transformers

from lorakit.adapters import attach, quantize_nf4
from lorakit.base.nf4 import is_four_bit

TEXT = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
TEXT |= {"num_key_value_heads": 1, "intermediate_size": 64, "sliding_window": 8, "pad_token_id": 0}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
IDS = torch.arange(3, 11)[None]


def gemma(auto):
    torch.manual_seed(0)
    config = transformers.Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4)
    return getattr(transformers, auto).from_config(config)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("method", ["lora", "hira", "peft"])
@pytest.mark.parametrize("auto", ["AutoModelForCausalLM", "AutoModelForSequenceClassification"])
def test_every_trained_tensor_gets_a_gradient_from_text(auto, method, packed):
    model = gemma(auto)
    if packed:
        quantize_nf4(model, compute_dtype="fp32")
        assert {path.split(".")[1] for path, layer in model.named_modules() if is_four_bit(layer)} == {"language_model"}
    model = attach(model, method, rank=2, seed=0, **({"peft_type": "LORA"} if method == "peft" else {})).train()
    labels = IDS if auto.endswith("CausalLM") else torch.tensor([1])
    model(input_ids=IDS, token_type_ids=torch.zeros_like(IDS), labels=labels).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) >= 2 * 2 * 7 and [name for name, p in trained.items() if p.grad is None] == []


def test_named_layers_of_the_tower_are_still_adapted():
    model = attach(gemma("AutoModelForCausalLM"), "lora", target_modules=r".*vision_tower.*q_proj", rank=2)
    assert [*model.lorakit_attachment.targets] == ["model.vision_tower.encoder.layers.0.self_attn.q_proj"]
