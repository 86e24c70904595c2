"""The packaged toy models: small, loaded offline by the Auto classes, pre-trained as their record says."""

from __future__ import annotations

import importlib.util
import json
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from lorakit.tasks.toy import models
from lorakit.tasks.toy.grammar import reviews, split_seed
from lorakit.tasks.toy.review_grammar import OPINION_WORDS

MAX_BYTES = 2_000_000
SCRIPT = Path(__file__).parents[2] / "scripts" / "pretrain_toy.py"
_found = importlib.util.spec_from_file_location("pretrain_toy", SCRIPT)
pretraining = importlib.util.module_from_spec(_found)
_found.loader.exec_module(pretraining)


@pytest.fixture(scope="module", params=models.PRETRAINED)
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
    encoder, decoder = (pretraining.build(name).config for name in models.PRETRAINED)
    assert encoder.model_type == "distilbert" and decoder.model_type == "gemma3_text"
    assert set(decoder.layer_types) == {"sliding_attention", "full_attention"}
    assert decoder.num_key_value_heads < decoder.num_attention_heads and decoder.tie_word_embeddings
    for name, config in zip(models.PRETRAINED, (encoder, decoder), strict=True):
        assert config.vocab_size == len(models.tokenizer(name))
        assert config.pad_token_id == models.tokenizer(name).pad_token_id
        asked, kept = AutoConfig.from_pretrained(models.folder(name)).to_dict(), config.to_dict()
        changed = {key for key in asked if asked[key] != kept.get(key)}
        assert changed <= {"architectures", "dtype", "transformers_version", "_name_or_path"}


def test_heldout_loss_is_the_recorded_one_and_far_below_a_random_models(name):
    record = json.loads((models.folder(name) / "pretraining.json").read_text())
    losses = pretraining.heldout_losses(name, pretraining.build(name))
    assert losses == pytest.approx(record["heldout_loss"], abs=1e-3)
    torch.manual_seed(record["seed"])
    untrained = pretraining.heldout_losses(name, pretraining.build(name, untrained=True))
    assert untrained == pytest.approx(record["heldout_loss_random"], abs=1e-3)
    assert all(losses[kind] < 0.5 * untrained[kind] for kind in losses)


def test_decoder_guesses_the_end_of_a_story_from_its_beginning():
    """The last sentence says again what was said: it must cost far less than the first, which nothing foretells."""
    model, tokenizer = pretraining.build("toy-decoder"), models.tokenizer("toy-decoder")
    first, last = [], []
    for text in pretraining.texts("stories", 40, split_seed("heldout")):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        first.append(losses[: text.index(".")].mean())
        last.append(losses[text.rindex("Now") :].mean())
    assert torch.stack(last).mean() < 0.3 * torch.stack(first).mean()


def test_only_what_is_guessed_is_masked_and_cls_guesses_the_emoticon():
    tokenizer = models.tokenizer("toy-encoder")
    posted = pretraining.texts("posted reviews", 400, split_seed("heldout"))
    rows = [text[: -len(" :)")] for text in posted]
    batch = pretraining.masked_batch(posted, tokenizer, random.Random(0))
    plain = tokenizer(rows, padding=True, return_tensors="pt")["input_ids"]
    assert [chr(index - 9) for index in batch["labels"][:, 0]] == [text[-1] for text in posted]
    batch["labels"][:, 0] = pretraining.IGNORED
    guessed, hidden = batch["labels"] != pretraining.IGNORED, batch["input_ids"] == tokenizer.mask_token_id
    assert torch.equal(batch["labels"][guessed], plain[guessed])
    assert torch.equal(batch["input_ids"][~guessed], plain[~guessed])
    assert hidden[guessed].float().mean() == pytest.approx(pretraining.HIDDEN, abs=0.03)

    def share_guessed(pattern: str) -> float:
        found = [(row, m.start() + 1, m.end() + 1) for row, text in enumerate(rows) for m in re.finditer(pattern, text)]
        return sum(bool(guessed[row, start:end].all()) for row, start, end in found) / len(found)

    assert share_guessed(rf"\b({'|'.join(OPINION_WORDS)})\b") == pytest.approx(pretraining.MASK_OPINION, abs=0.05)
    assert share_guessed(r"\bthe\b") == pytest.approx(pretraining.MASK_OTHER, abs=0.02)


def test_pretraining_text_leaves_out_what_the_tasks_ask_for():
    assert not any("gave" in text for text in pretraining.texts("stories", 300, 0))
    assert not any("*" in text for text in pretraining.texts("chats", 300, 0))


def test_batches_end_in_eos_and_ignore_padding():
    tokenizer = models.tokenizer("toy-decoder")
    batch = pretraining.causal_batch(["ab", "abcd"], tokenizer)
    assert batch["labels"][0].tolist() == [tokenizer.bos_token_id, 106, 107, tokenizer.eos_token_id, -100, -100]


def test_encoder_reads_sentiment_where_a_random_one_does_not():
    """A linear head on frozen [CLS] states: what pre-training alone gives to a task it saw no label of."""
    from sklearn.linear_model import LogisticRegression

    tokenizer = models.tokenizer("toy-encoder")
    train, test = reviews(800, split_seed("train")), reviews(400, split_seed("test"))

    def accuracy(model) -> float:
        states = []
        for rows in (train, test):
            with torch.no_grad():
                batch = tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")
                states.append(model.eval().base_model(**batch).last_hidden_state[:, 0].numpy())
        head = LogisticRegression(max_iter=1000).fit(states[0], [label for _, label in train])
        return head.score(states[1], [label for _, label in test])

    assert accuracy(pretraining.build("toy-encoder")) > 0.78
    assert accuracy(pretraining.build("toy-encoder", untrained=True)) < 0.65


def test_the_untrained_gpt2_is_what_its_seed_makes():
    import lorakit.models

    loaded = lorakit.models.load("toy-gpt2", "causal")
    torch.manual_seed(0)
    built = pretraining.build("toy-gpt2", untrained=True).state_dict()
    assert all(torch.equal(value, built[name]) for name, value in loaded.model.state_dict().items())
    assert "random weights, not pre-trained" in loaded.notes[0]
    assert not any("toy-gpt2" in note for note in lorakit.models.load("toy-decoder", "causal").notes)
