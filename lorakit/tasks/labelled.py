"""Labelled texts and pairs: rated review sentences, SST-2 and IMDB (1 is positive), MRPC (1 is a paraphrase)."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from lorakit import assets
from lorakit.assets import hub
from lorakit.tasks import corpus, readers
from lorakit.tasks.corpus import Corpus, Labelled, Recipe, apart, normal, required

Rows = list[Labelled]
# the files that `data_files` must hold
REVIEWS = "reviews/movieReviewSnippets_GroundTruth.txt with columns id⇥mean rating⇥text"
SST2 = "sst2/train.tsv and sst2/dev.tsv with header sentence⇥label, no quoting"
IMDB = "imdb/*.csv with header text,label (a file named test.csv is the test split)"
MRPC = "mrpc/msr_paraphrase_train.txt and, where there is one, mrpc/msr_paraphrase_test.txt, as published by Microsoft"
NEUTRAL = 0.5  # ratings nearer to 0 than this say nothing clear


def _rows(path: Path, rows: Iterable[tuple[int, Sequence[Any]]], strip: bool = True) -> Rows:
    """(line, (text, perhaps its pair, class)) -> rows."""
    found = []
    for line, (*texts, label) in rows:
        text, *pair = (text.strip() for text in texts) if strip else texts
        if str(label) not in ("0", "1"):
            raise readers.bad_row(path, line, "label 0 or 1", label)
        found.append(Labelled(text, pair[0] if pair else None, int(label)))
    return found


def _hub(
    folder: Path | None, repository: str, under: str, splits: Sequence[str], columns: Sequence[str], strip: bool = True
) -> tuple:
    """The rows of each of the splits that the hub has, and then all files they are from."""
    files = hub.data_files(repository, under, splits, folder)
    rows = ([row for path in paths for row in _rows(path, readers.parquet(path, columns), strip)] for paths in files)
    return *rows, sum(files, [])


def _divided(
    rows: Rows, test: Rows, paths: list[Path], group: Callable[..., str] = attrgetter("text"), origin: str = "one file"
) -> Corpus:
    """Cut what is not given from `rows`: validation, and test where `test` is empty."""
    validation, *cut_test, train = corpus.cut(rows, group, 1 if test else 2)
    note = "validation: cut from train" if test else f"validation and test: cut from {origin}"
    return apart(train, validation, test or cut_test[0], paths, note)


# review sentences with a mean crowd rating -----------------------------------------------------------


def reviews_from_folder(folder: Path) -> Corpus:
    path = required(folder, "movieReviewSnippets_GroundTruth.txt", REVIEWS)
    clear: dict[str, Labelled] = {}
    rows = list(readers.tsv(path, ("id", "rating", "text"), header=False))
    for line, (_, value, text) in rows:
        try:
            rating = float(value)
        except ValueError:
            rating = math.nan
        if not math.isfinite(rating):
            raise readers.bad_row(path, line, "a mean rating (a number) in column 2", value)
        if abs(rating) >= NEUTRAL:
            clear[normal(text)] = Labelled(text.strip(), None, int(rating > 0))
    found = _divided(list(clear.values()), [], [path])
    dropped = f"{len(rows) - len(clear)} neutral or duplicate rows dropped"
    found.notes.append(f"label: sign of the mean crowd rating; {dropped}")
    return found


# SST-2 ------------------------------------------------------------------------------------------------


def sst2_from_folder(folder: Path) -> Corpus:
    paths = [required(folder, name, SST2) for name in ("train.tsv", "dev.tsv")]
    train, test = (_rows(path, readers.tsv(path, ("sentence", "label"))) for path in paths)
    return _sst2(train, test, paths)


def sst2_from_hub(folder: Path | None = None) -> Corpus:
    return _sst2(*_hub(folder, "nyu-mll/glue", "sst2", ("train", "validation"), ("sentence", "label")))


def _sst2(rows: Rows, test: Rows, paths: list[Path]) -> Corpus:
    """Validation: whole sentences with all their phrases. A phrase found on both sides goes to neither."""
    families = corpus.phrase_families(row.text for row in rows)
    wholes = [name for name, own in families.items() if own == [name]]
    size = Counter(whole for row in rows for whole in families[normal(row.text)][:1])
    held_out = set(corpus.cut(wholes, str, 1, weight=size.__getitem__, share=corpus.held_out_share(len(rows)))[0])
    sides = [{whole in held_out for whole in families[normal(row.text)]} for row in rows]
    train, validation = ([row for row, at in zip(rows, sides, strict=True) if at == {side}] for side in (False, True))
    theirs = "test: GLUE's validation split (GLUE's own test labels are not public)"
    ours = f"validation: {len(validation)} rows cut from train by whole sentences with their phrases"
    neither = f"{len(rows) - len(train) - len(validation)} phrases of sentences on both sides are in neither"
    return apart(train, validation, test, paths, theirs, f"{ours}; {neither}")


# IMDB -------------------------------------------------------------------------------------------------


def imdb_from_folder(folder: Path) -> Corpus:
    paths = sorted(folder.glob("*.csv")) or [required(folder, "*.csv", IMDB)]
    rows: dict[bool, Rows] = {True: [], False: []}
    for path in paths:
        told = ((line, (row["text"], row["label"])) for line, row in readers.csv_rows(path, columns=("text", "label")))
        rows[path.name == "test.csv"] += _rows(path, told, strip=False)
    return _divided(rows[False], rows[True], paths)


def imdb_from_hub(folder: Path | None = None) -> Corpus:
    return _divided(*_hub(folder, "stanfordnlp/imdb", "plain_text", ("train", "test"), ("text", "label")))


# MRPC -------------------------------------------------------------------------------------------------


def mrpc_from_folder(folder: Path) -> Corpus:
    """Pairs that share a sentence stay in one split; quotes are part of the sentences."""
    paths = [required(folder, "msr_paraphrase_train.txt", MRPC), *folder.glob("msr_paraphrase_test.txt")]
    columns = ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String")

    def pairs(path: Path) -> Rows:
        return _rows(path, ((line, (*pair, label)) for line, (label, _, _, *pair) in readers.tsv(path, columns)))

    rows, test, *_ = *map(pairs, paths), []
    groups = corpus.components([(normal(row.text), normal(row.pair or "")) for row in rows])
    names = {row: rows[group].text for row, group in zip(rows, groups, strict=True)}
    return _divided(rows, test, paths, names.__getitem__, "the training file")


def mrpc_from_hub(folder: Path | None = None) -> Corpus:
    columns = ("sentence1", "sentence2", "label")
    return apart(*_hub(folder, "nyu-mll/glue", "mrpc", ("train", "validation", "test"), columns, strip=False))


RECIPES = {
    "reviews": Recipe("labelled", "asset review-sentences",
                      lambda: reviews_from_folder(assets.fetch("review-sentences")), REVIEWS, reviews_from_folder),
    "sst2": Recipe("labelled", "hub nyu-mll/glue", sst2_from_hub, SST2, sst2_from_folder),
    "imdb": Recipe("labelled", "hub stanfordnlp/imdb", imdb_from_hub, IMDB, imdb_from_folder),
    "mrpc": Recipe("labelled", "hub nyu-mll/glue", mrpc_from_hub, MRPC, mrpc_from_folder, f1=True),
}  # fmt: skip
