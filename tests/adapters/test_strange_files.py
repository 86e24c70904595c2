"""Adapter files that are damaged, hostile, old or of PEFT's rarer features: each loads as in PEFT, or says why not."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from adapter_files import CONFIG, TENSORS, cast, edit, logits, multiplied, saved, twin, without
from pickled import Runs
from safetensors.torch import load_file

from lorakit.adapters import attach, detach, load_adapter, save_adapter
from lorakit.errors import CheckpointError, ParameterError

SLOW = r"(?:\w|\.|[a-z])+(?<!y)"  # exponential in the length of a path
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
    (partial(without, ".lora_"), {}, "lacks 1 of the layers its config names, first any"),
    (None, {"brand_new": True}, "brand_new=True: a PEFT feature that lorakit does not have"),
    (None, {"r": 4}, r"lora_A\.weight is \(8, 32\), this model has \(4, 32\)"),
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
    {"init_lora_weights": None},
    {"rank_pattern": None, "alpha_pattern": None},
    {"modules_to_save": ["classifier", "dropout"]},  # which has no weights
    {"target_modules": None},
    {"target_modules": "all-linear"},
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
    message = "lacks" if isinstance(content, dict) and 1 in content else r"adapter_model\.bin is damaged"
    with pytest.raises(CheckpointError, match=message):
        load_adapter(twin(tiny_bert), tmp_path)


def test_a_pickle_runs_nothing_and_is_not_read_beside_the_newer_form(tiny_bert, tmp_path):
    expected = saved(tiny_bert, tmp_path / "a")
    torch.save({"a": Runs(tmp_path / "ran")}, tmp_path / "a" / "adapter_model.bin")
    assert torch.equal(logits(load_adapter(twin(tiny_bert), tmp_path / "a")), expected)
    (tmp_path / "a" / TENSORS).unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin is damaged"):
        load_adapter(twin(tiny_bert), tmp_path / "a")
    assert not (tmp_path / "ran").exists()


A = "base_model.model.bert.encoder.layer.0.attention.self.query.hira_A"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (partial(without, A), "1 missing tensors: .*hira_A"),
        (lambda t: t | {A: torch.ones(())}, r"hira_A\.weight is \(\)"),
    ],
)
def test_hiras_rank_is_not_read_from_what_has_none(tiny_bert, tmp_path, change, message):
    saved(tiny_bert, tmp_path, "hira")
    edit(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(twin(tiny_bert), tmp_path)


@pytest.mark.parametrize("value", [float("nan"), torch.float16])
def test_what_peft_reads_is_looked_at_too(tiny_bert, tmp_path, value):
    expected = saved(tiny_bert, tmp_path, "peft", peft_type="IA3")
    if isinstance(value, float):
        edit(tmp_path, partial(multiplied, value))
        with pytest.raises(CheckpointError, match="holds NaN or infinite values"):
            load_adapter(twin(tiny_bert), tmp_path)
    else:
        edit(tmp_path, partial(cast, value))
        torch.testing.assert_close(logits(load_adapter(twin(tiny_bert), tmp_path)), expected, atol=1e-2, rtol=1e-2)


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
