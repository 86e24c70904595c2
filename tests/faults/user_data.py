"""Files of every task, valid ones, each with an independent reader of its rows: plain Python, none of the package's."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path
from typing import Any

from faults.campaign import fault_unless


def labelled(rng: random.Random, count: int) -> list[tuple[str, int]]:
    words = ["good", "bad", "film", "caf\u00e9", "\u4e2d\u6587", "it's", "a", "of", "1.5", "\u2028", "\U0001f600"]
    return [
        (f"n{i} " + " ".join(rng.choices(words, k=rng.randint(1, 8))) + " end", rng.randrange(2)) for i in range(count)
    ]


def chats(rng: random.Random, count: int, first: int = 0) -> list[dict]:
    roles = ("user", "assistant")
    made = []
    for i in range(first, first + count):
        turns = [{"role": roles[k % 2], "content": f"q{i} {k} \u00e9"} for k in range(2 * rng.randint(1, 2))]
        made.append({"messages": [{"role": "system", "content": "s"}] * rng.randrange(2) + turns})
    return made


def tsv_rows(text: str, columns: int, label: int, texts: tuple[int, ...], header: bool) -> set:
    kept = text.split("\n")
    while kept and not kept[-1].strip():
        kept.pop()
    rows = [line.removesuffix("\r").split("\t") for line in kept[header:]]
    fault_unless(rows and all(len(row) == columns for row in rows), "another number of columns was accepted")
    return {(*(row[place].strip() for place in texts), row[label]) for row in rows}


def csv_table(text: str) -> set:
    lines = text.replace("\r\n", "\n").split("\n")  # so they end inside quotes as well
    rows = csv.reader([line + "\n" for line in lines][: None if lines[-1] else -1], strict=True)
    rows = list(filter(None, rows))  # blank lines are skipped
    fault_unless(rows[0] == ["text", "label"] and all(len(row) == 2 for row in rows), "another table was accepted")
    return {tuple(row) for row in rows[1:]}


def said_rows(text: str) -> set:
    values = [json.loads(line) for line in text.split("\n") if line.strip()]
    return {said(value["messages"] if isinstance(value, dict) else value) for value in values}


def said(turns: list[dict]) -> str:
    return json.dumps([[turn["role"], turn["content"]] for turn in turns])


def ratings(text: str) -> set:
    rows = tsv_rows(text, 3, 1, (2,), header=False)
    fault_unless(all(math.isfinite(float(rating)) for _, rating in rows), "a rating that is no number was accepted")
    return {(text, str(int(float(rating) > 0))) for text, rating in rows}


def formats(rng: random.Random) -> dict[str, dict[str, tuple[str, Any]]]:
    """task -> file -> its valid text, and an independent reader of its rows."""
    rows, more = labelled(rng, 60), labelled(rng, 40)
    sst2 = lambda part: "sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in part)  # noqa: E731
    mrpc = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    mrpc += "".join(f"{label}\t{i}\t{i + 999}\t{text}\tthe {text}\n" for i, (text, label) in enumerate(rows))
    quoted = "text,label\n" + "".join(f'"{text}, ""so""\nit is",{label}\n' for text, label in rows)
    chat = lambda first: "".join(json.dumps(c, ensure_ascii=False) + "\n" for c in chats(rng, 40, first))  # noqa: E731
    wiki = "".join(
        f" = Title {i} = \n\n {text} . \n = = Part = = \n {text} again \n" for i, (text, _) in enumerate(rows)
    )
    return {
        "sst2": {"train.tsv": (sst2(rows), lambda t: tsv_rows(t, 2, 1, (0,), True)),
                 "dev.tsv": (sst2(more), lambda t: tsv_rows(t, 2, 1, (0,), True))},
        "imdb": {"a.csv": (quoted, csv_table)},
        "mrpc": {"msr_paraphrase_train.txt": (mrpc, lambda t: tsv_rows(t, 5, 0, (3, 4), True))},
        "reviews": {"movieReviewSnippets_GroundTruth.txt": (
            "".join(f"{i}\t{(2 * label - 1) * 1.5}\t{text}\n" for i, (text, label) in enumerate(rows)), ratings)},
        "instruct": {"train.jsonl": (chat(0), said_rows), "validation.jsonl": (chat(90), said_rows)},
        "tulu": {"a.jsonl": (chat(0), said_rows)},
        "wikitext2": {"train.txt": (wiki, None)},
    }  # fmt: skip


def plain(row: Any) -> Any:
    """A row of a corpus as the readers here give it."""
    if isinstance(row, dict):  # as `tulu` keeps it on disk
        row = json.loads(row["chat"])
    if isinstance(row, list):
        return said(row)
    return (row.text, *([] if row.pair is None else [row.pair]), str(row.label))


def parquet_of(rng: random.Random, folder: Path, chosen: str) -> Path:
    import pyarrow
    from pyarrow.parquet import write_table

    (folder / chosen).unlink()
    rows = chats(rng, 40)
    if rng.random() < 0.3:
        rows = [
            {rng.choice(["messages", "message"]): rng.choice([row["messages"], None, "text", 1])} for row in rows[:1]
        ]
    write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet", compression=rng.choice(["snappy", "none"]))
    return folder / "a.parquet"
