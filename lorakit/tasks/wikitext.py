"""WikiText-2: encyclopedia articles; an article is never divided between splits."""

import re
from collections.abc import Iterable
from pathlib import Path

from lorakit.assets import hub
from lorakit.errors import DataError
from lorakit.tasks import readers
from lorakit.tasks.corpus import Corpus, Recipe, apart, cut, fingerprints

LAYOUT = "wikitext2/{train,valid,test}.txt, or one of them alone, plain text with `= Heading =` lines"
FILES = {"train": "train.txt", "validation": "valid.txt", "test": "test.txt"}
HEADING = re.compile(r" ?= [^=](.*[^=])? = ?")  # of an article; sections have `= =`


def from_folder(folder: Path) -> Corpus:
    paths = {split: folder / name for split, name in FILES.items() if (folder / name).is_file()}
    texts = {split: _articles(line for _, line in readers.lines(path)) for split, path in paths.items()}
    for split, path in paths.items():
        if not texts[split]:
            raise readers.bad_row(path, 1, "at least one `= Heading =` line with text below", "none")
    if len(texts) == 3:
        return apart(*texts.values(), paths.values())
    if len(texts) != 1:
        missing = ", ".join(name for split, name in FILES.items() if split not in paths)
        raise DataError(f"data_files: {folder} lacks {missing}; expected layout: {LAYOUT}")
    [path], [articles] = paths.values(), texts.values()
    validation, test, train = cut(articles, str, 2, weight=len)
    counts = f"{len(train)} train, {len(validation)} validation, {len(test)} test"
    note = f"only {path.name} is there, split by articles: {counts}"
    return Corpus(train, validation, test, fingerprints([path]), [note])


def from_hub(folder: Path | None = None) -> Corpus:
    files = hub.data_files("Salesforce/wikitext", "wikitext-2-raw-v1", FILES, folder)
    texts = ([text for path in paths for _, [text] in readers.parquet(path, ("text",))] for paths in files)
    return apart(*(_articles(text.rstrip("\n") for text in lines) for lines in texts), sum(files, []))


def _articles(lines: Iterable[str]) -> list[str]:
    """Documents, each from its heading to the next, without blank lines."""
    documents: list[list[str]] = []
    for line in lines:
        if HEADING.fullmatch(line):
            documents.append([])
        if documents and line.strip():
            documents[-1].append(line.strip())
    return ["\n".join(document) for document in documents]


RECIPES = {"wikitext2": Recipe("documents", "hub Salesforce/wikitext", from_hub, LAYOUT, from_folder)}
