"""Adapter files that are damaged, hostile, old or of PEFT's rarer features: each loads as in PEFT, or says why not."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lorakit.adapters import attach, compact, detach, load_adapter, save_adapter
from lorakit.adapters.attachment import adapter_layers, trained_tensors
from lorakit.errors import CheckpointError, ParameterError

IDS = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(1))
SLOW = r"(?:\w|\.|[a-z])+(?<!y)"  # exponential in the length of a path
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def twin(build):
    torch.manual_seed(7)
    return build()


def saved(build, folder, method="lora", **options):
    """A trained adapter's file, and its logits."""
    model = attach(twin(build), method, seed=0, **options)
    with torch.no_grad():
        for tensor in trained_tensors(model).values():
            tensor.add_(0.1 * torch.randn_like(tensor))
    save_adapter(model, folder)
    return logits(model)


def edit(folder, change=None, **fields):
    if change is not None:
        save_file(change(load_file(folder / TENSORS)), folder / TENSORS)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def multiplied(value, tensors):
    return {name: tensor * value for name, tensor in tensors.items()}


def cast(dtype, tensors):
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def without(part, tensors):
    return {name: tensor for name, tensor in tensors.items() if part not in name}


SLOW_FOR_PEFT = {"target_modules": SLOW, "exclude_modules": SLOW, "alpha_pattern": {SLOW: 4}}
REFUSED = [
    (lambda tensors: {}, {}, "lacks"),
    (
        partial(without, "layer.1"),
        {},
        r"lacks 6 of the layers .* first bert\.encoder\.layer\.1\.attention\.self\.query",
    ),
    (
        partial(without, "layer.1"),
        {"target_modules": r".*self\.query"},
        r"lacks 1 of .*layer\.1\.attention\.self\.query",
    ),
    (partial(without, "classifier"), {}, "lacks 1 of the layers its config names, first classifier"),
    (partial(without, ".lora_"), {}, "lacks"),
    (partial(multiplied, float("nan")), {}, "holds NaN or infinite values"),
    (partial(multiplied, float("inf")), {}, "holds NaN or infinite values"),
    *((partial(cast, dtype), {}, f"is {dtype}") for dtype in (torch.int32, torch.bool, torch.complex64)),
    (None, {"rank_pattern": {"[": 4}}, "not a regular expression"),
    (None, {"rank_pattern": {SLOW: 4}}, "to match"),
    *((None, {"use_dora": True, name: value}, f"{name}=.* to match") for name, value in SLOW_FOR_PEFT.items()),
    (
        partial(without, "layer.1.attention.self.query"),
        {"target_modules": ["query", "key"], "layers_to_transform": [1]},
        r"lacks 1 of .*layer\.1\.attention\.self\.query",
    ),
    (
        partial(without, "layer.1.attention.self.query"),
        {"target_modules": ["query"], "layers_to_transform": 1, "layers_pattern": SLOW},
        "layers_pattern=.* to match",
    ),
    (None, {"bias": "all"}, "bias='all' changes the base"),
    (None, {"use_dora": True, "bias": "all"}, "bias='all' changes the base"),
    (None, {"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    (None, {"use_dora": True, "init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base"),
]


@pytest.mark.timeout(120)  # of patterns too, that would otherwise run for ever
@pytest.mark.parametrize(("change", "fields", "message"), REFUSED)
def test_a_file_that_no_one_should_load_is_refused(tiny_bert, tmp_path, change, fields, message):
    saved(tiny_bert, tmp_path)
    edit(tmp_path, change, **fields)
    model = twin(tiny_bert)
    before = logits(model)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(model, tmp_path)
    assert torch.equal(logits(model), before) and not hasattr(model, "lorakit_attachment")


def test_a_slow_pattern_of_targets_is_refused(tiny_bert):
    with pytest.raises(ParameterError, match=r"target_modules=.* to match"):
        attach(tiny_bert(), target_modules=SLOW)


SERVED = [
    {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": "mica"},
    {"use_rslora": None},
    {"ensure_weight_tying": True},
    {"target_parameters": None},
    {"target_parameters": []},
    {"bias": None},
    {"target_modules": SLOW},  # asked of no layer that the file has
]


@pytest.mark.parametrize("fields", SERVED)
@pytest.mark.parametrize("pickled", [False, True])
def test_a_file_that_peft_loads_is_loaded(tiny_bert, tmp_path, fields, pickled):
    expected = saved(tiny_bert, tmp_path)
    edit(tmp_path, **fields)
    if pickled:
        torch.save(load_file(tmp_path / TENSORS), tmp_path / "adapter_model.bin")
        (tmp_path / TENSORS).unlink()
    assert torch.equal(logits(load_adapter(twin(tiny_bert), tmp_path)), expected)


def test_a_damaged_pickle_is_refused(tiny_bert, tmp_path):
    saved(tiny_bert, tmp_path)
    (tmp_path / TENSORS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin is damaged"):
        load_adapter(twin(tiny_bert), tmp_path)


@pytest.mark.parametrize("content", ["text", ["a"], {"a": 1}, {1: torch.zeros(2)}])
def test_a_pickle_of_no_tensors_by_name_is_refused(tiny_bert, tmp_path, content):
    saved(tiny_bert, tmp_path)
    (tmp_path / TENSORS).unlink()
    torch.save(content, tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin is damaged|lacks"):
        load_adapter(twin(tiny_bert), tmp_path)


TYPES = [{"peft_type": ["LORA"]}, {"rank_pattern": [1]}, {"modules_to_save": "classifier"}, {"target_modules": [[1]]}]


@pytest.mark.parametrize("fields", [*TYPES, {"init_lora_weights": []}, {"alpha_pattern": {"a": "b"}}])
def test_a_config_of_other_types_is_refused_by_name(tiny_bert, tmp_path, fields):
    saved(tiny_bert, tmp_path)
    edit(tmp_path, **fields)
    with pytest.raises(CheckpointError, match=f"{CONFIG}: {next(iter(fields))}"):
        load_adapter(twin(tiny_bert), tmp_path)


@pytest.mark.parametrize("method", ["lora", "head"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_byte_of_our_own_tensors_that_changed_is_found_and_saving_twice_is_the_same(
    tiny_bert, tmp_path, method, packed
):
    model = attach(twin(tiny_bert), method, seed=0)
    packed &= method == "lora"
    files = [next(save_adapter(model, tmp_path / n, packed=packed).glob("*.safetensors")) for n in ("one", "two")]
    content = files[0].read_bytes()
    assert content == files[1].read_bytes()
    files[0].write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    with pytest.raises(CheckpointError, match="is damaged: its tensors are not those that were written"):
        load_adapter(twin(tiny_bert), tmp_path / "one")


def test_a_later_version_of_our_own_file_is_refused(tiny_bert, tmp_path):
    saved(tiny_bert, tmp_path, "head")
    config = json.loads((tmp_path / "lorakit_config.json").read_text())
    for fields in ({"version": 99}, {"format": "other"}):
        (tmp_path / "lorakit_config.json").write_text(json.dumps(config | fields))
        with pytest.raises(CheckpointError, match=f"{next(iter(fields))}={next(iter(fields.values()))!r}"):
            load_adapter(twin(tiny_bert), tmp_path)


def test_a_named_adapter_is_one_folder_down(tiny_bert, tmp_path):
    expected = saved(tiny_bert, tmp_path / "task")
    with pytest.raises(CheckpointError, match=f"one folder down: name {tmp_path / 'task'}"):
        load_adapter(twin(tiny_bert), tmp_path)
    assert torch.equal(logits(load_adapter(twin(tiny_bert), tmp_path / "task")), expected)


# --- patterns of ranks ----------------------------------------------------------------------------------------------


class Nested(nn.Module):
    """Layers whose paths are the ends of others', which differ from those in rank."""

    def __init__(self):
        super().__init__()
        self.query, self.inner = nn.Linear(8, 8), nn.ModuleDict({"query": nn.Linear(8, 8), "qXuery": nn.Linear(8, 8)})

    def forward(self, x):
        return self.inner["qXuery"](self.inner["query"](self.query(x)))


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
    larger = twin(tiny_gpt2)
    larger.resize_token_embeddings(120)
    with pytest.raises(CheckpointError, match=r"another vocabulary.* model\.resize_token_embeddings\(99\)"):
        load_adapter(larger, tmp_path)


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


# --- what attach("peft", …) saved -----------------------------------------------------------------------------------

PEFT = [
    {"trainable_token_indices": [1, 2]},
    {"lora_bias": True},
    {"target_modules": ["wte", "c_attn"]},
    {"layers_to_transform": [1], "target_modules": ["c_attn"]},
    {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": "mica"},
    {"rank_pattern": {"c_attn": 2}},
    {"exclude_modules": ["c_attn"]},
    {"alora_invocation_tokens": [1]},
    {"target_parameters": ["lm_head.weight"], "target_modules": []},
    {"use_rslora": True, "lora_dropout": 0.1},
]


@pytest.mark.parametrize("peft_options", PEFT)
def test_what_attach_peft_saved_loads_again(tiny_gpt2, tmp_path, peft_options):
    expected = saved(tiny_gpt2, tmp_path, "peft", peft_type="LORA", peft_options=peft_options)
    base = twin(tiny_gpt2)
    before = logits(base)
    again = load_adapter(base, tmp_path)
    torch.testing.assert_close(logits(again), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(logits(detach(again)), before)
