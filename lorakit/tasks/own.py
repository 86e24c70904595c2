"""The reader's own data: labelled texts, pairs, plain text or chats, of files or of a `datasets.DatasetDict`.

CSV and TSV with a header line, JSONL, Parquet; plain text also as .txt, its documents parted by blank lines. A file is
of the test or the validation split by its name; where a split has none it is cut from train.
"""

import glob
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from lorakit.errors import DataError
from lorakit.settings import OWN, DataSettings
from lorakit.tasks import chat, corpus, readers
from lorakit.tasks.corpus import Corpus, Labelled, Recipe, apart, content
from lorakit.tasks.task import SPLITS

LAYOUT = "a folder, file or glob of .csv, .tsv, .jsonl, .parquet or, for text, .txt"
# split -> words in its files' names
NAMED = {"test": ("test", "testing", "holdout"), "validation": ("validation", "valid", "val", "dev", "eval")}
ASKED = {"prompt": "completion", "instruction": "output"}  # question -> answer; Alpaca's may have an `input`
Row = tuple[Path, int, dict[str, Any]]  # file, line, values by column


def read(name: str, place: str | Path, asked: DataSettings, dataset: Mapping[str, Any] | None = None) -> Corpus:
    """The corpus of task `name`.

    Args:
        place: where its files are: a folder, a file or a glob.
        asked: says which columns; dataset: split -> rows, in place of files.

    Raises:
        DataError: no such files, a row that is none (with file and line), a column that is not there (with those that
            are), a class that training rows lack, or one class alone.
    """
    if dataset is not None:
        if unknown := {*dataset} - {*SPLITS}:
            raise DataError(f"dataset: splits must be among {', '.join(SPLITS)}, not {', '.join(sorted(unknown))}")
        whole, told = {split: Path(f"dataset[{split!r}]") for split in dataset}, []
        given = {split: [(at, n, row) for n, row in enumerate(_named(dataset[split], asked), 1)]
                 for split, at in whole.items()}  # fmt: skip
        files = {str(whole[split]): getattr(dataset[split], "_fingerprint", "")
                 or sha256(repr(rows).encode()).hexdigest() for split, rows in given.items()}  # fmt: skip
    else:
        paths = _files(place, name)
        whole = {split: [path for path in paths if _split(path) == split] for split in SPLITS}
        given = {split: [row for path in parts for row in _rows(path)] for split, parts in whole.items()}
        files = corpus.fingerprints([path.resolve() for path in paths])
        told = [f"{split}: {', '.join(path.name for path in parts)}" for split, parts in whole.items() if parts]
    if not given.get("train"):
        raise DataError(f"no training rows: {', '.join(files)}; a file named after another split is none of train")
    made = {split: [(row, MADE[name](row, asked)) for row in given.get(split, ())] for split in SPLITS}
    classes = _classes(made) if FORMS[name] == "labelled" else []
    number = {label: place for place, label in enumerate(classes)}
    rows = {split: [row._replace(label=number[row.label]) if classes else row for _, row in found]
            for split, found in made.items()}  # fmt: skip
    lacking = [split for split in SPLITS[1:] if not rows[split]]
    *parts, rows["train"] = corpus.cut(rows["train"], content, len(lacking)) if lacking else [rows["train"]]
    rows |= zip(lacking, parts, strict=True)
    found = apart(*rows.values(), (), *[f"{' and '.join(lacking)}: cut from train"] * bool(lacking))
    taught = {row.label for row in found.train} if classes else set()
    if untaught := [name for name, label in number.items() if label not in taught]:
        found.notes.append(f"no training row is left of class {', '.join(untaught)}")
    return replace(found, files=files, classes=classes, notes=[*found.notes, *["; ".join(told)] * bool(told)])


def _named(rows: Any, asked: DataSettings) -> Iterator[Any]:
    """Rows, with the names of their classes where a `datasets.ClassLabel` says them."""
    column = asked.label_column  # a number that is no class's, as of rows without a label, is None
    names = dict(enumerate(getattr((getattr(rows, "features", None) or {}).get(column), "names", ())))
    return (row | {column: names.get(row[column])} if names else row for row in rows)


def _files(place: str | Path, name: str) -> list[Path]:
    known = {*FORMATS} - ({".txt"} if name != "text" else set())
    here = Path(place)
    paths = [here] if here.is_file() else map(Path, glob.glob(str(place), recursive=True))
    paths = here.iterdir() if here.is_dir() else paths
    found = sorted(path for path in paths if path.suffix.lower() in known and path.is_file())
    if not found:
        raise DataError(f"data_files={str(place)!r}: no file for task {name}; must be {LAYOUT}")
    return found


def _split(path: Path) -> str:
    words = re.split(r"[^a-z]+", path.stem.lower())
    return next((split for split, names in NAMED.items() if {*names} & {*words}), "train")


def _rows(path: Path) -> Iterator[Row]:
    return ((path, line, row) for line, row in FORMATS[path.suffix.lower()](path))


def _documents(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    parts = re.split(r"\n\s*\n", "\n".join(line for _, line in readers.lines(path)))
    return enumerate(({"text": part.strip("\n")} for part in parts if part.strip()), 1)


FORMATS: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    ".csv": readers.csv_rows, ".tsv": partial(readers.csv_rows, delimiter="\t"), ".jsonl": readers.jsonl,
    ".parquet": readers.parquet, ".txt": _documents,
}  # fmt: skip


def texts(path: Path, columns: Mapping[str, str]) -> list[tuple[str, ...]]:
    """The texts of each row of one file, in columns by the parameter that names them; of `.txt` the column is "text".

    Raises:
        DataError: no such file, one of another kind, a column that is not there, or no text in it (with file and line).
    """
    if not path.is_file() or path.suffix.lower() not in FORMATS:
        raise DataError(f"{path}: no file, or of another kind than {', '.join(FORMATS)}")
    return [tuple(_text(row, column, parameter) for parameter, column in columns.items()) for row in _rows(path)]


def _value(row: Row, column: str, parameter: str = "") -> Any:
    path, line, values = row
    if not isinstance(values, dict):
        raise readers.bad_row(path, line, "an object with a value for each column", values)
    if column not in values:
        told = f"{parameter}={column!r}: no such column" if parameter else f"no column {column!r}"
        raise DataError(f"{told} in {path}, line {line}; it has {', '.join(map(str, values)) or 'none'}")
    return values[column]


def _text(row: Row, column: str, parameter: str = "") -> str:
    text = _value(row, column, parameter)
    if not isinstance(text, str) or not text.strip():
        raise readers.bad_row(*row[:2], f"text in column {column!r}", text)
    return text


def _document(row: Row, asked: DataSettings) -> str:
    return _text(row, asked.text_column, "text_column")


def _labelled(row: Row, asked: DataSettings, pair: bool = False) -> Labelled:
    label = _value(row, asked.label_column, "label_column")
    number = isinstance(label, str) and re.fullmatch(r"\s*-?\d*\.\d+(e-?\d+)?\s*", label, re.I)
    if number or not isinstance(label, str | int) or not str(label).strip():
        raise readers.bad_row(*row[:2], f"a class (a name or a whole number) in column {asked.label_column!r}", label)
    other = _text(row, asked.pair_column, "pair_column") if pair else None
    return Labelled(_document(row, asked), other, str(label).strip())


def chats(path: Path) -> Iterator[chat.Chat]:
    """The conversation in each row of a file: of a column `messages`, or of those in `ASKED`."""
    return map(_chat, _rows(path))


def _chat(row: Row, asked: Any = None) -> chat.Chat:
    messages = row[2]
    asks = [name for name in ASKED if name in messages] if isinstance(messages, dict) else []
    first = sorted(asks, key=lambda name: ASKED[name] not in messages)  # one whose answer is there
    if first and messages.get("messages") is None:
        question, more = _text(row, first[0]), first[0] == "instruction" and messages.get("input")
        texts = {"user": f"{question}\n\n{_text(row, 'input')}" if more else question,
                 "assistant": _text(row, ASKED[first[0]])}  # fmt: skip
        messages = [{"role": role, "content": text} for role, text in texts.items()]
    elif isinstance(messages, dict):
        messages = messages.get("messages")
    if not chat.valid(messages):
        raise readers.bad_row(*row[:2], chat.EXPECTED, messages)
    return [{"role": told["role"], "content": told["content"]} for told in messages] if asked else messages


def _classes(made: Mapping[str, list[tuple[Row, Labelled]]]) -> list[str]:
    """The training rows' classes, numbers by size, names by the alphabet."""
    found = {row.label for _, row in made["train"]}
    numbers = all(re.fullmatch(r"-?\d+", label) for label in found)
    names = sorted(found, key=lambda name: (int(name) if numbers else 0, name))
    if len(names) < 2:
        raise DataError(f"training rows have {len(names)} classes, must be at least 2: {', '.join(names) or 'no rows'}")
    for (path, line, _), row in made["validation"] + made["test"]:
        if row.label not in found:
            raise readers.bad_row(path, line, f"a class of the training rows ({', '.join(names)})", row.label)
    return names


Make = Callable[[Row, DataSettings], Any]
MADE: dict[str, Make] = dict(zip(OWN, (_labelled, partial(_labelled, pair=True), _document, _chat), strict=True))
FORMS = dict(zip(OWN, ("labelled", "labelled", "documents", "chats"), strict=True))
RECIPES = {name: Recipe(form, "", None, LAYOUT) for name, form in FORMS.items()}
