"""What was trained, taken away: exported with its card, asked for classes or for text, the base's answer beside it."""

import argparse
import json
import sys
from collections import namedtuple
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pandas import DataFrame
from transformers import pipeline

from lorakit import adapters, models, records, tasks
from lorakit.adapters.peft_format import CONFIG_FILE
from lorakit.adapters.saving import OWN_CONFIG_FILE
from lorakit.adapters.storage import described
from lorakit.errors import require
from lorakit.files import require_place, written
from lorakit.head import NAMED
from lorakit.quiet import quiet
from lorakit.runs.card import card, hub_name
from lorakit.tasks import chat, own, registry
from lorakit.tasks.toy.tokenizer import CHAT_TEMPLATE

SHOWN = 60  # characters of a text in a table here
ASKED = {
    "classify": "`lorakit predict` asks it",
    "causal": "`lorakit generate` asks it",
    "masked": "nobody asks it here",
}
# base: name of what was adapted or trained whole, or ""; record: of its run, or None; notes: what a reader must know
Opened = namedtuple("Opened", "model tokenizer kind base adapted record notes")


def opened(asked: argparse.Namespace, wanted: str = "") -> Opened:
    """The whole model that `asked.model` names, or the adapter there on its base, kept as in training.

    Args:
        wanted: the kind it must be; empty: any.

    Raises:
        LorakitError: there is none, it is of another kind, or nothing says its base or its kind.
    """
    folder, notes, labels, dtype = Path(asked.model).expanduser(), [], None, "auto"
    adapted = any((folder / name).is_file() for name in (CONFIG_FILE, OWN_CONFIG_FILE))
    record = records.read(folder / records.BESIDE) if (folder / records.BESIDE).is_file() else None
    run, print_of_base = (record.resolved, record.fingerprints.get("model")) if record else ({}, None)
    name, base, named = asked.model, run.get("model", ""), (folder / "config.json").is_file()
    if adapted:
        said, kind, labels = described(folder)
        name = base = asked.base or base or said
        kind = asked.kind or kind or (run.get("task") and tasks.kind(run["task"], models.family(base)))
        dtype = run.get("dtype", dtype)
    else:
        heads, told = str(models.config(name).architectures), "is no adapter, which --base and --kind are of"
        require(not (asked.base or asked.kind), "MODEL", name, told)
        kind, named = next((kind for part, kind in NAMED.items() if part in heads), None), True
    for option, value in (("--base", name), ("--kind", kind)):
        require(bool(value), option, value, f"{asked.model} does not say it: give {option}")
    require(wanted in ("", kind), "MODEL", asked.model, f"is of kind {kind!r}: {ASKED[kind]}")
    classes = [*models.config(asked.model).id2label.values()] if kind == "classify" and named else []
    loaded = models.load(name, kind, num_labels=labels or 2, classes=classes, dtype=dtype)
    model, tokenizer = loaded.model, loaded.tokenizer
    if adapted:
        if print_of_base not in (None, loaded.fingerprint):
            notes.append(f"{base} is not the very model that the adapter was trained over: another fingerprint")
        if not record:
            notes.append("nothing says how the base was kept in training; here it is as it is, not in NF4")
        elif run.get("quantize") == "nf4":
            adapters.quantize_nf4(model, double_quant=run.get("double_quant", True))
            notes.append(f"trained over {base} in NF4: that, dequantised, is what the adapter is merged into")
        model = adapters.load_adapter(model, folder)
    if run.get("task") and registry.recipe(run["task"]).form == "chats":  # as it was trained, whatever the base has
        tokenizer.chat_template, turn = CHAT_TEMPLATE.read_text(encoding="utf-8"), tokenizer.vocab.get(chat.END)
        model.generation_config.eos_token_id = [n for n in (tokenizer.eos_token_id, turn) if n is not None]
    return Opened(model, tokenizer, kind, base, adapted, record, notes)


def export(argv: Sequence[str]) -> int:
    """Write an adapter as PEFT does or, merged or trained whole, a plain model; with its tokenizer and a model card."""
    parser = _parser("export", export.__doc__)
    parser.add_argument("--merge", action="store_true", help="the adapter into its base")
    parser.add_argument("--output", metavar="FOLDER", help="new or empty (default: MODEL-merged or MODEL-exported)")
    asked = parser.parse_args(argv)
    output = asked.output or f"{asked.model.rstrip('/')}-{'merged' if asked.merge else 'exported'}"
    require_place(output := Path(output).expanduser(), "--output", folder=True)
    require(not any(output.glob("*")), "--output", str(output), "not empty")
    found = opened(asked)
    with written(output, folder=True) as folder, quiet():
        apart = found.adapted and not asked.merge and found.model.lorakit_attachment.method not in ("head", "full")
        if apart:
            path = adapters.save_adapter(found.model, folder) / CONFIG_FILE
            config = json.loads(path.read_text("utf-8")) | {
                "base_model_name_or_path": hub_name(found.base) or found.base
            }
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            found.model.config.save_pretrained(folder)  # it names classes
        else:
            adapters.export(found.model, folder) if found.adapted else found.model.save_pretrained(folder)
        found.tokenizer.save_pretrained(folder)
        if found.record:
            records.write(found.record, folder / records.BESIDE)
        text = card(found.record, found.base, found.kind, "peft" if apart else "transformers", found.notes)
        (folder / "README.md").write_text(text, encoding="utf-8")
    what = "an adapter as PEFT reads it" if apart else "a plain model"
    print(f"{output}: {what}, its tokenizer, its card (README.md)", *found.notes, sep="\n")
    return 0


def _answer(command: str, argv: Sequence[str]) -> int:
    kind, word, ask, about = COMMANDS[command]
    parser = _parser(command, about)
    parser.add_argument(f"--{word}", dest="texts", metavar=word.upper(), action="append", default=[], help="repeatable")
    parser.add_argument("--file", help=".csv, .tsv, .jsonl or .parquet, or .txt: documents between blank lines")
    parser.add_argument("--text-column", default="text", help="of FILE (default: text)")
    if kind == "classify":
        parser.add_argument("--pair-column", help="of FILE: a pair's second text")
    else:
        parser.add_argument("--max-new-tokens", type=int, default=128, help="(default: 128)")
    parser.add_argument("--compare", action="store_true", help="also with the adapter off; a trained head stays")
    parser.add_argument("--output", metavar="FILE", help="a new .csv or .jsonl (default: shown here)")
    asked = vars(options := parser.parse_args(argv))
    require(bool(options.texts) != bool(options.file), f"--{word}", options.texts, f"give either --{word} or --file")
    require(all(map(str.strip, options.texts)), f"--{word}", options.texts, "must not be empty")
    most, output = asked.get("max_new_tokens", 1), Path(options.output or "").expanduser()
    require(most > 0, "--max-new-tokens", most, "must be 1 or more")
    if options.output:
        fine = output.suffix in (".csv", ".jsonl") and not output.exists()
        require(fine, "--output", options.output, "must be a new file that ends in .csv or .jsonl")
        require_place(output, "--output")
    columns = {name: asked[name] for name in ("text_column", "pair_column") if asked.get(name)}
    rows = own.texts(Path(options.file).expanduser(), columns) if options.file else [(text,) for text in options.texts]
    found = opened(options, kind)
    with quiet():
        table = DataFrame(rows, columns=[word, "pair"][: len(rows[0])]).join(DataFrame(ask(found, rows, most)))
        if options.compare:
            with adapters.disabled(found.model):
                table = table.join(DataFrame(ask(found, rows, most)), rsuffix="_adapter_off")
    if options.output:
        forms = {
            ".csv": partial(table.to_csv, index=False),
            ".jsonl": partial(table.to_json, orient="records", lines=True),
        }
        with written(output) as path:
            forms[output.suffix](path)
    elif kind == "classify":
        print(table.to_string(index=False, max_colwidth=SHOWN))
    else:
        print("\n\n".join("\n".join(map(": ".join, row.items())) for row in table.to_dict("records")))
    print(*found.notes, sep="\n", end="\n" * bool(found.notes), file=sys.stderr)
    return 0


def _classes(found: Opened, rows: Sequence[tuple[str, ...]], most: int) -> list[dict[str, Any]]:
    model, tokenizer = found.model, found.tokenizer
    if tokenizer.sep_token_id is None:  # as in training: a decoder's template would run a pair's texts together
        rows = [("\n".join(row),) for row in rows]
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", sys.maxsize))
    inputs = [dict(zip(("text", "text_pair"), row, strict=False)) for row in rows]
    pipe = pipeline("text-classification", model=model, tokenizer=tokenizer, truncation=True, max_length=longest)
    return [{"class": answer["label"], "probability": answer["score"]} for answer in pipe(inputs)]


def _texts(found: Opened, rows: Sequence[tuple[str, ...]], most: int) -> list[dict[str, Any]]:
    pipe = pipeline("text-generation", model=found.model, tokenizer=found.tokenizer, return_full_text=False)
    inputs = [[{"role": "user", "content": text}] if found.tokenizer.chat_template else text for (text,) in rows]
    return [{"answer": told["generated_text"]} for [told] in pipe(inputs, max_new_tokens=most, do_sample=False)]


def _parser(command: str, about: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"lorakit {command}", description=about)
    parser.add_argument("model", metavar="MODEL", help="folder of an adapter (a run's, lorakit's, PEFT's), or a model")
    for name, choices in (("base", None), ("kind", [*ASKED])):
        parser.add_argument(f"--{name}", choices=choices, help="of an adapter; else as its record or its config says")
    return parser


COMMANDS = {  # name -> kind of its model, what it is given, who asks it, what that does
    "predict": ("classify", "text", _classes, "Of each text its class and that class's probability, by a classifier."),
    "generate": (
        "causal",
        "prompt",
        _texts,
        "Answer prompts, greedily, in the tokenizer's chat form where it has one.",
    ),
}
predict, generate = (partial(_answer, command) for command in COMMANDS)
