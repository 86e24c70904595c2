"""The reader's own data: the same rows from every kind of file, splits by name or cut, classes as the data say them."""

from __future__ import annotations

import csv
import json
import random
import re
import shlex

import pandas
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, Value

import lorakit
from lorakit import params, records, tasks
from lorakit.cli import main
from lorakit.errors import DataError, ParameterError
from lorakit.files import PROJECT
from lorakit.settings import DataSettings
from lorakit.tasks import readers

TOPICS = {
    "billing": ["the invoice is wrong", "charged twice this month", "refund my card please"],
    "login": ["cannot sign in", "the password is not accepted", "locked out of my account"],
    "shipping": ["the parcel is late", "wrong address on the box", "nothing has arrived yet"],
}
QUICK = {
    **{"model": "toy-encoder", "task": "labelled", "budget": 8, "evaluations": 1, "batch_size": 8, "rank": 2},
    **{"max_length": 32, "latency_repeats": 0, "predict_memory": False},
}
CHAT = [{"role": "user", "content": "Is it late?"}, {"role": "assistant", "content": "It is."}]


def tickets(count: int = 120) -> list[dict[str, str]]:
    """Support tickets of three classes, all different."""
    draw, found = random.Random(0), {}
    while len(found) < count:
        topic = draw.choice([*TOPICS])
        found[f"ticket {len(found)}: {draw.choice(TOPICS[topic])}"] = topic
    return [{"text": text, "label": topic} for text, topic in found.items()]


def written(folder, name: str, rows: list[dict]) -> None:
    """As CSV, TSV, JSONL or Parquet, by the file's ending."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, [*rows[0]], delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)


def corpus(task: str, place, **asked):
    return tasks.read(task, str(place), DataSettings(task=task, **asked))[0]


def splits(found) -> list[list]:
    return [found.train, found.validation, found.test]


def test_the_same_rows_from_every_kind_of_file_and_from_a_dataset(tmp_path):
    rows = [row | {"text": row["text"] + ', "quoted"\nsecond line'} for row in tickets()]
    seen = []
    for ending in ("csv", "tsv", "jsonl", "parquet"):
        written(tmp_path / ending, f"all.{ending}", rows)
        seen.append(corpus("labelled", tmp_path / ending))
    seen.append(tasks.read("labelled", dataset=DatasetDict(train=Dataset.from_list(rows)))[0])
    assert all(splits(found) == splits(seen[0]) and found.classes == [*TOPICS] for found in seen)
    assert all(found.notes[0] == "validation and test: cut from train" for found in seen)
    everything = sum(splits(seen[0]), [])
    assert sorted(row.text for row in everything) == sorted(row["text"] for row in rows)
    named = {row["text"]: row["label"] for row in rows}
    assert all(seen[0].classes[row.label] == named[row.text] for row in everything)
    assert [*seen[0].files] == ["csv/all.csv"] and [*seen[-1].files] == ["dataset['train']"]


def test_a_file_s_name_says_its_split_and_a_glob_which_files(tmp_path):
    rows = tickets()
    for name, part in {"train_a.csv": rows[:40], "b.csv": rows[40:80], "dev.csv": rows[80:100]}.items():
        written(tmp_path, name, part)
    written(tmp_path, "my-test.jsonl", rows[100:])
    (tmp_path / "notes.md").write_text("no data")
    found = corpus("labelled", tmp_path)
    assert list(map(len, splits(found))) == [80, 20, 20]
    assert found.notes == ["train: b.csv, train_a.csv; validation: dev.csv; test: my-test.jsonl"]
    assert {row.text for row in found.test} == {row["text"] for row in rows[100:]}
    only = corpus("labelled", f"{tmp_path}/*.csv")
    assert [len(only.train) + len(only.test), len(only.validation)] == [80, 20]
    assert only.notes == ["test: cut from train", "train: b.csv, train_a.csv; validation: dev.csv"]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [(["10", "9", "-1"], ["-1", "9", "10"]), ([True, False, True], ["False", "True"]), ([2, 0, 1], ["0", "1", "2"]),
     (["b", "a", "10"], ["10", "a", "b"])],
)  # fmt: skip
def test_classes_are_in_the_order_of_numbers_or_of_names(labels, classes, tmp_path):
    rows = [{"text": f"row {n}", "label": labels[n % 3]} for n in range(30)]
    written(tmp_path, "rows.jsonl", rows)
    assert corpus("labelled", tmp_path).classes == classes


def test_pairs_text_and_chats(tmp_path):
    rows = [{"a": f"one {n}", "b": f"two {n}", "same": n % 2} for n in range(30)]
    written(tmp_path / "p", "pairs.tsv", rows)
    columns = {"text_column": "a", "pair_column": "b", "label_column": "same"}
    pairs = sum(splits(corpus("pairs", tmp_path / "p", **columns)), [])
    assert {(row.text, row.pair, row.label) for row in pairs} == {(f"one {n}", f"two {n}", n % 2) for n in range(30)}
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.txt").write_text("\n".join(f"first {n}\nits second line\n\n" for n in range(30)))
    documents = sum(splits(corpus("text", tmp_path / "d")), [])
    assert sorted(documents) == sorted(f"first {n}\nits second line" for n in range(30))
    asked = [{"prompt": f"Is it {n}?", "completion": "Yes."} for n in range(15)]
    told = [{"messages": [CHAT[0] | {"content": f"And {n}?"}, CHAT[1]]} for n in range(15)]
    alpaca = [{"instruction": f"Add {n}.", "input": "" if n % 2 else f"{n}", "output": "Done."} for n in range(15)]
    written(tmp_path / "c", "alpaca.csv", alpaca)
    written(tmp_path / "c", "prompts.jsonl", asked)
    written(tmp_path / "c", "messages.parquet", told)
    chats = sum(splits(corpus("chat", tmp_path / "c")), [])
    assert len(chats) == 45 and {chat[1]["content"] for chat in chats} == {"Yes.", "It is.", "Done."}
    added = {f"Add {n}." if n % 2 else f"Add {n}.\n\n{n}" for n in range(15)}
    assert {chat[0]["content"] for chat in chats if chat[1]["content"] == "Done."} == added


@pytest.mark.parametrize("answer", ["completion", "output"])
def test_of_two_questions_the_one_with_an_answer_is_asked_in_every_process(tmp_path, answer):
    """Sets of instructions for code have both columns; the order of a set would change from process to process."""
    rows = [{"instruction": f"Add {n}.", "prompt": f"Below: add {n}.", answer: "Done."} for n in range(15)]
    written(tmp_path / "a", "a.jsonl", rows)
    first = {chat[0]["content"][:3] for chat in sum(splits(corpus("chat", tmp_path / "a")), [])}
    assert first == {"Bel" if answer == "completion" else "Add"}


def test_from_a_csv_of_tickets_to_an_exported_model_that_names_classes(tmp_path, capsys):
    """Three commands' work; and a `DatasetDict` of the same rows is the same run."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    written(tmp_path / "data", "tickets.csv", [{"body": row["text"], "team": row["label"]} for row in tickets()])
    given = QUICK | {"text_column": "body", "label_column": "team"}
    record = lorakit.run(given | {"data_files": str(tmp_path / "data"), "run_dir": str(tmp_path / "run")})
    assert record.status == "done" and record.details["classes"] == [*TOPICS]
    records.write(record, tmp_path / "r.json")
    assert records.read(tmp_path / "r.json").details["classes"] == [*TOPICS]
    adapter, merged = tmp_path / "run" / "adapter", tmp_path / "merged"
    told = ["--base", "toy-encoder", "--kind", "classify"]
    assert main(["export", str(adapter), "--merge", *told, "--output", str(merged)]) == 0
    model, tokenizer = (kind.from_pretrained(merged) for kind in (AutoModelForSequenceClassification, AutoTokenizer))
    assert model.config.id2label == dict(enumerate(TOPICS)) and model.config.num_labels == 3
    (answer,) = pipeline("text-classification", model=model, tokenizer=tokenizer)(["the invoice is wrong"])
    assert answer["label"] in TOPICS
    rows = [{"body": row["text"], "team": row["label"]} for row in tickets()]
    again = lorakit.run(given, dataset=DatasetDict(train=Dataset.from_list(rows)))
    assert again.final == record.final


def test_what_readme_says_of_own_data_is_done_as_it_stands(tmp_path, monkeypatch, capsys):
    """Its three commands and its snippet, but for the model, which is a toy, and a budget of a few steps."""
    section = (PROJECT / "README.md").read_text(encoding="utf-8").split("## Your data\n")[1].split("\n## ")[0]
    commands, snippet = re.findall(r"```(?:python)?\n(.*?)```", section, re.S)
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "tickets.csv", [{"body": row["text"], "team": row["label"]} for row in tickets()])
    short = {"search": ["-p", "search_budget=2"], "train": ["-p", "budget=4"], "export": ["--base", "toy-encoder"]}
    for line in commands.splitlines():
        program, name, *rest = shlex.split(line.replace("all-MiniLM-L6-v2", "toy-encoder"))
        assert (program, main([name, *rest, *short.pop(name)])) == ("lorakit", 0)
    assert not short
    capsys.readouterr()
    exec(snippet, {})
    label, score = capsys.readouterr().out.split()
    assert label in TOPICS and 1 / 3 <= float(score) <= 1


def test_what_would_change_classes_or_splits_unseen_does_not(tmp_path):
    """Equal numbers written otherwise, names of a ClassLabel, chats with other keys, a name that is also a glob."""
    rows = [{"text": f"row {n}", "label": ["1", "01", "0"][n % 3]} for n in range(30)]
    written(tmp_path / "n", "rows.csv", rows)
    assert corpus("labelled", tmp_path / "n").classes == ["0", "01", "1"]
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    told = Dataset.from_list([{"text": f"row {n}", "label": n % 2} for n in range(30)], features=features)
    assert tasks.read("labelled", dataset=DatasetDict(train=told))[0].classes == ["neg", "pos"]
    chats = [[{"content": f"Is it {n}?", "role": "user", "id": n}, CHAT[1]] for n in range(30)]
    again = [[{"role": "user", "content": f"Is it {n}?"}, CHAT[1]] for n in range(10)]
    written(tmp_path / "c", "train.jsonl", [{"prompt": "p", "messages": chat} for chat in chats])
    written(tmp_path / "c", "test.jsonl", [{"messages": chat} for chat in again])
    found = corpus("chat", tmp_path / "c")
    assert len(found.test) == 10 and len(found.train) + len(found.validation) == 20
    written(tmp_path / "g", "t1.csv", rows)
    written(tmp_path / "g", "t[1].csv", [row | {"text": f"other {row['text']}"} for row in rows])
    assert all(row.text.startswith("other") for row in corpus("labelled", tmp_path / "g" / "t[1].csv").train)
    written(tmp_path / "t", "ab-test.csv", rows)
    with pytest.raises(DataError, match="no training rows: t/ab-test.csv; a file named after another split"):
        corpus("labelled", tmp_path / "t")
    rare = [{"text": f"row {n}", "label": "ab"[n % 2]} for n in range(60)] + [
        {"text": f"x {n}", "label": f"c{n}"} for n in range(30)
    ]
    written(tmp_path / "r", "rows.csv", rare)
    assert any(
        note.startswith("no training row is left of class c") for note in corpus("labelled", tmp_path / "r").notes
    )
    with pytest.raises(ParameterError, match="dataset='Dataset': must be split -> rows"):
        tasks.read("labelled", dataset=told)
    written(tmp_path / "f", "rows.csv", [row | {"label": "0.5"} for row in rows])
    with pytest.raises(DataError, match="line 2: expected a class .*found '0.5'"):
        corpus("labelled", tmp_path / "f")


def test_what_a_dataset_leaves_unsaid(tmp_path):
    """Labels of no class are none (the hub's test splits have -1), a stream has no features, a list no fingerprint."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    rows = [{"text": f"row {n}", "label": n % 2} for n in range(30)]
    told = Dataset.from_list(rows, features=features)
    for label in (-1, None):
        bare = Dataset.from_list([{"text": "new", "label": label}], features=features)
        with pytest.raises(DataError, match=r"dataset\['test'\], line 1: expected a class .*; found None"):
            tasks.read("labelled", dataset={"train": told, "test": bare})
    stream = IterableDataset.from_generator(lambda: iter(rows))
    read = [tasks.read("labelled", dataset={"train": given})[0] for given in (stream, rows, rows[:-1])]
    assert stream.features is None and splits(read[0]) == splits(read[1])
    assert read[0].files == read[1].files != read[2].files


def test_files_of_one_name_in_folders_of_one_name_are_told_apart(tmp_path):
    for year in ("2023", "2024"):
        (tmp_path / year).mkdir()
        written(tmp_path / year / "jan", "rows.csv", [{"text": f"{year} {n}", "label": n % 2} for n in range(30)])
    assert [*corpus("labelled", f"{tmp_path}/*/jan/rows.csv").files] == ["2023/jan/rows.csv", "2024/jan/rows.csv"]
    assert [*corpus("labelled", f"{tmp_path}/2023/jan/rows.csv").files] == ["jan/rows.csv"]


BROKEN = {
    "text_column='body': no such column in .*rows.jsonl, line 1; it has text, label": {"text_column": "body"},
    "label_column='team': no such column in .*; it has text, label": {"label_column": "team"},
    "rows.jsonl, line 3: expected text in column 'text'; found '  '": {3: {"text": "  ", "label": "a"}},
    "rows.jsonl, line 2: expected text in column 'text'; found 7": {2: {"text": 7, "label": "a"}},
    "rows.jsonl, line 4: expected a class .*; found None": {4: {"text": "x", "label": None}},
    "rows.jsonl, line 4: expected a class .*; found 0.5": {4: {"text": "x", "label": 0.5}},
    "text_column='text': no such column in .*, line 5; it has label": {5: {"label": "a"}},
    "line 6: expected an object with a value for each column; found 'text'": {6: "text"},
    "training rows have 1 classes, must be at least 2: a": {"same": True},
}


@pytest.mark.parametrize("says", BROKEN)
def test_a_row_that_is_none_is_named_with_its_file_and_line(says, tmp_path):
    asked = dict(BROKEN[says])
    rows = [{"text": f"row {n}", "label": "ab"[n % 2] if "same" not in asked else "a"} for n in range(30)]
    asked.pop("same", None)
    for line in [key for key in asked if isinstance(key, int)]:
        rows[line - 1] = asked.pop(line)
    written(tmp_path, "rows.jsonl", rows)
    with pytest.raises(DataError, match=says):
        corpus("labelled", tmp_path, **asked)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "line 1: expected a header line"), ("text,text\na,b\n", "line 1: expected a header line of different col"),
        ("text,label\na,b\nc\n", "line 3: expected 2 columns text, label; found .'c'."),
        ('text,label\na,b\n\n"c,d\ne,f\n', "line 5: .*quote.*unexpected end of data; good to line 2"),
        ('text,label\n"a" b,c\n', "line 2: expected a text that begins with a quote to end with one"),
        (",text,label\n0,a,b\n", "line 1: expected a name for every column; found ..., .text"),
        ("text,label\n", "line 2: expected a .*no rows"),
    ],
)  # fmt: skip
def test_a_csv_that_is_none_is_told_so(text, says, tmp_path):
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(DataError, match=says):
        corpus("labelled", tmp_path)


def test_a_quote_in_a_tsv_swallows_no_rows(tmp_path):
    """As pandas writes texts with quotes, tabs or line ends they are read; no rows between texts' own quotes."""
    texts = ['say "no"', "a\ttab", "two\nlines", '"all of it"'] * 8
    table = pandas.DataFrame({"text": [f"{text} {n}" for n, text in enumerate(texts)], "label": [0, 1] * 16})
    table.to_csv(tmp_path / "rows.tsv", sep="\t", index=False)
    assert {row.text for row in sum(splits(corpus("labelled", tmp_path)), [])} == {*table["text"]}
    with open(tmp_path / "rows.tsv", "a") as file:
        file.write('"hello there\t1\nmiddle\t0\nbye"\t1\n')
    line = 1 + len((tmp_path / "rows.tsv").read_text().splitlines()) - 3
    told = "expected no line end in a text of one column or with a tab: a quote that opens"
    with pytest.raises(DataError, match=f"line {line}: {told}"):
        corpus("labelled", tmp_path)


def test_a_quote_in_a_tsv_of_one_column_swallows_no_rows(tmp_path):
    """Where no tab tells them apart from a text with line ends."""
    (tmp_path / "rows.tsv").write_text('text\none\n"he said\nand left\nfor good"\nfour\n')
    with pytest.raises(DataError, match="rows.tsv, line 3: expected no line end in a text of one column"):
        [*readers.csv_rows(tmp_path / "rows.tsv", "\t")]
    (tmp_path / "rows.tsv").write_text('text\none\n"all of it"\n"say ""no"""\n')
    assert [row["text"] for _, row in readers.csv_rows(tmp_path / "rows.tsv", "\t")] == ["one", "all of it", 'say "no"']


def test_what_is_asked_for_must_be_there(tmp_path):
    with pytest.raises(DataError, match=r"data_files=.*: no file for task labelled; must be a folder, file or glob of"):
        corpus("labelled", tmp_path)
    with pytest.raises(ParameterError, match="data_files='': with task chat must be a folder, file or glob"):
        corpus("chat", "")
    with pytest.raises(ParameterError, match="task='sst2': of a dataset must be labelled, pairs, text, chat"):
        tasks.read("sst2", dataset={"train": []})
    with pytest.raises(DataError, match="dataset: splits must be among train, validation, test, not dev"):
        tasks.read("text", dataset={"train": [{"text": "a"}], "dev": []})
    written(tmp_path, "train.jsonl", [{"text": f"row {n}", "label": "ab"[n % 2]} for n in range(30)])
    written(tmp_path, "test.jsonl", [{"text": "new", "label": "c"}])
    with pytest.raises(
        DataError, match=r"test.jsonl, line 1: expected a class of the training rows \(a, b\); found 'c'"
    ):
        corpus("labelled", tmp_path)
    written(tmp_path / "c", "c.jsonl", [{"messages": CHAT[:1]}] * 30)
    with pytest.raises(
        DataError, match="c.jsonl, line 1: expected .*user and assistant in turn.* or prompt and completion"
    ):
        corpus("chat", tmp_path / "c")
    with pytest.raises(ParameterError, match="pair_column='b': .*task one of labelled, pairs, text, chat"):
        params.check(lorakit.resolve(QUICK | {"pair_column": "b", "task": "toy-reviews"}))
