"""A task head is found beside a base that is no child by its name, trained in full and restored; or refused by name."""

from __future__ import annotations

import pytest
import torch
import transformers

from lorakit.adapters import attach, load_adapter, save_adapter
from lorakit.errors import ParameterError
from lorakit.head import task_head

VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 8, "patch_size": 4}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 40, "pad_token_id": 0}


def clip():
    config = transformers.CLIPConfig(vision_config=VISION, text_config={}, num_labels=3)
    return transformers.CLIPForImageClassification(config), ["classifier"]


def siglip():
    config = transformers.SiglipConfig(vision_config=VISION, text_config={}, num_labels=3)
    return transformers.SiglipForImageClassification(config), ["classifier"]


def t5():
    return transformers.T5ForQuestionAnswering(transformers.T5Config(**T5, decoder_start_token_id=0)), ["qa_outputs"]


def whisper():
    sizes = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "num_labels": 3}
    config = transformers.WhisperConfig(**sizes, classifier_proj_size=8, num_mel_bins=8, max_source_positions=8)
    return transformers.WhisperForAudioClassification(config), ["projector", "classifier"]


INPUTS = {
    "clip": lambda: {"pixel_values": torch.ones(2, 3, 8, 8)},
    "siglip": lambda: {"pixel_values": torch.ones(2, 3, 8, 8)},
    "t5": lambda: {"input_ids": torch.tensor([[1, 2, 3]])},
    "whisper": lambda: {"input_features": torch.ones(2, 8, 16)},
}
MADE = {"clip": clip, "siglip": siglip, "t5": t5, "whisper": whisper}


@pytest.mark.parametrize("name", MADE)
def test_a_head_beside_a_base_of_another_name_is_trained_and_restored(name, tmp_path):
    """The oracle is the model itself: loaded into the same base with another random head, it says the same."""
    model, head = MADE[name]()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    model = attach(model, "lora", rank=2, seed=0).eval()
    assert task_head(model) == head and [*model.lorakit_attachment.trained] == head
    assert not any(path.split(".")[0] in head for path in model.lorakit_attachment.targets)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        expected = model(**INPUTS[name]())[0]
    save_adapter(model, tmp_path / "adapter")
    fresh, _ = MADE[name]()
    fresh.load_state_dict({key: value for key, value in base.items() if key.split(".")[0] not in head}, strict=False)
    fresh = load_adapter(fresh, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(fresh(**INPUTS[name]())[0], expected)


@pytest.mark.parametrize("method", ["lora", "head"])
def test_a_head_that_is_nowhere_is_refused_unless_named(method):
    sizes = {"d_model": 16, "d_latents": 16, "num_latents": 4, "num_blocks": 1, "num_self_attends_per_block": 1}
    config = transformers.PerceiverConfig(
        **sizes, num_self_attention_heads=2, num_cross_attention_heads=2, vocab_size=40
    )
    model = transformers.PerceiverForSequenceClassification(config)
    with pytest.raises(
        ParameterError, match="trainable='head': PerceiverForSequenceClassification has no head outside"
    ):
        attach(model, method)
    attached = attach(model, method, trainable=["final_layer"], seed=0)
    [path] = attached.lorakit_attachment.trained
    assert path.endswith("decoder.final_layer")
