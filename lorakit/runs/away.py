"""What was trained, taken away: exported with its card, asked for classes or for text, the base's answer beside it."""

import argparse
import json
import os
import sys
from collections import namedtuple
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from pandas import DataFrame
from scipy.stats import binomtest
from transformers import pipeline

from lorakit import adapters, models, records, tasks
from lorakit.adapters import peft_format, saving, storage
from lorakit.assets import ASSETS
from lorakit.errors import require
from lorakit.files import CONFIGS, require_empty, require_place, written
from lorakit.head import NAMED
from lorakit.params.overview import ALWAYS, KNOBS
from lorakit.quiet import quiet
from lorakit.tasks import chat, own, registry, toy

OURS = dict.fromkeys((*toy.models.NAMES, toy.grammar.TOY), "MIT: lorakit's own")
# kind -> who asks it; what transformers and the hub call that
ASKED = {"classify": "`lorakit predict` asks it", "causal": "`lorakit generate` asks it", "masked": "nobody asks it"}
TAGS = {"classify": "text-classification", "causal": "text-generation", "masked": "fill-mask"}
Opened = namedtuple("Opened", "model tokenizer kind base source adapted record notes")


def opened(place: str | Path, wanted: str = "", base: str | None = None, kind: str | None = None) -> Opened:
    """The whole model of that name or folder, or the adapter there on its base, kept as in training.

    Args:
        wanted: the kind it must be; empty: any.
        base, kind: of an adapter beside which no record and no config says them.

    Returns:
        Beside model, tokenizer and kind: the base's name and where it is from ("" where nothing says it), whether there
        is an adapter, the run's record (or None), and notes that a reader needs.

    Raises:
        LorakitError: there is none, it is of another kind, or nothing says its base or its kind.
    """
    folder, notes = Path(place).expanduser(), []
    adapted = any((folder / name).is_file() for name in (peft_format.CONFIG_FILE, saving.OWN_CONFIG_FILE))
    record = next(map(records.read, folder.glob(records.BESIDE)), None)
    run, prints, made = (record.resolved, record.fingerprints, record.details) if record else ({}, {}, {})
    said_base, said_kind, labels = storage.described(folder) if adapted else ("", "", None)
    base = base or run.get("model") or said_base
    if adapted:
        require(bool(base), "--base", base, f"{place} does not say it: give --base")
        kind = kind or said_kind or ("task" in run and tasks.kind(run["task"], models.family(base)))
        require(bool(kind), "--kind", kind, f"{place} does not say it: give --kind")
    else:
        said = models.config(str(place))
        heads, made = str(said.architectures), {"classes": [name for _, name in sorted(said.id2label.items())]}
        found = next((kind for part, kind in NAMED.items() if part in heads), "")
        told = f"is no adapter, and of kind {found or 'none'}: {heads}"
        require(found != "" and kind in (None, found), "MODEL", str(place), told)
        kind = found
    require(wanted in ("", kind), "MODEL", str(place), f"is of kind {kind!r}: {ASKED[kind]}")
    options = {"num_labels": labels or 2, "classes": made.get("classes", []) if kind == "classify" else []}
    loaded = models.load(base if adapted else str(place), kind, dtype=run.get("dtype", "auto"), **options)
    if adapted and prints.get("model", loaded.fingerprint) != loaded.fingerprint:
        notes.append(f"{base} is not the very model that the adapter was trained over: another fingerprint")
    if adapted and not record:
        notes.append("nothing says how the base was kept in training; here it is as it is, not in NF4")
    if adapted and run.get("quantize") == "nf4":
        adapters.quantize_nf4(loaded.model, double_quant=run.get("double_quant", True))
        notes.append(f"trained over {base} in NF4: that, dequantised, is what the adapter is merged into")
    model = adapters.load_adapter(loaded.model, folder) if adapted else loaded.model
    if "task" in run and registry.recipe(run["task"]).form == "chats":  # as it was trained, whatever the base has
        loaded.tokenizer.chat_template = toy.tokenizer.CHAT_TEMPLATE.read_text(encoding="utf-8")
        ends = loaded.tokenizer.eos_token_id, loaded.tokenizer.vocab.get(chat.END)
        model.generation_config.eos_token_id = [end for end in ends if end is not None]
    source = loaded.source if adapted else prints.get("model_source", "")
    return Opened(model, loaded.tokenizer, kind, base, source, adapted, record, notes)


def export(argv: Sequence[str]) -> int:
    """Write an adapter as PEFT does or, merged or trained whole, a plain model; with its tokenizer and a model card."""
    parser = _parser("export")
    parser.add_argument("--merge", action="store_true", help="the adapter into its base")
    parser.add_argument("--output", metavar="FOLDER", help="new or empty (default: MODEL-merged or MODEL-exported)")
    asked = parser.parse_args(argv)
    there = Path(asked.model)  # ".", "..": what that folder is called
    there = there if there.name.strip(".") else os.path.abspath(there)
    output = asked.output or f"{there}-{'merged' if asked.merge else 'exported'}"
    require_empty(output := Path(output).expanduser(), "--output")
    found = opened(asked.model, base=asked.base, kind=asked.kind)
    apart = found.adapted and not asked.merge and found.model.lorakit_attachment.method not in ("head", "full")
    with written(output, folder=True) as folder, quiet():
        if apart:
            path = adapters.save_adapter(found.model, folder) / peft_format.CONFIG_FILE
            named = {"base_model_name_or_path": getattr(ASSETS.get(found.base), "hub", "") or found.base}
            path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | named, indent=2) + "\n", "utf-8")
        else:
            adapters.export(found.model, folder) if found.adapted else found.model.save_pretrained(folder)
        found.tokenizer.save_pretrained(folder)
        if found.record:
            records.write(found.record, folder / records.BESIDE)
        (folder / "README.md").write_text(card(found, "peft" if apart else "transformers"), "utf-8")
    print(f"{output}: {'an adapter' if apart else 'a plain model'}, its tokenizer and its card", *found.notes, sep="\n")
    return 0


def card(found: Opened, library: str) -> str:
    """A model card in Markdown, with the hub's front matter: what the record says, and what nobody said by name.

    Args:
        library: "peft" of an adapter, "transformers" of a whole model.
    """
    record, base, asset = found.record, found.base, ASSETS.get(found.base)
    run, prints = (record.resolved, record.fingerprints) if record else ({}, {})
    source = str(prints.get("data_source", ""))  # "hub owner/name", with more after a comma; "asset name"; words
    place, _, data = source.split(",")[0].partition(" ")
    told = {"library_name": library, "pipeline_tag": TAGS[found.kind], "tags": ["lorakit", run.get("method", library)]}
    told |= {"license": asset.licence if asset else "mit" if base in OURS else None}
    known = asset.hub or asset.made_from if asset else base if found.source.startswith("hub") else None
    given = {"record": record, "prints": prints, "base": base, "source": found.source, "interval": _interval}
    given |= {"data": data if place == "asset" else source, "terms": OURS | {n: a.terms for n, a in ASSETS.items()}}
    given["shown"] = (*ALWAYS[1:], *KNOBS.get(run.get("method", ""), ()), "quantize", "skip", "gate", "seed")
    given["notes"] = dict.fromkeys([*(record.notes if record else ()), *found.notes])
    front = ModelCardData(**told, base_model=known or None, datasets=[data] if place == "hub" else None)
    return str(ModelCard.from_template(front, template_path=str(CONFIGS / "model_card.md.jinja"), **given))


def _interval(score: str, value: float, rows: int | None) -> str:
    """Wilson's, of a share of rows that are right or wrong each."""
    share = score == "accuracy" and rows and binomtest(round(value * rows), rows).proportion_ci(method="wilson")
    return f"[{share.low:.4f}, {share.high:.4f}]" if share else "none"


def predict(argv: Sequence[str]) -> int:
    """Say of each text its class and that class's probability, by a classifier or its adapter."""
    return _answer("predict", argv, "text", "--pair-column", help="of FILE: a pair's second text")


def generate(argv: Sequence[str]) -> int:
    """Answer each prompt, greedily, in the tokenizer's chat form where it has one, by a causal model or its adapter."""
    return _answer("generate", argv, "prompt", "--max-new-tokens", type=int, default=128, help="(default: 128)")


def _answer(command: str, argv: Sequence[str], word: str, option: str, **more: object) -> int:
    parser = _parser(command)
    parser.add_argument(f"--{word}", dest="texts", metavar="TEXT", action="append", default=[], help="repeatable")
    parser.add_argument("--file", help=".csv, .tsv, .jsonl or .parquet, or .txt: documents between blank lines")
    parser.add_argument("--text-column", help="of FILE (default: text)")
    parser.add_argument(option, **more)
    parser.add_argument("--compare", action="store_true", help="also with the adapter off; a trained head stays")
    parser.add_argument("--output", metavar="FILE", help="a new .csv or .jsonl (default: shown here)")
    asked = parser.parse_args(argv)
    require(bool(asked.texts) != bool(asked.file), f"--{word}", asked.texts, f"give either --{word} or --file")
    require(all(map(str.strip, asked.texts)), f"--{word}", asked.texts, "must not be empty")
    most, output = vars(asked).get("max_new_tokens", 1), Path(asked.output or "").expanduser()
    require(most > 0, "--max-new-tokens", most, "must be 1 or more")
    fine = not asked.output or output.suffix in (".csv", ".jsonl") and not output.exists()
    require(fine, "--output", asked.output, "must be a new file that ends in .csv or .jsonl")
    if asked.output:
        require_place(output, "--output")
    columns = {name: column for name, column in vars(asked).items() if name.endswith("_column") and column}
    for name, column in columns.items():
        require(bool(asked.file), f"--{name.replace('_', '-')}", column, f"is of --file, not of --{word}")
    columns = {"text_column": "text"} | columns
    rows = own.texts(Path(asked.file).expanduser(), columns) if asked.file else [(text,) for text in asked.texts]
    require(bool(rows), "--file", asked.file, "has no rows")
    found = opened(asked.model, "classify" if command == "predict" else "causal", asked.base, asked.kind)
    with quiet():
        off = []
        if asked.compare:  # first: where there is no adapter nothing is to be asked in vain
            with adapters.disabled(found.model):
                off = [ask(found, rows, most).add_suffix("_adapter_off")]
        table = DataFrame(rows, columns=[word, "pair"][: len(rows[0])]).join([ask(found, rows, most), *off])
    if asked.output:
        with written(output) as path:
            text = table.to_csv(index=False) if output.suffix == ".csv" else table.to_json(orient="records", lines=True)
            path.write_text(text, "utf-8")
    elif command == "predict":
        print(table.to_string(index=False, max_colwidth=60))
    else:
        print("\n\n".join("\n".join(map(": ".join, row.items())) for row in table.to_dict("records")))
    print(*found.notes, sep="\n", end="\n" * bool(found.notes), file=sys.stderr)
    return 0


def ask(found: Opened, rows: Sequence[tuple[str, ...]], most: int = 128) -> DataFrame:
    """Of a classifier or a causal model, one answer a row: class and probability, or a text of at most `most` tokens.

    Args:
        rows: a text each, or the two of a pair.
    """
    model, tokenizer = found.model, found.tokenizer
    pipe = pipeline(TAGS[found.kind], model=model, tokenizer=tokenizer)
    if found.kind == "causal":
        inputs = [[{"role": "user", "content": text}] if tokenizer.chat_template else text for (text,) in rows]
        form = {"add_generation_prompt": True, "return_dict": True}
        asked = tokenizer.apply_chat_template(inputs, **form) if tokenizer.chat_template else tokenizer(inputs)
        longest, room = max(map(len, asked["input_ids"])), models.positions(model)
        told = f"with a prompt of {longest} tokens these are more than the model's {room} positions"
        require(longest + most <= room + 1, "--max-new-tokens", most, told)  # the last is not read again
        said = pipe(inputs, max_new_tokens=most, do_sample=False, return_full_text=False)
        return DataFrame({"answer": [told["generated_text"].split(chat.END)[0] for [told] in said]})
    if tokenizer.sep_token_id is None:  # as in training: a decoder's template would run a pair's texts together
        rows = [("\n".join(row),) for row in rows]
    said = getattr(model.config, "max_position_embeddings", sys.maxsize)
    longest = min(tokenizer.model_max_length, said, models.positions(model))
    inputs = [dict(zip(("text", "text_pair"), row, strict=False)) for row in rows]
    return DataFrame(pipe(inputs, truncation=True, max_length=longest)).set_axis(["class", "probability"], axis=1)


def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"lorakit {command}", description=globals()[command].__doc__)
    parser.add_argument("model", metavar="MODEL", help="folder of an adapter (a run's, lorakit's, PEFT's), or a model")
    for name, choices in (("base", None), ("kind", [*ASKED])):
        parser.add_argument(f"--{name}", choices=choices, help="of an adapter; else as its record or its config says")
    return parser
