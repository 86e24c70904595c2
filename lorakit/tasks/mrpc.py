"""MRPC: do two sentences say the same? Pairs that share a sentence stay in one split; label 1 is a paraphrase."""

from __future__ import annotations

from pathlib import Path

from lorakit.tasks import hub, readers, splits
from lorakit.tasks.corpus import Corpus, Labelled, fingerprints, required

LAYOUT = (
    "mrpc/msr_paraphrase_train.txt and, where there is one, mrpc/msr_paraphrase_test.txt, as published by Microsoft"
)
COLUMNS = ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String")


def from_folder(folder: Path) -> Corpus:
    train_path = required(folder, "msr_paraphrase_train.txt", LAYOUT)
    test_path = folder / "msr_paraphrase_test.txt"
    rows = _read(train_path)
    if not test_path.is_file():
        (validation, test, train), note = _cut(rows, 2), "validation and test: cut from the training file"
        return Corpus(train, validation, test, fingerprints([train_path]), [note])
    test = _read(test_path)
    validation, train = _cut(rows, 1)
    train, validation, notes = splits.keep_apart(train, validation, test, _both)
    return Corpus(
        train, validation, test, fingerprints([train_path, test_path]), ["validation: cut from train", *notes]
    )


def from_hub() -> Corpus:
    names = [f"mrpc/{split}-*.parquet" for split in ("train", "validation", "test")]
    files = list(hub.parquet_files("nyu-mll/glue", names).values())
    train, validation, test = ([row for path in paths for row in _hub_rows(path)] for paths in files)
    train, validation, notes = splits.keep_apart(train, validation, test, _both)
    return Corpus(train, validation, test, fingerprints(sum(files, [])), notes)


def _read(path: Path) -> list[Labelled]:
    """Rows as they stand: quotes are part of the sentences."""
    rows = readers.tsv(path, COLUMNS)
    return [Labelled(a.strip(), b.strip(), readers.class_of(label, path, n)) for n, (label, _, _, a, b) in rows]


def _hub_rows(path: Path) -> list[Labelled]:
    rows = readers.parquet(path, ("sentence1", "sentence2", "label"))
    return [Labelled(r["sentence1"], r["sentence2"], readers.class_of(r["label"], path, n)) for n, r in rows]


def _cut(rows: list[Labelled], parts: int) -> list[list[Labelled]]:
    groups = splits.components([(splits.normal(row.text), splits.normal(row.pair or "")) for row in rows])
    named = list(zip((rows[group].text for group in groups), rows, strict=True))
    return [[row for _, row in part] for part in splits.cut(named, lambda item: item[0], parts)]


def _both(row: Labelled) -> str:
    return f"{row.text}\t{row.pair}"
