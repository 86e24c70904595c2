"""Plain-text tasks: blocks, masks, perplexity against transformers' own loss."""

from __future__ import annotations

import math
import random

import pytest
import torch

from lorakit import tasks
from lorakit.errors import DataError
from lorakit.tasks.build import blocks
from lorakit.tasks.collate import IGNORED, Masker

WORDS = ("stone", "river", "old", "map", "town", "ship", "king")


def article(index: int) -> str:
    words = " ".join(random.Random(index).choices(WORDS, k=40))
    return f" = Title {index} = \n \n {words} . \n \n = = Section = = \n \n = is no heading \n {index} ends . \n"


def write_articles(path, indices):
    path.write_text(" \n" + "".join(map(article, indices)), encoding="utf-8")


@pytest.fixture
def wikitext(tmp_path):
    for name, indices in (("train", range(20)), ("valid", range(20, 24)), ("test", range(24, 28))):
        write_articles(tmp_path / f"{name}.txt", indices)
    return str(tmp_path)


def test_blocks_fill_max_length_inside_one_article(wikitext, decoder):
    task = tasks.load("wikitext2", decoder, data_files=wikitext, max_length=64)
    rows = task.train["input_ids"]
    assert max(map(len, rows)) == 64 and all(row[0] == decoder.bos_token_id for row in rows)
    text = "".join(decoder.decode(row[1:]) for row in rows)
    assert text.count("= Title ") == 20 and text.count("= = Section = =") == 20
    for row in rows:  # a title only ever opens a block
        assert "= Title " not in decoder.decode(row[1:])[1:]
    assert task.kind == "causal" and task.metrics is tasks.task.language_model


def test_encoder_blocks_stand_between_their_special_tokens(encoder):
    rows = blocks(["abcdefghij" * 3, "xy"], encoder, 12)
    assert sorted(map(len, rows)) == [12, 12, 12] and all((row[0], row[-1]) == (1, 2) for row in rows)


def test_one_file_is_split_by_articles(tmp_path, decoder):
    write_articles(tmp_path / "valid.txt", range(30))
    task = tasks.load("wikitext2", decoder, data_files=str(tmp_path), max_length=512)
    titles = [{decoder.decode(row).split("\n")[0] for row in getattr(task, s)["input_ids"]} for s in tasks.task.SPLITS]
    assert sum(map(len, titles)) == len(set.union(*titles)) == 30 and all(2 <= len(title) <= 4 for title in titles[1:])
    assert any("only valid.txt is there" in note for note in task.notes)


def test_missing_parts_and_headings_are_errors(tmp_path, decoder):
    with pytest.raises(DataError, match=r"lacks train\.txt, valid\.txt, test\.txt"):
        tasks.load("wikitext2", decoder, data_files=str(tmp_path))
    write_articles(tmp_path / "train.txt", range(3))
    write_articles(tmp_path / "test.txt", range(3))
    with pytest.raises(DataError, match=r"lacks valid\.txt"):
        tasks.load("wikitext2", decoder, data_files=str(tmp_path))
    (tmp_path / "valid.txt").write_text("no heading\n")
    with pytest.raises(DataError, match=r"valid\.txt, line 1: expected at least one `= Heading =`"):
        tasks.load("wikitext2", decoder, data_files=str(tmp_path))


def test_causal_metrics_are_transformers_loss(wikitext, decoder, tiny_gpt2):
    from lorakit.training.loss import example_statistics

    task = tasks.load("wikitext2", decoder, data_files=wikitext, max_length=48, max_test=6)
    model = tiny_gpt2().eval()
    model.resize_token_embeddings(len(decoder))
    batch = task.eval_collator(list(task.test))
    with torch.no_grad():
        output = model(**batch)
    found = task.metrics(example_statistics(output.logits, batch["labels"], "causal").numpy())
    assert found["loss"] == pytest.approx(output.loss.item(), abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(output.loss.item()), rel=1e-4)
    guesses = output.logits[:, :-1].argmax(-1)[batch["labels"][:, 1:] != IGNORED]
    truth = batch["labels"][:, 1:][batch["labels"][:, 1:] != IGNORED]
    assert found["token_accuracy"] == pytest.approx((guesses == truth).float().mean().item())


def test_masks_are_15_percent_of_which_80_hidden_10_random(encoder):
    ids = torch.randint(20, 120, (200, 100), generator=torch.Generator().manual_seed(0))
    hidden, labels = Masker(encoder, 0)(ids)
    chosen = labels != IGNORED
    assert chosen.float().mean().item() == pytest.approx(0.15, abs=0.01)
    assert torch.equal(labels[chosen], ids[chosen]) and torch.equal(hidden[~chosen], ids[~chosen])
    masked = (hidden == encoder.mask_token_id)[chosen].float().mean().item()
    kept = (hidden == ids)[chosen].float().mean().item()
    assert masked == pytest.approx(0.8, abs=0.03) and kept == pytest.approx(0.1, abs=0.03)


def test_special_tokens_and_padding_are_never_masked_and_every_row_has_a_label(encoder):
    ids = torch.tensor([[1, 50 + i, 2, 0, 0] for i in range(64)])
    _, labels = Masker(encoder, 0)(ids)
    assert (labels[:, 1] == ids[:, 1]).all() and (labels[:, [0, 2, 3, 4]] == IGNORED).all()


def test_training_masks_depend_on_seed_and_batch_only(wikitext, encoder):
    task, other = (tasks.load("wikitext2", encoder, data_files=wikitext, max_length=64, seed=seed) for seed in (0, 1))
    rows = [task.train[index] for index in range(8)]
    first = task.collator(rows)
    torch.rand(7)  # the global generator must not matter
    second = task.collator(rows)
    assert torch.equal(first["input_ids"], second["input_ids"]) and torch.equal(first["labels"], second["labels"])
    assert not torch.equal(first["labels"], other.collator(rows)["labels"])
    assert not torch.equal(first["labels"], task.collator(rows[::-1])["labels"].flip(0))
    state = torch.random.get_rng_state()
    task.collator(rows)
    assert torch.equal(state, torch.random.get_rng_state())


def test_evaluation_masks_are_fixed_for_every_run_and_subset(wikitext, encoder):
    task = tasks.load("wikitext2", encoder, data_files=wikitext, max_length=64, seed=3)
    again = tasks.load("wikitext2", encoder, data_files=wikitext, max_length=64, seed=4, max_test=3)
    assert task.test["input_ids"][:3] == again.test["input_ids"] and task.test["labels"][:3] == again.test["labels"]
    batch = task.eval_collator(list(task.test))
    share = (batch["labels"] != IGNORED).sum() / batch["attention_mask"].sum()
    assert 0.10 < share < 0.20 and (batch["input_ids"] == encoder.mask_token_id).any()
    assert task.metrics is tasks.task.masked and "labels" not in task.train.column_names
