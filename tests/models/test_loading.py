"""Models: a name becomes a model with the right head, a padding token, a fingerprint - or one clear line."""

from __future__ import annotations

import contextlib
import json
import os
from logging import Handler
from pathlib import Path

import numpy as np
import pytest
import torch
from pickled import Runs
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from lorakit import assets, models
from lorakit.errors import AssetError, ParameterError

HEADS = [("bert", "classify", "BertForSequenceClassification"), ("bert", "masked", "BertForMaskedLM")]
HEADS += [("gpt2", "classify", "GPT2ForSequenceClassification"), ("gpt2", "causal", "GPT2LMHeadModel")]
HEADS += [("gemma", "classify", "Gemma3TextForSequenceClassification"), ("gemma", "causal", "Gemma3ForCausalLM")]


@pytest.mark.parametrize(("fixture", "kind", "architecture"), HEADS)
def test_each_kind_gets_its_head_and_padding(request, fixture, kind, architecture):
    loaded = models.load(request.getfixturevalue(fixture), kind, num_labels=3)
    assert type(loaded.model).__name__ == architecture and not loaded.model.training
    assert loaded.source == "local folder" and len(loaded.fingerprint) == 64
    assert loaded.model.config.pad_token_id == loaded.tokenizer.pad_token_id is not None
    assert loaded.model.dtype == torch.float32 and loaded.tokenizer.is_fast
    batch = loaded.tokenizer(["w1 w2 w3", "w4"], padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    logits = loaded.model(**batch).logits
    assert logits.shape == ((2, 3) if kind == "classify" else (2, 3, 99)) and logits.isfinite().all()


def test_gpt2_pads_with_its_end_token(gpt2):
    loaded = models.load(gpt2, "classify")
    assert loaded.tokenizer.pad_token == "[CLS]" and loaded.model.config.pad_token_id == 1
    complete = models.load(gpt2, "causal")
    assert complete.model.generation_config.pad_token_id == 1 and complete.notes == []


def test_weights_are_the_checkpoints(bert, gemma):
    stored = load_file(Path(bert) / "model.safetensors")
    loaded = models.load(bert, "classify").model.bert.state_dict()
    assert stored and all(torch.equal(loaded[name], stored[name]) for name in stored)
    as_stored = models.load(gemma, "causal", dtype="auto", attention="eager").model
    assert as_stored.dtype == models.load(gemma, "causal", dtype="bf16").model.dtype == torch.bfloat16
    widened = models.load(gemma, "causal", attention="sdpa").model
    assert [m.config._attn_implementation for m in (as_stored, widened)] == ["eager", "sdpa"]
    assert widened.dtype == torch.float32
    assert torch.equal(widened.model.norm.weight, as_stored.model.norm.weight.float())


def test_a_new_head_depends_on_the_seed_alone(bert):
    first = models.load(bert, "classify", seed=1)
    torch.manual_seed(99)
    again = models.load(bert, "classify", seed=1).model.classifier.weight
    other = models.load(bert, "classify", seed=2).model.classifier.weight
    assert torch.equal(first.model.classifier.weight, again) and not torch.equal(again, other)
    assert first.notes == ["new, not pre-trained, initialised from seed 1: classifier"]

    torch.manual_seed(5), np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    models.load(bert, "masked", seed=3)
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


def test_masked_head_missing_from_a_base_model_is_told_and_tied(bert):
    loaded = models.load(bert, "masked")
    assert loaded.model.cls.predictions.decoder.weight is loaded.model.bert.embeddings.word_embeddings.weight
    assert len(loaded.notes) == 1 and "cls.predictions.transform.dense" in loaded.notes[0]
    assert loaded.notes[0].endswith("its decoder is tied to the word embeddings")


def test_loading_prints_and_logs_nothing(bert, capfd):
    logged = []
    handler = Handler()
    handler.emit = logged.append
    logging.add_handler(handler)
    try:
        models.load(bert, "classify")
    finally:
        logging.remove_handler(handler)
    assert capfd.readouterr() == ("", "") and logged == []


def test_verbosity_returns_to_what_it_was_also_after_errors(bert):
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        models.load(bert, "classify")
        assert logging.get_verbosity() == logging.INFO and logging.is_progress_bar_enabled()
        with pytest.raises(AssetError):
            models.load(bert + "/model.safetensors", "classify")
        assert logging.get_verbosity() == logging.INFO
    finally:
        logging.set_verbosity_warning()


@pytest.mark.parametrize(
    "arguments, message",
    [({"kind": "regress"}, "kind='regress': must be one of classify, masked, causal"),
     ({"num_labels": 1}, "num_labels=1: must be at least 2"),
     ({"dtype": "fp64"}, "dtype='fp64': must be one of fp32, bf16, auto"),
     ({"attention": "flash"}, "attention='flash': must be one of sdpa, eager"),
     ({"kind": "causal"}, "kind='causal': needs a decoder; model=.* is an encoder"),
     ({"kind": "masked", "name": "toy-decoder"}, "kind='masked': needs an encoder; model=.* is a decoder")],
)  # fmt: skip
def test_parameters_out_of_range(bert, arguments, message):
    with pytest.raises(ParameterError, match=message):
        models.load(**{"name": bert, "kind": "classify"} | arguments)


@pytest.mark.parametrize(
    "file, text, message",
    [("config.json", "{", "config.json cannot be read"),
     ("config.json", '{"model_type": "nope"}', "config.json cannot be read"),
     ("model.safetensors", "short", "cannot be loaded as a classify model"),
     ("tokenizer.json", "{}", "tokenizer cannot be read")],
)  # fmt: skip
def test_damaged_files_are_one_line(bert, file, text, message):
    (Path(bert) / file).write_text(text)
    with pytest.raises(AssetError, match=message) as caught:
        models.load(bert, "classify")
    assert "\n" not in str(caught.value)


def test_pickled_weights_run_nothing_and_nobody_is_asked_to_convert_them(bert, tmp_path):
    assert os.environ["DISABLE_SAFETENSORS_CONVERSION"] == "1"  # else transformers asks the hub, in a thread
    weights = load_file(Path(bert) / "model.safetensors")
    (Path(bert) / "model.safetensors").unlink()
    torch.save(weights, Path(bert) / "pytorch_model.bin")
    models.load(bert, "classify")
    torch.save(weights | {"a": Runs(tmp_path / "ran")}, Path(bert) / "pytorch_model.bin")
    with pytest.raises(AssetError, match="cannot be loaded as a classify model"):
        models.load(bert, "classify")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["own", "bert"])
def test_code_that_a_model_brings_is_not_run_nor_asked_about(bert, kind, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *asked: "y")  # what transformers' question would be answered
    (Path(bert) / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    classes = {"AutoConfig": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"], "AutoModelForMaskedLM": "own.Own"}
    for file in ("config.json", "tokenizer_config.json"):
        told = json.loads((Path(bert) / file).read_text()) | {"auto_map": classes}
        (Path(bert) / file).write_text(json.dumps(told | ({"model_type": kind} if file == "config.json" else {})))
    refused = pytest.raises(AssetError, match="config.json cannot be read: it brings code of its own, which is not run")
    with refused if kind == "own" else contextlib.nullcontext():  # transformers' own classes serve the other
        models.load(bert, "masked")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("fixture", ["bert", "gpt2", "gemma"])
@pytest.mark.parametrize("kept", [(), ("tokenizer_config.json",)])
def test_a_tokenizer_without_words_is_refused(request, fixture, kept):
    folder = Path(request.getfixturevalue(fixture))
    for path in folder.glob("*token*"):
        if path.name not in kept:
            path.unlink()
    for door in (models.tokenizer, lambda name: models.load(name, "classify")):
        with pytest.raises(AssetError, match=r"its tokenizer cannot be read: .*(no words|tokenizer)") as caught:
            door(str(folder))
        assert "\n" not in str(caught.value)


def test_weights_without_some_layers_are_refused(bert):
    file = Path(bert) / "model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if "layer.1." not in name}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(AssetError, match="the weights lack 16 parameters of the base, first bert.encoder.layer.1."):
        models.load(bert, "classify")


def test_head_of_another_size_is_an_error(tmp_path, tiny_bert, save_tokenizer):
    tiny_bert(num_labels=5).save_pretrained(tmp_path / "five")
    save_tokenizer(tmp_path / "five", pad_token="[PAD]")
    with pytest.raises(AssetError, match="cannot be loaded as a classify model"):
        models.load(str(tmp_path / "five"), "classify", num_labels=2)
    assert models.load(str(tmp_path / "five"), "classify", num_labels=5).notes == []


@pytest.mark.parametrize("name, kind", [("toy-encoder", "masked"), ("toy-decoder", "causal")])
def test_toy_models_load_for_their_pretraining_and_for_classification(name, kind):
    loaded = models.load(name, kind)
    assert loaded.source == "packaged toy model" and loaded.notes == [] and len(loaded.fingerprint) == 64
    assert models.load(name, "classify").model.config.num_labels == 2
    assert models.family(name) == ("encoder" if kind == "masked" else "decoder")
    assert loaded.model.config.pad_token_id == models.tokenizer(name).pad_token_id == 0


@pytest.mark.assets("all-MiniLM-L6-v2")
def test_minilm_is_the_pinned_model():
    loaded = models.load("all-MiniLM-L6-v2", "classify")
    assert loaded.fingerprint == assets.ASSETS["all-MiniLM-L6-v2"].fingerprint
    assert "sentence-transformers fine-tune" in loaded.notes[0] and "classifier" in loaded.notes[1]
    masked = models.load("all-MiniLM-L6-v2", "masked")
    assert "not a raw masked-LM" in masked.notes[0] and "tied to the word embeddings" in masked.notes[1]
    assert masked.model.cls.predictions.decoder.weight is masked.model.get_input_embeddings().weight


@pytest.mark.assets("all-MiniLM-L6-v2")
def test_minilm_knows_what_sentences_mean():
    """Mean-pooled states put a paraphrase nearer than another topic: the weights are really in place."""
    loaded = models.load("all-MiniLM-L6-v2", "classify")
    texts = ["The film was wonderful.", "I loved this movie.", "The stock market fell sharply."]
    batch = loaded.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = loaded.model.bert(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    pooled = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    similarity = pooled @ pooled.T
    assert similarity[0, 1] > 0.5 and similarity[0, 2] < 0.2


@pytest.mark.assets("gemma-3-270m")
def test_gemma_speaks():
    loaded = models.load("gemma-3-270m", "causal", dtype="auto")
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.notes == ["gemma-3-270m: 4-8-bit weights, dequantised: not the original bf16"]
    batch = loaded.tokenizer("1, 2, 3, 4, 5,", return_tensors="pt")
    with torch.no_grad():
        assert loaded.model(**batch).logits.isfinite().all()
    answer = loaded.model.generate(**batch, max_new_tokens=6, do_sample=False)
    assert loaded.tokenizer.decode(answer[0]).startswith("<bos>1, 2, 3, 4, 5, 6, 7,")
    turn = loaded.tokenizer("<start_of_turn>user\nHi<end_of_turn>\n", add_special_tokens=False)["input_ids"]
    assert loaded.tokenizer.convert_ids_to_tokens(turn)[::5] == ["<start_of_turn>", "\n"] and len(turn) == 6
