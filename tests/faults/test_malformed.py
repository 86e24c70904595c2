"""Params, data and records that are malformed: refused in one clear line, or read as what they say."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from faults import mutations, user_data
from faults.campaign import command, fault_unless, marks, one_error, run

from lorakit import params, records
from lorakit.errors import LorakitError
from lorakit.files import PARAMS, PROJECT
from lorakit.params import Params

pytestmark = marks


def refused(work, *names: str) -> tuple[Any, str]:
    """What `work` gives, or None and the message of the one error it may raise, which has one of `names` in it."""
    try:
        return work(), ""
    except LorakitError as error:
        one_error(str(error))
        fault_unless(not names or any(name in str(error) for name in names), f"names none of {names}", error)
        return None, str(error)


# params ---------------------------------------------------------------------------------------------

VALID = sorted(path for path in PARAMS.glob("*/*.yaml") if "accelerate" not in path.parts)
CHEAP = {
    **{"budget": 2, "budget_unit": "steps", "evaluations": 1, "max_train": 32, "max_validation": 8, "max_test": 8},
    **{
        "latency_repeats": 0,
        "predict_memory": False,
        "exact_match_rows": 0,
        "batch_size": 4,
        "gradient_accumulation": 1,
    },
}
PLACES = ("record", "run_dir", "data_files")
LARGE = 2048


def plainly(text: str) -> Any:
    """What PyYAML makes of a text, keys that stand twice refused."""

    def twice(node: yaml.Node) -> bool:
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            return len(keys) != len(set(keys)) or any(twice(part) for pair in node.value for part in pair)
        return isinstance(node, yaml.SequenceNode) and any(map(twice, node.value))

    node = yaml.compose(text, yaml.SafeLoader)
    fault_unless(node is None or not twice(node), "a key that stands twice was accepted")
    return yaml.safe_load(text) or {}


def alike(given: Any, resolved: Any) -> bool:
    """Is a resolved value the one that was given? 1e-3 is text to PyYAML, a date no text."""
    if isinstance(given, dict) and isinstance(resolved, dict):
        return all(alike(value, resolved.get(name)) for name, value in given.items())
    if isinstance(given, str) and isinstance(resolved, float):
        return (
            re.fullmatch(r"[-+]?[\d_.]+[eE][-+]?\d+", given) is not None and float(given.replace("_", "")) == resolved
        )
    if isinstance(given, list) and isinstance(resolved, list):
        return len(given) == len(resolved) and all(map(alike, given, resolved))
    number = isinstance(resolved, float) and isinstance(given, int) and not isinstance(given, bool)
    return given == resolved and (type(given) is type(resolved) or number)


def params_case(rng: random.Random, folder: Path) -> str:
    values = yaml.safe_load(rng.choice(VALID).read_text()) or {}
    names = sorted(name for name in Params.model_fields if name not in PLACES and name not in values)
    defaults = Params().model_dump()
    values |= {name: defaults[name] for name in rng.sample(names, rng.randint(1, 5))}
    names, kind = sorted(values), rng.choice(["value", "value", "near", "key", "twice", "bytes", "bytes", "override"])
    chosen, words = rng.choice(names), []
    if kind in ("value", "override"):
        values[chosen] = mutations.odd(rng)
    elif kind == "near":
        values, _ = mutations.exchanged(values, rng)
    elif kind == "key":
        values[mutations.misspelt(chosen, rng)] = values.pop(chosen)
    text = yaml.safe_dump(values, allow_unicode=rng.random() < 0.5, default_flow_style=rng.choice([None, True, False]))
    if kind == "twice":
        text = yaml.safe_dump(values, default_flow_style=False) + yaml.safe_dump({chosen: values[chosen]})
    data = text.encode("utf-8", "surrogatepass")
    if kind == "bytes":
        data = rng.choice(mutations.TEXT)(data, rng)
    if kind == "override":
        written = json.dumps(values.pop(chosen), allow_nan=True)
        words = [
            chosen + "=" + rng.choice([written, written[: rng.randint(0, len(written))], written + rng.choice("]}:,'")])
        ]
        data = yaml.safe_dump(values).encode()
    path = folder / "p.yaml"
    path.write_bytes(data)
    given, error = refused(lambda: params.given([str(path)], words))
    resolved, error = (None, error) if given is None else refused(lambda: params.resolve(given))
    if resolved is not None:
        resolved, error = resolved, refused(lambda: params.check(resolved))[1]
    if error:
        fault_unless(
            kind != "key" or re.search("unknown parameter|not YAML|mapping", error), "a key that is misspelt", error
        )
        return f"{kind} refused"
    fault_unless(kind not in ("key", "twice"), f"{kind} was accepted", data)
    dumped = resolved.model_dump()
    said = plainly(data.decode("utf-8-sig")) if kind != "override" else values
    if kind == "override" and chosen == "learning_rate":  # where the file's own rate is from is not said of another
        said.pop("learning_rate_from", None)
    wrong = [name for name, value in said.items() if not alike(value, dumped.get(name, "absent"))]
    fault_unless(not wrong, "another value than the file's", [(n, said[n], dumped.get(n, "absent")) for n in wrong])
    numbers = [v for v in [*dumped.values(), *dumped["gating"].values()] if isinstance(v, (int, float))]
    toy = resolved.model in ("toy-encoder", "toy-decoder") or "/" not in resolved.model and rng.random() < 0.2
    small = all(abs(value) <= LARGE for value, name in zip(dumped.values(), dumped, strict=True)
                if isinstance(value, (int, float)) and name not in CHEAP) and len(numbers) > 0  # fmt: skip
    slow = resolved.model == "gemma-3-270m" and "LORAKIT_DATA" in os.environ  # a minute, where it is not refused
    if not (toy and small and rng.random() < 0.3) or slow:
        return f"{kind} read"
    cheap = [word for name, value in CHEAP.items() for word in ("-p", f"{name}={json.dumps(value)}")]
    cheap += [word for word in ("-p", "gating.sketch_dim=64") if dumped["gating"]["sketch_dim"] > LARGE]
    more = [part for word in words for part in ("-p", word)]
    status, _, err = command("train", "-f", path, *more, *cheap, "-p", f"record={folder / 'record.json'}")
    fault_unless(status in (0, 1, 2), status, err)
    if status == 1:
        record = records.read(folder / "record.json")
        fault_unless(
            record.status in ("diverged", "out_of_memory") and record.message, "the run failed", record.message
        )
    return f"{kind} run"


# data -----------------------------------------------------------------------------------------------


def data_case(rng: random.Random, folder: Path) -> str:
    from lorakit import tasks
    from lorakit.tasks import registry

    task, files = rng.choice(sorted(user_data.formats(rng).items()))
    parquet = task == "tulu" and rng.random() < 0.5
    chosen = rng.choice(sorted(files))
    for name, (text, _) in files.items():
        (folder / name).write_bytes(text.encode())
    path, how = (
        folder / chosen,
        rng.choice([*mutations.TEXT, mutations.lines, mutations.lines, mutations.lines, "swap"]),
    )
    if parquet:
        path = user_data.parquet_of(rng, folder, chosen)
        how = rng.choice(mutations.BYTES)
    before = path.read_bytes()
    data = (
        rng.choice([t for f in user_data.formats(rng).values() for t, _ in f.values()]).encode()
        if how == "swap"
        else how(before, rng)
    )
    path.write_bytes(data)
    made, error = refused(lambda: registry.read(task, str(folder)), path.name, "too few", "different rows")
    if error:
        return f"{task} refused"
    corpus = made[0]
    fault_unless(b"\0" not in data or parquet or data == before, "a file with NUL was accepted", data[:200])
    found = [row for split in (corpus.train, corpus.validation, corpus.test) for row in split]
    if not parquet and task != "wikitext2":
        known: set = set()
        for name, (_, reader) in files.items():
            known |= reader((folder / name).read_bytes().decode("utf-8-sig"))
        rows = [user_data.plain(row) for row in found]
        invented = [row for row in rows if row not in known]
        fault_unless(not invented, "rows that are not the file's", invented[:2])
    decoder = task in ("instruct", "tulu")
    loaded, error = refused(
        lambda: tasks.load(task, TOKENIZERS[decoder], data_files=str(folder), max_length=32), task, path.name
    )
    return f"{task} {'refused' if error else 'read'}"


TOKENIZERS: dict[bool, Any] = {}

# records --------------------------------------------------------------------------------------------

RECORDS = sorted(PROJECT.glob("results/*/*/s*.json"))


def records_case(rng: random.Random, folder: Path) -> str:
    setting = rng.choice(sorted({path.parents[1] for path in RECORDS}))
    of_setting = [path for path in RECORDS if path.parents[1] == setting]
    chosen = rng.sample(of_setting, min(len(of_setting), rng.randint(1, 4)))
    for number, path in enumerate(chosen):
        data = path.read_bytes()
        if number == 0 and rng.random() < 0.6:
            value, _ = mutations.exchanged(json.loads(data), rng)
            data = json.dumps(value).encode("utf-8", "surrogatepass")
        elif number == 0:
            data = rng.choice(mutations.TEXT)(data, rng)
        (folder / f"{number}.json").write_bytes(data)
    name, output = rng.choice(["table", "report"]), folder / "out.md"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    figure = ["--figures" if name == "report" else "--figure", folder / "figure.png"] if rng.random() < 0.05 else []
    status, out, err = command(name, folder, "--output", output, *figure)
    fault_unless(
        status in (0, 2) and output.exists() == (status == 0) and bool(out.strip()) == (status == 0), name, err
    )
    fault_unless({path.name: path.read_bytes() for path in folder.glob("*.json")} == before, "the records changed")
    return f"{name} {'refused' if status else 'written'}"


@pytest.mark.parametrize(
    ("name", "case", "seconds"),
    [("params", params_case, 60), ("data", data_case, 30), ("records", records_case, 60)],
)
def test_what_is_malformed_is_refused_in_one_line_or_read_as_what_it_says(
    tmp_path, encoder, decoder, name, case, seconds
):
    os.environ["LORAKIT_PROGRESS"] = "none"
    TOKENIZERS.update({False: encoder, True: decoder})
    run(name, case, tmp_path, seconds)
