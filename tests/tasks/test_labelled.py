"""Labelled tasks: what is read, how it is split, what a bad file says, and the metrics against scikit-learn."""

from __future__ import annotations

import hashlib
import random

import huggingface_hub
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from tokenizers.processors import TemplateProcessing

from lorakit import tasks
from lorakit.errors import AssetError, DataError, ParameterError
from lorakit.tasks import corpus
from lorakit.tasks import task as judged
from lorakit.tasks.build import labelled_columns
from lorakit.tasks.toy import tokenizer as toy

WORDS = ["a", "the", "film", "plot", "cast", "is", "was", "not", "very", "good", "bad", "dull", "and", "but"]
WORDS += ["with", "of"]


def sentences(count: int, length: int = 9, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=length)) + f" {seed}x{i}" for i in range(count)]


def write_sst2(folder, whole=60):
    """Whole sentences, their halves as phrases, one generic phrase, one exact duplicate; a dev file of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    train = []
    for text in sentences(whole):
        text = f"the film {text}"
        words = text.split()
        train += [text, " ".join(words[:5]), " ".join(words[5:])]
    train += ["the film", train[0]]
    rows = [f"{text} \t{index % 2}" for index, text in enumerate(train)]
    (folder / "train.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n", encoding="utf-8")
    dev = [f"{text}\t1" for text in sentences(12, seed=1)]
    (folder / "dev.tsv").write_text("\n".join(["sentence\tlabel", *dev]), encoding="utf-8")
    return train


def sizes(task):
    return tuple(len(getattr(task, split)) for split in judged.SPLITS)


def texts(task, tokenizer, split):
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in getattr(task, split)["input_ids"]]


def test_sst2_splits_share_no_row_and_no_phrase(tmp_path, encoder):
    written = write_sst2(tmp_path / "sst2")
    task = tasks.load("sst2", encoder, data_files=str(tmp_path))
    train, validation, test = (texts(task, encoder, split) for split in ("train", "validation", "test"))
    assert len(test) == 12 and len(validation) >= 6 and len(train) > 100
    for kept in train:
        assert not any(f" {kept} " in f" {other} " or f" {other} " in f" {kept} " for other in validation)
    assert "the film" not in train + validation
    dropped = len(written) - len(train) - len(validation)
    assert f"{dropped} phrases of sentences on both sides" in " ".join(task.notes)
    assert not {*train, *validation} & set(test)


def test_files_lie_in_data_dir_its_subfolder_or_the_environments_and_are_fingerprinted(tmp_path, encoder, monkeypatch):
    write_sst2(tmp_path / "sst2")
    outer = tasks.load("sst2", encoder, data_files=str(tmp_path))
    inner = tasks.load("sst2", encoder, data_files=str(tmp_path / "sst2"))
    assert outer.train["input_ids"] == inner.train["input_ids"]
    content = (tmp_path / "sst2" / "dev.tsv").read_bytes()
    assert outer.files["sst2/dev.tsv"] == hashlib.sha256(content).hexdigest() and len(outer.files) == 2
    assert "data_files" in outer.source and str(tmp_path) not in outer.source
    monkeypatch.setenv("LORAKIT_DATA", str(tmp_path))
    assert "LORAKIT_DATA" in tasks.load("sst2", encoder).source


def test_subsets_are_nested_and_the_same_for_every_seed(tmp_path, encoder):
    write_sst2(tmp_path)
    few = tasks.load("sst2", encoder, data_files=str(tmp_path), max_train=10, max_validation=3, max_test=5, seed=1)
    more = tasks.load("sst2", encoder, data_files=str(tmp_path), max_train=20, seed=2)
    assert sizes(few) == (10, 3, 5)
    assert few.train["input_ids"] == more.train["input_ids"][:10]
    assert few.test["input_ids"] == more.test["input_ids"][:5]


def test_order_of_the_file_does_not_matter(tmp_path, encoder):
    write_sst2(tmp_path / "a")
    (tmp_path / "b").mkdir()
    header, *rows = (tmp_path / "a" / "train.tsv").read_text(encoding="utf-8").splitlines()
    (tmp_path / "b" / "train.tsv").write_text("\n".join([header, *rows[::-1]]), encoding="utf-8")
    (tmp_path / "b" / "dev.tsv").write_bytes((tmp_path / "a" / "dev.tsv").read_bytes())
    first, second = (tasks.load("sst2", encoder, data_files=str(tmp_path / name)) for name in "ab")
    assert sorted(texts(first, encoder, "validation")) == sorted(texts(second, encoder, "validation"))
    few, same = (tasks.load("sst2", encoder, data_files=str(tmp_path / name), max_train=10) for name in "ab")
    assert sorted(texts(few, encoder, "train")) == sorted(texts(same, encoder, "train"))


def test_imdb_reads_quoted_csv_and_cuts_three_ways(tmp_path, encoder):
    rows = [f'"{text}, ""quoted""\nand more",{index % 2}' for index, text in enumerate(sentences(50))]
    (tmp_path / "reviews-50.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    task = tasks.load("imdb", encoder, data_files=str(tmp_path))
    assert sizes(task) == (40, 5, 5)
    assert '"quoted"\nand more' in texts(task, encoder, "train")[0]
    held_out = texts(task, encoder, "validation")[0]
    (tmp_path / "test.csv").write_text(f'text,label\n"{sentences(1, seed=2)[0]}",1\n{rows[3].upper()}\n')
    given = tasks.load("imdb", encoder, data_files=str(tmp_path))  # without the row that the test file holds too
    assert len(given.test) == 2 and len(given.train) + len(given.validation) == 49
    assert held_out in texts(given, encoder, "train") + texts(given, encoder, "validation")
    assert any("later split" in note for note in given.notes)


def write_mrpc(path, pairs, start=0):
    rows = [f"{i % 2}\t{i}\t{i + 1}\t{a}\t{b}" for i, (a, b) in enumerate(pairs, start)]
    path.write_bytes(("\r\n".join(["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", *rows]) + "\r\n").encode("utf-8-sig"))


def test_mrpc_keeps_quotes_and_pairs_that_share_a_sentence_together(tmp_path, encoder, decoder):
    pool = sentences(60)
    pairs = [(f'"{pool[i]} "', pool[i // 3]) for i in range(60)]
    write_mrpc(tmp_path / "msr_paraphrase_train.txt", pairs)
    task = tasks.load("mrpc", encoder, data_files=str(tmp_path))
    assert task.metrics is tasks.task.classification_f1
    assert len(task.train) + len(task.validation) + len(task.test) == 60
    seconds = [{text.split('"')[-1].strip() for text in texts(task, encoder, s)} for s in tasks.task.SPLITS]
    assert not seconds[0] & seconds[1] and not seconds[0] & seconds[2] and not seconds[1] & seconds[2]
    assert all(text.startswith('"') for text in texts(task, encoder, "train"))
    plain = tasks.load("mrpc", decoder, data_files=str(tmp_path))
    assert all(text.count("\n") == 1 for text in texts(plain, decoder, "train"))  # no separator token: a line break

    write_mrpc(tmp_path / "msr_paraphrase_train.txt", zip(sentences(40), sentences(40, seed=1), strict=True))
    write_mrpc(tmp_path / "msr_paraphrase_test.txt", zip(sentences(8, seed=2), sentences(8, seed=3), strict=True))
    task = tasks.load("mrpc", encoder, data_files=str(tmp_path))
    assert sizes(task) == (36, 4, 8)


def test_pairs_carry_token_types_where_the_tokenizer_gives_them(encoder):
    encoder = toy.encoder_tokenizer()
    encoder.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    assert "token_type_ids" not in labelled_columns([corpus.Labelled("a b", None, 1)], encoder, 32)
    special = [(token, encoder.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")]
    template = {"single": "[CLS] $A [SEP]", "pair": "[CLS] $A [SEP] $B:1 [SEP]:1", "special_tokens": special}
    encoder.backend_tokenizer.post_processor = TemplateProcessing(**template)
    pair = labelled_columns([corpus.Labelled("ab", "cd", 1)], encoder, 32)
    assert pair["token_type_ids"] == [[0, 0, 0, 0, 1, 1, 1]]


def test_reviews_are_deduplicated_and_labelled_by_sign(tmp_path, encoder):
    rated = [(i + 1, (-1) ** i * (0.4 + i / 10), text) for i, text in enumerate(sentences(40))]
    rated += [(41, 3.0, rated[10][2].upper())]
    lines = "\r\n".join(f"{i}\t{rating}\t{text}" for i, rating, text in rated)
    (tmp_path / "movieReviewSnippets_GroundTruth.txt").write_bytes(lines.encode())
    task = tasks.load("reviews", encoder, data_files=str(tmp_path))
    labels = {}
    for split in ("train", "validation", "test"):
        labels |= dict(zip(texts(task, encoder, split), getattr(task, split)["labels"], strict=True))
    assert len(labels) == 39  # 40 less one neutral row
    for _, rating, text in rated[1:40]:
        assert labels.get(text, labels.get(text.upper())) == int(rating > 0) or text == rated[10][2]


@pytest.mark.parametrize("name", ["toy-reviews", "toy-stories"])
def test_toy_splits_are_disjoint_and_the_same_every_time(name, encoder):
    task, again = (tasks.load(name, encoder, seed=seed, max_length=256) for seed in (0, 1))
    if name == "toy-reviews":
        train, validation, test = (set(map(tuple, getattr(task, split)["input_ids"])) for split in judged.SPLITS)
        assert sizes(task) == (960, 240, 240)
        assert not train & validation and not (train | validation) & test
    assert task.train["input_ids"] == again.train["input_ids"] and task.test["labels"] == again.test["labels"]


BAD_SST2 = [
    ("sentence\tlabel\ngood one\t1\nno label here\n", "train.tsv, line 3", "2 tab-separated columns"),
    ("sentence\tlabel\ngood one\tpositive\n", "train.tsv, line 2", "label 0 or 1"),
    ("text\tclass\ngood one\t1\n", "train.tsv, line 1", "header"),
    (b"sentence\tlabel\nfine\t1\n\xff\xfe\t1\n", "train.tsv, line 3", "UTF-8"),
    ("", "train.tsv, line 1", "2 tab-separated columns"),
    ("sentence\tlabel\none row\t1\n", "too few", "split"),
]


@pytest.mark.parametrize(("content", "where", "expected"), BAD_SST2)
def test_a_bad_row_names_file_line_and_what_was_expected(tmp_path, encoder, content, where, expected):
    write_sst2(tmp_path)
    (tmp_path / "train.tsv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=expected) as error:
        tasks.load("sst2", encoder, data_files=str(tmp_path))
    assert where in str(error.value)


BAD_FILES = [
    ("imdb", "a.csv", 'text,label\n"two\nlines",1\nfine,2\n', r"a\.csv, line 4: expected label 0 or 1; found '2'"),
    ("imdb", "a.csv", 'text,label\n"never closed,1\n', r"a\.csv, line 2"),
    ("reviews", "movieReviewSnippets_GroundTruth.txt", "1\tgreat\ta film\n", "line 1: expected a mean rating"),
]


@pytest.mark.parametrize(("name", "file", "content", "message"), BAD_FILES)
def test_bad_rows_of_the_other_formats(tmp_path, encoder, name, file, content, message):
    (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=message):
        tasks.load(name, encoder, data_files=str(tmp_path))


LAYOUTS = {"sst2": "train.tsv", "imdb": "imdb/", "mrpc": "msr_paraphrase_train.txt", "reviews": "GroundTruth.txt"}


@pytest.mark.parametrize(("name", "file"), LAYOUTS.items())
def test_a_missing_file_names_the_parameter_the_file_and_the_layout(tmp_path, encoder, name, file):
    with pytest.raises(DataError, match=file) as error:
        tasks.load(name, encoder, data_files=str(tmp_path))
    assert "data_files" in str(error.value) and "layout" in str(error.value)
    with pytest.raises(DataError, match="no such folder"):
        tasks.load(name, encoder, data_files=str(tmp_path / "absent"))


BAD_PARAMETERS = [
    ({"name": "sst3"}, "task='sst3'.*reviews, sst2"),
    ({"max_length": 2}, "max_length=2"),
    ({"max_test": -1}, "max_test=-1"),
    ({"packing": True}, "packing=True"),
    ({"data_files": "somewhere"}, "data_files='somewhere'.*must be empty"),
    ({"name": "toy-instruct"}, "task='toy-instruct'.*encoder"),
]


@pytest.mark.parametrize(("given", "message"), BAD_PARAMETERS)
def test_a_bad_parameter_is_named(encoder, given, message):
    with pytest.raises(ParameterError, match=message):
        tasks.load(**({"name": "toy-reviews", "tokenizer": encoder} | given))


def test_kind_needs_only_the_name_and_the_family():
    assert tasks.kind("sst2") == tasks.kind("mrpc", "decoder") == "classify"
    assert tasks.kind("wikitext2", "encoder") == "masked" and tasks.kind("wikitext2", "decoder") == "causal"
    assert tasks.kind("tulu") == "causal"
    with pytest.raises(ParameterError, match="model_kind"):
        tasks.kind("wikitext2")


@pytest.mark.parametrize("name", ["sst2", "imdb", "mrpc", "tulu", "wikitext2"])
def test_an_unreachable_hub_names_the_ways_out(name, decoder, monkeypatch, tmp_path):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("LORAKIT_DATA", raising=False)
    with pytest.raises(AssetError, match="no route to host.*data_files.*LORAKIT_DATA.*HF_HOME"):
        tasks.load(name, decoder)


def test_the_hub_s_files_are_read_as_the_folder_s_are(tmp_path, encoder, monkeypatch):
    write_sst2(tmp_path)
    local = tasks.load("sst2", encoder, data_files=str(tmp_path))
    (tmp_path / "sst2").mkdir()
    for file, name in (("train.tsv", "train"), ("dev.tsv", "validation")):
        rows = [line.split("\t") for line in (tmp_path / file).read_text().splitlines()[1:]]
        table = pyarrow.table({"sentence": [row[0] for row in rows], "label": [int(row[1]) for row in rows]})
        parquet.write_table(table, tmp_path / "sst2" / f"{name}-00000-of-00001.parquet")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: tmp_path)
    monkeypatch.delenv("LORAKIT_DATA", raising=False)
    remote = tasks.load("sst2", encoder)
    assert remote.train["input_ids"] == local.train["input_ids"] and remote.test["labels"] == local.test["labels"]
    assert remote.source == "hub nyu-mll/glue" and len(remote.files) == 2


@pytest.mark.parametrize(("length", "padded"), [(3, 8), (6, 8), (7, 16)])
def test_collators_pad_to_a_multiple_of_8(encoder, length, padded):
    task = tasks.load("toy-reviews", encoder, max_train=4)
    ids = encoder("x" * length)["input_ids"]  # two special tokens more
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": 1, "extra": "ignored"}]
    batch = task.collator([*rows, task.train[0] | {"input_ids": [5], "attention_mask": [1], "labels": 0}])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].shape == (2, padded) and batch["attention_mask"].sum(1).tolist() == [length + 2, 1]
    assert (batch["input_ids"][1, 1:] == encoder.pad_token_id).all() and batch["labels"].tolist() == [1, 0]


def test_f1_and_accuracy_are_scikit_learn_s():
    from sklearn.metrics import accuracy_score, f1_score

    rng = np.random.default_rng(0)
    for _ in range(20):
        predicted, actual = (rng.random(40) < 0.3), (rng.random(40) < 0.6)
        stats = np.stack([rng.random(40), np.ones(40), predicted, actual], axis=1)
        found = judged.classification_f1(stats)
        assert found["f1"] == pytest.approx(f1_score(actual, predicted), abs=1e-12)
        assert found["accuracy"] == pytest.approx(accuracy_score(actual, predicted), abs=1e-12)
        assert found["loss"] == pytest.approx(stats[:, 0].mean())
    assert judged.classification_f1(np.array([[0.1, 1, 0, 0]]))["f1"] == 0.0


def test_components_join_rows_through_any_shared_key():
    groups = corpus.components([("a", "b"), ("c", "d"), ("e", "b"), ("f", "e"), ("g", "h"), ("d", "g")])
    assert groups[0] == groups[2] == groups[3] and groups[1] == groups[4] == groups[5] and groups[0] != groups[1]


def test_phrases_belong_to_every_sentence_that_has_them():
    families = corpus.phrase_families(["a b c d", "b c", "C D e", "c d", "b", "ab"])
    assert families["b c"] == ["a b c d"] and families["ab"] == ["ab"] and families["b"] == ["a b c d"]
    assert sorted(families["c d"]) == ["a b c d", "c d e"]


def test_cut_keeps_groups_whole_and_its_share():
    rows = [f"{group} {i}" for group in "abcdefghijklmnopqrst" for i in range(5)]
    first, second, rest = corpus.cut(rows, lambda row: row[0], 2)
    assert (len(first), len(second), len(rest)) == (10, 10, 80)
    assert not {row[0] for row in first} & {row[0] for row in second + rest}
    with pytest.raises(DataError, match="too few"):
        corpus.cut(["a", "A "], str, 1)
