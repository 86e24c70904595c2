"""Names in adapter files: patterns of ranks, embeddings, tensors of modules renamed since; each loads as in PEFT."""

from __future__ import annotations

import pytest
import torch
from adapter_files import Nested, edit, logits, saved, twin

from lorakit.adapters import attach, compact, load_adapter, save_adapter
from lorakit.adapters.attachment import adapter_layers
from lorakit.adapters.peft_format import renamed
from lorakit.errors import CheckpointError

# --- patterns of ranks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("large", ["query", "inner.query"])
def test_a_compacted_file_loads_here_and_in_peft(tmp_path, large):
    from peft import PeftModel

    model = attach(twin(Nested), rank=4, trainable=(), seed=0)
    x = torch.randn(3, 8)
    with torch.no_grad():
        for path, layer in adapter_layers(model).items():
            layer.lora_B.normal_()[:, 4 if path == large else 2 :] = 0
    expected = compact(model)(x)
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(twin(Nested), tmp_path)(x), expected)
    torch.testing.assert_close(PeftModel.from_pretrained(twin(Nested), tmp_path)(x), expected)


# --- embeddings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [False, True])
def test_embeddings_that_peft_saved_with_the_adapter(tiny_gpt2, tmp_path, trained):
    from peft import LoraConfig, PeftModel, get_peft_model

    base = twin(tiny_gpt2)
    theirs = get_peft_model(base, LoraConfig(init_lora_weights=False, target_modules=["c_attn"], fan_in_fan_out=True))
    with torch.no_grad():
        base.transformer.wte.weight.add_(0.5 * trained)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    ours = load_adapter(twin(tiny_gpt2), tmp_path)
    torch.testing.assert_close(logits(ours), logits(PeftModel.from_pretrained(twin(tiny_gpt2), tmp_path)))
    assert bool(ours.lorakit_attachment.trained) == trained
    rounded = load_adapter(twin(tiny_gpt2).bfloat16(), tmp_path)
    assert rounded.lorakit_attachment.trained == ours.lorakit_attachment.trained
    larger = twin(tiny_gpt2)
    larger.resize_token_embeddings(120)
    with pytest.raises(CheckpointError, match=r"another vocabulary.* model\.resize_token_embeddings\(99\)"):
        load_adapter(larger, tmp_path)


def test_an_embedding_that_was_to_be_trained_and_was_not_is_in_the_file(tiny_gpt2, tmp_path):
    trainable = ["wte", "lm_head"]
    save_adapter(attach(twin(tiny_gpt2), trainable=trainable, seed=0), tmp_path)
    loaded = load_adapter(twin(tiny_gpt2), tmp_path)
    assert list(loaded.lorakit_attachment.trained) == ["transformer.wte", "lm_head"]


def test_of_another_width_and_vocabulary_the_width_is_told(tiny_gpt2, tmp_path):
    saved(lambda: tiny_gpt2(n_embd=48, vocab_size=120), tmp_path, trainable=["wte", "lm_head"])
    with pytest.raises(CheckpointError, match=r"is for another base: .* this model has"):
        load_adapter(twin(tiny_gpt2), tmp_path)


@pytest.mark.parametrize("trainable", [["wte", "lm_head"], ["wte"]])
def test_an_adapter_of_a_resized_vocabulary_says_so(tiny_gpt2, tmp_path, trainable):
    def resized():
        model = tiny_gpt2(tie_word_embeddings=len(trainable) > 1)
        model.resize_token_embeddings(120)
        return model

    expected = saved(resized, tmp_path, trainable=trainable)
    with pytest.raises(CheckpointError, match=r"another vocabulary.* model\.resize_token_embeddings\(120\)"):
        load_adapter(twin(tiny_gpt2), tmp_path)
    assert torch.equal(logits(load_adapter(twin(resized), tmp_path)), expected)


# --- names of before ------------------------------------------------------------------------------------------------


def llava():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    text = LlamaConfig(vocab_size=99, pad_token_id=0, **sizes)
    vision = CLIPVisionConfig(image_size=28, patch_size=14, **sizes)
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision))


def test_a_name_is_changed_only_from_an_unknown_to_a_known_one(tiny_bert, monkeypatch):
    from transformers import conversion_mapping
    from transformers.core_model_loading import Concatenate, WeightConverter, WeightRenaming

    rules = [WeightRenaming(r"self\.q_lin", "self.query"), WeightRenaming("gone", "nowhere")]
    rules += [
        WeightRenaming(r"self\.key", "self.value"),
        WeightConverter(r"self\.v_lin", "self.value", operations=[Concatenate()]),
    ]
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: rules)
    layer = "base_model.model.bert.encoder.layer.0.attention.self."
    ends = {"q_lin.lora_A.weight": "query.lora_A.weight", "q_lin.hira_A": "query.hira_A"}
    ends |= {name: name for name in ("key.lora_A.weight", "gone.lora_A.weight", "v_lin.lora_A.weight")}
    for some in (ends, dict([*ends.items()][:1]), dict([*ends.items()][1:2])):
        found = renamed(tiny_bert(), {layer + old: torch.zeros(number) for number, old in enumerate(some)})
        assert {name.removeprefix(layer): len(tensor) for name, tensor in found.items()} == {
            new: number for number, new in enumerate(some.values())
        }


def test_models_that_are_not_transformers_have_no_older_names(tmp_path):
    save_adapter(attach(twin(Nested), trainable=(), seed=0), tmp_path)
    model = twin(Nested)
    model.config = None
    load_adapter(model, tmp_path)
    edit(tmp_path, lambda tensors: tensors | {"base_model.model.other.lora_A.weight": torch.zeros(8, 8)})
    with pytest.raises(CheckpointError, match="this model has no linear other"):
        load_adapter(twin(Nested), tmp_path)


@pytest.mark.parametrize("method", ["lora", "hira", "peft"])
def test_a_file_from_before_a_renaming_loads(tmp_path, method):
    options = {"target_modules": ["q_proj", "v_proj"]} | ({"peft_type": "DORA"} if method == "peft" else {})
    expected = saved(llava, tmp_path, method, **options)
    old = {"base_model.model.model.language_model.": "base_model.model.language_model.model."}
    old["base_model.model.model.vision_tower."] = "base_model.model.vision_tower.vision_model."

    def aged(tensors):
        for new, before in old.items():
            tensors = {name.replace(new, before): tensor for name, tensor in tensors.items()}
        return tensors

    edit(tmp_path, aged, target_modules=["q_proj", "v_proj"])
    assert torch.equal(logits(load_adapter(twin(llava), tmp_path)), expected)
