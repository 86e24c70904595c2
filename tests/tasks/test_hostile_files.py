"""Files that are odd but right are read; those that are wrong are one line with file and line number."""

from __future__ import annotations

import random

import pyarrow
import pytest
from pyarrow import parquet

import lorakit
from lorakit import tasks
from lorakit.errors import DataError
from lorakit.tasks import corpus, registry

SST2, MRPC = "sentence\tlabel\n", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
SNIPPETS = "movieReviewSnippets_GroundTruth.txt"


def rows(first: int = 0, count: int = 60) -> str:
    return "".join(f"text number {i} of words w{i}\t{i % 2}\n" for i in range(first, first + count))


def pairs(count: int = 60) -> str:
    return "".join(f"{i % 2}\t{i}\t{i + 1000}\tfirst {i} words\tsecond {i} words\n" for i in range(count))


def chats(first: int = 0, count: int = 60) -> str:
    return "".join(said(f"q{i}") for i in range(first, first + count))


def ratings(count: int = 60) -> str:
    return "".join(f"{i}\t{(-1) ** i}.5\tsome text {i}\n" for i in range(count))


def imdb(count: int = 60, long: str = "") -> str:
    return "text,label\n" + "".join(f"review {i} {long * (i == 3)},{i % 2}\n" for i in range(count))


def said(content: str) -> str:
    """A line of a chat that asks `content`, as it would stand in the file."""
    return f'{{"messages":[{{"role":"user","content":"{content}"}},{{"role":"assistant","content":"a"}}]}}\n'


def load(folder, task, files, tokenizer, **options):
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return tasks.load(task, tokenizer, data_files=str(folder), **options)


READ = {
    "blank last lines": ("sst2", {"train.tsv": SST2 + rows() + "\n", "dev.tsv": SST2 + rows(90) + "\n \n"}),
    "blank last line, pairs": ("mrpc", {"msr_paraphrase_train.txt": MRPC + pairs() + "\n"}),
    "blank last line, ratings": ("reviews", {SNIPPETS: ratings() + "\n"}),
    "a field of 140,000 characters": ("imdb", {"a.csv": imdb(long="x" * 140_000)}),
    "a whole character in two escapes": (
        "instruct", {"train.jsonl": chats() + said("\\ud83d\\ude00"), "validation.jsonl": chats(90)}),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_what_is_odd_but_right_is_read(tmp_path, encoder, decoder, case):
    task, files = READ[case]
    made = load(tmp_path, task, files, decoder if task == "instruct" else encoder)
    assert min(map(len, (made.train, made.validation, made.test))) > 0


REFUSED = {
    "header-only dev": ("sst2", {"train.tsv": SST2 + rows(), "dev.tsv": SST2}, r"dev\.tsv, line 2: .*'no rows'"),
    "header-only train": ("sst2", {"train.tsv": SST2, "dev.tsv": SST2 + rows()}, r"train\.tsv, line 2: .*'no rows'"),
    "header-only csv": ("imdb", {"a.csv": imdb(), "test.csv": imdb(0)}, r"test\.csv, line 2: .*'no rows'"),
    "header-only pairs": (
        "mrpc", {"msr_paraphrase_train.txt": MRPC + pairs(), "msr_paraphrase_test.txt": MRPC}, r"test\.txt, line 2"),
    "no chats": ("instruct", {"train.jsonl": "\n", "validation.jsonl": chats()}, r"train\.jsonl, line 2: .*'no rows'"),
    "train is dev": ("sst2", {"train.tsv": SST2 + rows(), "dev.tsv": SST2 + rows()}, "no rows are left.*later split"),
    "NUL": ("sst2", {"train.tsv": SST2 + rows() + "a\0b\t1\n", "dev.tsv": SST2 + rows(90)}, r"tsv, line 62: .*NUL"),
    "UTF-16": ("wikitext2", {"train.txt": "".join(f"{c}\0" for c in " = A = \n text \n")}, r"\.txt, line 1: .*NUL"),
    "a blank line between": ("sst2", {"train.tsv": SST2 + "\n" + rows(), "dev.tsv": SST2 + rows(90)}, r"tsv, line 2"),
    **{f"rating {value}": ("reviews", {SNIPPETS: ratings() + f"9\t{value}\ttext\n"}, rf"line 61: .*'{value}'")
       for value in ("inf", "-inf", "nan", "1e999")},
    **{f"chat {why}": ("instruct", {"train.jsonl": chats() + line, "validation.jsonl": chats(90)}, "jsonl, line 61")
       for why, line in {"half a character": said("\\uD800"), "a long number": f'{{"messages":{"1" * 5000}}}\n',
                         "nested deeply": "[" * 100_000 + "\n", "NaN": '{"messages":NaN}\n'}.items()},
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_one_line(tmp_path, encoder, decoder, case):
    task, files, message = REFUSED[case]
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path, task, files, decoder if task == "instruct" else encoder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_one_class_is_noted(tmp_path, encoder):
    one = "".join(line.replace("\t0", "\t1") + "\n" for line in rows().splitlines())
    made = load(tmp_path, "sst2", {"train.tsv": SST2 + one, "dev.tsv": SST2 + rows(90)}, encoder)
    assert [note for note in made.notes if "of class" in note] == [
        f"{split}: all {len(getattr(made, split))} rows are of class 1" for split in ("train", "validation")
    ]


def test_a_text_without_a_token_is_left_out_and_counted(tmp_path, encoder, save_bare):
    files = {"train.tsv": SST2 + rows() + "\t1\n", "dev.tsv": SST2 + rows(90, 3) + "\t0\n"}
    assert len(load(tmp_path, "sst2", files, encoder).test) == 4  # [CLS] and [SEP] are something to read
    given = {"model": save_bare, "task": "sst2", "data_files": str(tmp_path), "budget": 2, "evaluations": 1}
    record = lorakit.run(given | {"eval_batch_size": 1, "predict_memory": False})
    assert record.status == "done" and "test: 1 of 4 rows dropped, their text has no token" in record.notes


@pytest.fixture
def save_bare(tmp_path, tiny_gpt2):
    """A folder with a GPT-2 whose tokenizer adds nothing to a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "text", "number", "of", "words"])}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]")
    tokenizer.save_pretrained(tmp_path / "bare")
    tiny_gpt2().save_pretrained(tmp_path / "bare")
    return str(tmp_path / "bare")


def all_spans(texts: list[str]) -> dict[str, set[str]]:
    """The plain way: every run of words of every whole text."""
    known, wholes = {corpus.normal(text) for text in texts}, {}
    for text in sorted(known, key=lambda text: (-len(text.split()), text)):
        if text not in wholes:
            words = text.split()
            spans = {" ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}
            for span in spans & known:
                wholes.setdefault(span, set()).add(text)
    return wholes


@pytest.mark.parametrize("seed", range(5))
def test_phrases_are_those_of_all_spans(seed):
    rng = random.Random(seed)
    texts = [" ".join(rng.choices("abAB", k=rng.randint(0, 9))) for _ in range(200)]
    assert {name: {*own} for name, own in corpus.phrase_families(texts).items()} == all_spans(texts)


@pytest.mark.timeout(120)  # all spans of one of them are 4.5 million, 40 GB
def test_a_text_of_many_words_takes_no_time():
    texts = [" ".join(f"w{seed}x{i % 700}" for i in range(3000)) for seed in range(20)]
    assert len(corpus.phrase_families([*texts, "w3x5 w3x6", "w4x699 w4x0 w4x1 w4x2"])) == 22


def turn(role, content):
    return {"role": role, "content": content}


SNAPSHOTS = {  # of the hub: task -> folder, and the columns of its files
    "sst2": ("sst2", ("train", "validation"), lambda i: {"sentence": f"s {i}", "label": i % 2}),
    "mrpc": ("mrpc", ("train", "validation", "test"),
             lambda i: {"sentence1": f"a {i}", "sentence2": f"b {i}", "label": i % 2}),
    "imdb": ("plain_text", ("train", "test"), lambda i: {"text": f"t {i}", "label": i % 2}),
    "wikitext2": ("wikitext-2-raw-v1", ("train", "validation", "test"),
                  lambda i: {"text": f" t {i}\n" if i % 2 else f" = {i} = \n"}),
    "tulu": ("data", ("train",), lambda i: {"messages": [turn("user", f"q {i}"), turn("assistant", "a")]}),
}  # fmt: skip


@pytest.mark.parametrize("below", ["", "task"])
@pytest.mark.parametrize("name", SNAPSHOTS)
def test_a_snapshot_of_the_hub_is_read_where_data_dir_names_it(tmp_path, monkeypatch, name, below):
    """As a clone or `hf download` leaves it; beside other tasks' folders it may stand under the task's name."""
    inside, splits, row = SNAPSHOTS[name]
    folder = tmp_path / (name if below and inside != name else "") / inside
    folder.mkdir(parents=True)
    for number, split in enumerate(splits):
        rows = pyarrow.Table.from_pylist([row(100 * number + i) for i in range(40)])
        parquet.write_table(rows, folder / f"{split}-00000-of-00001.parquet")
    corpus, source = registry.read(name, str(tmp_path))
    assert "hub" in source and "snapshot in data_files" in source
    assert len(corpus.train) + len(corpus.validation) + len(corpus.test) >= 30
    (folder / f"{splits[0]}-00000-of-00001.parquet").rename(folder / "other.parquet")
    partly = rf"data_files: .* no snapshot of the hub's .*: no file {inside}/{splits[0]}-\*"
    with pytest.raises(DataError, match=partly if len(splits) > 1 else "data_files: .* expected layout"):
        registry.read(name, str(tmp_path))


def test_a_folder_that_also_holds_parquet_files_is_still_ones_own(tmp_path):
    for name in ("train", "dev"):
        rows = "".join(f"a sentence {name} {i}\t{i % 2}\n" for i in range(40))
        (tmp_path / f"{name}.tsv").write_text(f"sentence\tlabel\n{rows}")
    (tmp_path / "cache").mkdir()
    parquet.write_table(pyarrow.table({"x": [1]}), tmp_path / "cache" / "x.parquet")
    assert registry.read("sst2", str(tmp_path))[1] == "files of data_files"
