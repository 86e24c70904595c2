"""The packaged toy models: small, loaded offline by the Auto classes, pre-trained as their record says."""

from __future__ import annotations

import random
import re

import pytest
import torch

from lorakit.errors import ParameterError
from lorakit.tasks.toy import models, pretraining
from lorakit.tasks.toy.grammar import split_seed
from lorakit.tasks.toy.review_grammar import OPINION_WORDS

MAX_BYTES = 2_000_000


@pytest.fixture(scope="module", params=models.NAMES)
def name(request):
    return request.param


def test_weights_are_small_fp32_and_complete(name):
    from safetensors.torch import load_file

    folder = models.folder(name)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "pretraining.json"}
    assert (folder / "model.safetensors").stat().st_size <= MAX_BYTES
    stored = load_file(folder / "model.safetensors")
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in stored.values())


def test_weights_load_offline_into_every_head(name, monkeypatch):
    import socket

    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

    monkeypatch.setattr(socket, "socket", lambda *_: pytest.fail("a packaged model must not reach for a network"))
    language_model = AutoModelForMaskedLM if name == "toy-encoder" else AutoModelForCausalLM
    model, info = language_model.from_pretrained(models.folder(name), output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    classifier = AutoModelForSequenceClassification.from_pretrained(models.folder(name), num_labels=3)
    shared = dict(model.base_model.named_parameters())
    loaded = dict(classifier.base_model.named_parameters())
    assert shared.keys() == loaded.keys()
    assert all(torch.equal(shared[key], loaded[key]) for key in shared)


def test_architecture_is_what_the_project_says():
    encoder, decoder = (models.build(name).config for name in models.NAMES)
    assert encoder.model_type == "distilbert" and decoder.model_type == "gemma3_text"
    assert set(decoder.layer_types) == {"sliding_attention", "full_attention"}
    assert decoder.num_key_value_heads < decoder.num_attention_heads and decoder.tie_word_embeddings
    for name, config in zip(models.NAMES, (encoder, decoder), strict=True):
        assert config.vocab_size == len(models.tokenizer(name))
        assert config.pad_token_id == models.tokenizer(name).pad_token_id
        asked, kept = models.config(name).to_dict(), config.to_dict()
        changed = {key for key in asked if asked[key] != kept.get(key)}
        assert changed <= {"architectures", "dtype", "transformers_version"}


def test_heldout_loss_is_the_recorded_one_and_far_below_a_random_models(name):
    record = pretraining.recorded(name)
    losses = pretraining.heldout_losses(name, models.build(name))
    assert losses == pytest.approx(record["heldout_loss"], abs=1e-3)
    torch.manual_seed(record["seed"])
    untrained = pretraining.heldout_losses(name, models.build(name, random=True))
    assert untrained == pytest.approx(record["heldout_loss_random"], abs=1e-3)
    assert all(losses[kind] < 0.5 * untrained[kind] for kind in losses)


def test_decoder_guesses_the_end_of_a_story_from_its_beginning():
    """The last sentence says again what was said: it must cost far less than the first, which nothing foretells."""
    model, tokenizer = models.build("toy-decoder"), models.tokenizer("toy-decoder")
    first, last = [], []
    for text in pretraining.texts("stories", 40, split_seed("heldout")):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        first.append(losses[: text.index(".")].mean())
        last.append(losses[text.rindex("Now") :].mean())
    assert torch.stack(last).mean() < 0.2 * torch.stack(first).mean()


def test_whole_words_are_masked_and_only_they_are_guessed():
    tokenizer = models.tokenizer("toy-encoder")
    rows = pretraining.texts("long reviews", 64, split_seed("heldout"))
    batch = pretraining.masked_batch(rows, tokenizer, random.Random(0))
    plain = tokenizer(rows, padding=True, return_tensors="pt")["input_ids"]
    guessed = batch["labels"] != pretraining.IGNORED
    assert torch.equal(batch["labels"][guessed], plain[guessed])
    assert torch.equal(batch["input_ids"][~guessed], plain[~guessed])
    hidden = batch["input_ids"] == tokenizer.mask_token_id
    assert 0.8 < hidden[guessed].float().mean() < 1
    opinions = 0
    for row, text in enumerate(rows):
        for word in re.finditer(r"\w+", text):
            state = hidden[row, word.start() + 1 : word.end() + 1]
            assert state.all() or not state.any()  # a half-shown word would give itself away
            opinions += bool(state.all()) and word.group() in OPINION_WORDS
    assert opinions > 64


def test_pretraining_text_leaves_out_what_the_tasks_ask_for():
    assert not any("gave" in text for text in pretraining.texts("stories", 300, 0))
    assert not any("*" in text for text in pretraining.texts("chats", 300, 0))


def test_batches_end_in_eos_and_ignore_padding():
    tokenizer = models.tokenizer("toy-decoder")
    batch = pretraining.causal_batch(["ab", "abcd"], tokenizer)
    assert batch["labels"][0].tolist() == [tokenizer.bos_token_id, 106, 107, tokenizer.eos_token_id, -100, -100]


def test_unknown_toy_model_is_named():
    for ask in (models.folder, models.config, models.build, models.tokenizer):
        with pytest.raises(ParameterError, match="model='toy-giant'.*toy-encoder, toy-decoder"):
            ask("toy-giant")
