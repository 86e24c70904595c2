"""Sentences and reviews with a sentiment: SST-2, IMDB and the rated review sentences; label 1 is positive."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lorakit.tasks import hub, readers, splits
from lorakit.tasks.corpus import Corpus, Labelled, fingerprints, required

SST2_LAYOUT = "sst2/train.tsv and sst2/dev.tsv with header sentence⇥label, no quoting"
IMDB_LAYOUT = "imdb/*.csv with header text,label (a file named test.csv is the test split)"
REVIEWS_LAYOUT = "reviews/movieReviewSnippets_GroundTruth.txt with columns id⇥mean rating⇥text"
NEUTRAL = 0.5  # ratings nearer to 0 than this say nothing clear


def sst2_from_folder(folder: Path) -> Corpus:
    paths = [required(folder, name, SST2_LAYOUT) for name in ("train.tsv", "dev.tsv")]
    train, test = map(_sst2_rows, paths)
    return _sst2(train, test, paths)


def _sst2_rows(path: Path) -> list[Labelled]:
    rows = readers.tsv(path, ("sentence", "label"))
    return [Labelled(text.strip(), None, readers.class_of(label, path, number)) for number, (text, label) in rows]


def sst2_from_hub() -> Corpus:
    train, test = hub.parquet_files("nyu-mll/glue", ("sst2/train-*.parquet", "sst2/validation-*.parquet")).values()
    return _sst2(_hub_rows(train, "sentence"), _hub_rows(test, "sentence"), [*train, *test])


def _sst2(rows: list[Labelled], test: list[Labelled], paths: list[Path]) -> Corpus:
    train, validation, note = _cut_families(rows)
    train, validation, notes = splits.keep_apart(train, validation, test, _text)
    origin = "test: GLUE's validation split (GLUE's own test labels are not public)"
    return Corpus(train, validation, test, fingerprints(paths), [origin, note, *notes])


def _cut_families(rows: list[Labelled]) -> tuple[list[Labelled], list[Labelled], str]:
    """Validation: whole sentences with all their phrases. A phrase found on both sides goes to neither."""
    families = splits.phrase_families(row.text for row in rows)
    wholes = [name for name, own in families.items() if own == [name]]
    size = {name: 0 for name in wholes}
    for row in rows:
        for whole in families[splits.normal(row.text)][:1]:
            size[whole] += 1
    held_out = set(splits.cut(wholes, str, 1, weight=size.__getitem__, share=splits.held_out_share(len(rows)))[0])
    sides = [{whole in held_out for whole in families[splits.normal(row.text)]} for row in rows]
    train = [row for row, side in zip(rows, sides, strict=True) if side == {False}]
    validation = [row for row, side in zip(rows, sides, strict=True) if side == {True}]
    note = (
        f"validation: {len(validation)} rows cut from train by whole sentences with their phrases; "
        f"{len(rows) - len(train) - len(validation)} phrases of sentences on both sides are in neither"
    )
    return train, validation, note


def imdb_from_folder(folder: Path) -> Corpus:
    paths = sorted(folder.glob("*.csv")) or [required(folder, "*.csv", IMDB_LAYOUT)]
    test_paths = [path for path in paths if path.name == "test.csv"]
    rows = [row for path in paths if path not in test_paths for row in _imdb_rows(path)]
    return _labelled(rows, [row for path in test_paths for row in _imdb_rows(path)], paths)


def _imdb_rows(path: Path) -> Iterator[Labelled]:
    for number, (text, label) in readers.csv_rows(path, ("text", "label")):
        yield Labelled(text, None, readers.class_of(label, path, number))


def imdb_from_hub() -> Corpus:
    train, test = hub.parquet_files(
        "stanfordnlp/imdb", ("plain_text/train-*.parquet", "plain_text/test-*.parquet")
    ).values()
    return _labelled(_hub_rows(train, "text"), _hub_rows(test, "text"), [*train, *test])


def reviews_from_folder(folder: Path) -> Corpus:
    path = required(folder, "movieReviewSnippets_GroundTruth.txt", REVIEWS_LAYOUT)
    rated = [
        (_rating(rating, path, n), text) for n, (_, rating, text) in readers.tsv(path, ("id", "rating", "text"), False)
    ]
    clear = {splits.normal(text): (rating, text) for rating, text in rated if abs(rating) >= NEUTRAL}
    corpus = _labelled([Labelled(text.strip(), None, int(rating > 0)) for rating, text in clear.values()], [], [path])
    corpus.notes.append(
        f"label: sign of the mean crowd rating; {len(rated) - len(clear)} neutral or duplicate rows dropped"
    )
    return corpus


def _rating(value: str, path: Path, line: int) -> float:
    try:
        return float(value)
    except ValueError:
        raise readers.bad_row(path, line, "a mean rating (a number) in column 2", value) from None


def reviews_from_asset() -> Corpus:
    from lorakit import assets

    return reviews_from_folder(Path(assets.fetch("review-sentences")))


def _hub_rows(paths: list[Path], column: str) -> list[Labelled]:
    return [
        Labelled(row[column].strip(), None, readers.class_of(row["label"], path, number))
        for path in paths
        for number, row in readers.parquet(path, (column, "label"))
    ]


def _labelled(rows: list[Labelled], test: list[Labelled], paths: list[Path]) -> Corpus:
    """Cut what is not given from `rows`: validation, and test where `test` is empty."""
    validation, *cut_test, train = splits.cut(rows, _text, 1 if test else 2)
    test, note = (
        (test, "validation: cut from train") if test else (cut_test[0], "validation and test: cut from one file")
    )
    train, validation, notes = splits.keep_apart(train, validation, test, _text)
    return Corpus(train, validation, test, fingerprints(paths), [note, *notes])


def _text(row: Labelled) -> str:
    return row.text
