"""`tulu`: rows on disk are the rows that memory would hold, are written once, and a run of them resumes bitwise."""

from __future__ import annotations

import errno
import json
import random
from pathlib import Path

import pyarrow
import pytest
import torch
from datasets.utils.logging import is_progress_bar_enabled
from pyarrow import parquet
from safetensors.torch import load_file

import lorakit
from lorakit import tasks
from lorakit.errors import CheckpointError, DataError
from lorakit.tasks import chat, conversations, corpus, own, shards
from lorakit.training import BudgetTrainer

WORDS = ["red", "blue", "green", "three", "four", "five", "the", "a", "cat", "dog", "runs", "sleeps"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
    return folder


def chats(count, seed=0):
    """Some equal in all but the last answer, some too long, some in other letters."""
    rng = random.Random(seed)
    said = lambda most: " ".join(rng.choices(WORDS, k=rng.randint(1, most)))  # noqa: E731
    made = []
    for _ in range(count):
        asked = rng.choice([said(3), said(40), said(40).upper()])
        made.append([{"role": "user", "content": asked}, {"role": "assistant", "content": said(20)}])
    return made


@pytest.fixture
def folder(tmp_path):
    """Three shards, of a few hundred chats each."""
    rows = chats(700)
    for number, part in enumerate((rows[:300], rows[300:500], rows[500:])):
        parquet.write_table(pyarrow.table({"messages": part}), tmp_path / f"{number}.parquet", row_group_size=64)
    return tmp_path


@pytest.mark.parametrize("options", [{}, {"max_length": 24}, {"max_train": 100}, {"packing": True, "max_length": 40}])
def test_rows_on_disk_are_the_rows_that_memory_would_hold(folder, decoder, options):
    paths = sorted(folder.glob("*.parquet"))
    validation, test, train = corpus.cut([row for path in paths for row in own.chats(path)], corpus.content, 2)
    held = corpus.Corpus(train, validation, test, {}, ["validation and test: cut from train"])
    wanted = tasks.load("tulu", decoder, text=(held, "memory"), **options)
    found = tasks.load("tulu", decoder, data_files=str(folder), **options)
    for split in tasks.task.SPLITS:
        assert getattr(found, split).to_dict() == getattr(wanted, split).to_dict()
    assert found.notes == wanted.notes and bool(found.train.cache_files)
    assert found.answers == wanted.answers
    assert "max_length" not in options or any("chats dropped" in note for note in found.notes)


def counted(monkeypatch, place, name):
    """The calls of `place.name`, as they come."""
    calls, real = [], getattr(place, name)
    monkeypatch.setattr(place, name, lambda *given, **more: (calls.append(given), real(*given, **more))[1])
    return calls


def test_what_is_in_the_cache_is_not_made_again_and_what_differs_is(folder, decoder, monkeypatch):
    read, encoded = counted(monkeypatch, shards, "place"), counted(monkeypatch, chat, "encode")

    def made(**options):
        """How many rows were read and training batches encoded."""
        read.clear()
        encoded.clear()
        tasks.load("tulu", decoder, data_files=str(folder), **options)
        return len(read), len(encoded) - 2  # validation and test are in memory

    assert made(seed=1) == (700, 1)
    assert made(seed=2) == (0, 0) and made(max_validation=5) == (0, 0)
    assert made(max_length=64) == (0, 1)
    parquet.write_table(pyarrow.table({"messages": chats(90, seed=3)}), folder / "2.parquet")
    assert made() == (590, 1)


def test_the_two_ways_to_read_the_same_files_do_not_share_rows(tmp_path, decoder, monkeypatch):
    (tmp_path / "data").mkdir()
    rows = [*chats(40), [{"role": "user", "content": "no answer"}]]
    parquet.write_table(pyarrow.table({"messages": rows}), tmp_path / "data" / "train-0.parquet")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: tmp_path)
    found = conversations.tulu_from_hub()
    assert "1 rows dropped: not user and assistant in turn" in found.notes
    with pytest.raises(DataError, match=r"train-0\.parquet, line 41: expected"):
        conversations.tulu_from_folder(tmp_path / "data")


def test_a_malformed_row_late_in_the_shards_leaves_nothing_that_is_read_later(folder, decoder, cache):
    bad = folder / "3.jsonl"
    bad.write_text(json.dumps({"messages": chats(1)[0]}) + '\n{"messages": []}\n')
    for _ in range(2):
        with pytest.raises(DataError, match=r"3\.jsonl, line 2: expected"):
            tasks.load("tulu", decoder, data_files=str(folder))
        assert not list(cache.rglob("*.arrow"))
    bad.write_text(json.dumps({"messages": chats(1)[0]}) + "\n")
    task = tasks.load("tulu", decoder, data_files=str(folder), max_length=512)
    assert sum(len(getattr(task, split)) for split in tasks.task.SPLITS) == 701


def test_a_cache_that_cannot_be_written_and_too_few_rows_are_refused(folder, tmp_path, monkeypatch):
    for name in ("1.parquet", "2.parquet"):
        (folder / name).unlink()
    parquet.write_table(pyarrow.table({"messages": chats(1) * 5}), folder / "0.parquet")
    with pytest.raises(DataError, match="5 rows are too few, or too much alike, to be split into 3 parts"):
        conversations.tulu_from_folder(folder)
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "taken")
    with pytest.raises(DataError, match=r"the cache of datasets \(HF_DATASETS_CACHE\) cannot be written"):
        conversations.tulu_from_folder(folder)
    assert (tmp_path / "taken").read_text() == "a file"


def test_files_without_a_chat_or_that_change_while_they_are_read_are_refused_and_nothing_is_kept(
    folder, tmp_path, cache, monkeypatch
):
    (tmp_path / "data").mkdir()
    empty = pyarrow.table({"messages": [[{"role": "user", "content": "?"}]]})
    for rows in (empty, empty[:0]):
        parquet.write_table(rows, tmp_path / "data" / "train-0.parquet")
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: tmp_path)
        with pytest.raises(DataError, match=r"no rows that are chats in data/train-0\.parquet"):
            conversations.tulu_from_hub()
    before = (folder / "2.parquet").read_bytes()

    def swapping(path):
        parquet.write_table(pyarrow.table({"messages": chats(90, seed=3)}), folder / "2.parquet")
        return own.chats(path)

    with pytest.raises(DataError, match="changed while they were read"):
        shards.corpus_of(sorted(folder.glob("*.parquet")), swapping)
    assert not list(cache.rglob("*.arrow"))
    (folder / "2.parquet").write_bytes(before)


def test_what_a_full_disk_or_a_power_cut_does_to_the_cache_is_one_error(folder, decoder, cache, monkeypatch):
    load = lambda: tasks.load("tulu", decoder, data_files=str(folder))  # noqa: E731

    def full(self, *_, cache_file_name, **__):
        Path(cache_file_name).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(DataError, match=r"HF_DATASETS_CACHE.*No space left"):
        patched.setattr("datasets.Dataset.map", full)
        load()
    assert [path.name for path in cache.rglob("*") if path.is_file() and "tokens" in str(path)] == []
    load()
    [tokens] = cache.rglob("tokens-*.arrow")
    [rows] = cache.rglob("generator-train.arrow")
    for damaged in (tokens, rows):
        damaged.write_bytes(b"")
        with pytest.raises(DataError, match="cannot be written or read, is the disk full or it damaged"):
            load()


def test_bars_of_datasets_are_shown_where_ours_are(folder, decoder, capsys):
    tasks.load("tulu", decoder, data_files=str(folder))
    assert capsys.readouterr().err == "" and is_progress_bar_enabled()


@pytest.mark.parametrize("grouped", [False, True])
def test_a_run_stopped_within_a_shard_resumes_bitwise_and_a_shard_that_vanishes_stops_no_run(
    folder, tmp_path, monkeypatch, grouped
):
    given = {"model": "toy-decoder", "task": "tulu", "data_files": str(folder), "max_length": 48, "max_validation": 8}
    given |= {"max_test": 8, "budget": 8, "budget_unit": "accepted_steps", "batch_size": 4, "save_steps": 3}
    given |= {"evaluations": 2, "latency_repeats": 0, "predict_memory": False, "group_by_length": grouped}
    kept, step = tmp_path / "kept", BudgetTrainer.training_step
    whole = lorakit.run(given | {"run_dir": str(tmp_path / "whole")})

    def stopping(self, *arguments):
        (folder / "1.parquet").exists() and (folder / "1.parquet").rename(kept)
        if self.ledger.steps == 5:
            raise KeyboardInterrupt
        return step(self, *arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(BudgetTrainer, "training_step", stopping)
        lorakit.run(given | {"run_dir": str(tmp_path / "cut")})
    with pytest.raises(CheckpointError, match="another run: data"):  # which would have other rows
        lorakit.run(given | {"run_dir": str(tmp_path / "cut")})
    kept.rename(folder / "1.parquet")
    resumed = lorakit.run(given | {"run_dir": str(tmp_path / "cut")})
    assert any(note.startswith("resumed at step 3") for note in resumed.notes)
    stored = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "cut")]
    first, second = map(load_file, map(str, stored))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert whole.final == resumed.final
