"""The real data sets: how many rows there are, and that the splits are apart."""

from __future__ import annotations

import pytest

from lorakit import tasks
from lorakit.tasks import registry
from lorakit.tasks.corpus import normal
from lorakit.tasks.toy import tokenizer as toy

pytestmark = pytest.mark.data


def read(name, data_files):
    folder = data_files / name
    if not folder.is_dir():
        pytest.skip(f"no {name} in LORAKIT_DATA")
    return registry.read(name, str(data_files))[0]


def test_sst2_counts_and_no_shared_phrase(data_files):
    corpus = read("sst2", data_files)
    neither = int(corpus.notes[1].split("; ")[1].split()[0])
    assert len(corpus.train) + len(corpus.validation) + neither == 67349 and neither < 1000
    assert len(corpus.test) == 872 and 1500 < len(corpus.validation) < 2500
    validation = {normal(row.text) for row in corpus.validation}
    train = {normal(row.text) for row in corpus.train}
    for pieces, wholes in ((train, validation), (validation, train)):
        for whole in wholes:
            words = whole.split()
            spans = (" ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1))
            assert not any(span in pieces for span in spans)


def test_imdb_and_mrpc_counts(data_files):
    for name, rows in (("imdb", 1000), ("mrpc", 4045)):
        corpus = read(name, data_files)
        kept = [*corpus.train, *corpus.validation, *corpus.test]
        if not any("later split" in note for note in corpus.notes):
            assert len(kept) >= rows
        assert 0.4 < sum(row.label for row in kept) / len(kept) < 0.75


def test_wikitext2_splits_share_no_article(data_files):
    corpus = read("wikitext2", data_files)
    parts = [set(split) for split in (corpus.train, corpus.validation, corpus.test)]
    assert all(parts) and sum(map(len, parts)) == len(set.union(*parts))
    assert all(text.startswith("= ") for part in parts for text in part)


def test_instruct_has_gsm8k_rows_to_match(data_files):
    read("instruct", data_files)
    task = tasks.load("instruct", toy.decoder_tokenizer(), data_files=str(data_files), max_length=256, max_train=50)
    assert task.answers and all("####" in answer for _, answer in task.answers)
