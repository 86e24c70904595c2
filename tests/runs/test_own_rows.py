"""Settings whose data the reader brings, end to end: the hub's models from a stand-in, tables in the hub's layouts."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import hub_stand_in
import pytest
import transformers
from hub_stand_in import sentence

from lorakit import cli, params, records, tasks
from lorakit.files import PARAMS
from lorakit.settings import OWN, DataSettings

SETTINGS = {path.parent.name: params.files.read(path) for path in sorted(PARAMS.glob("*/_setting.yaml"))}
SETTINGS = {name: said for name, said in SETTINGS.items() if said.get("task") in OWN}
ROWS = [(setting, row) for setting in SETTINGS for row in params.files.rows_of(PARAMS / setting)]
# six steps of an epoch of 48 rows, two batches a step where the setting accumulates
CUT = {"budget": 0.5, "evaluations": 1, "max_train": 48, "max_validation": 8, "max_test": 8, "max_length": 64}
CUT |= {"batch_size": 4, "eval_batch_size": 8, "latency_repeats": 1, "predict_memory": False, "skip_warmup": 0.3}


def llama(folder: Path) -> None:
    """Without a padding token, as Llama 3.2's."""
    size = hub_stand_in.gemma_tokenizer(folder)
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "add_bos_token": True}
    hub_stand_in.describe_tokenizer(folder, **names, tokenizer_class="PreTrainedTokenizerFast")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(**sizes, intermediate_size=128, vocab_size=size, tie_word_embeddings=True)
    hub_stand_in.save(transformers.LlamaForCausalLM(config), folder)


def alpaca(rng: random.Random, n: int) -> dict:
    return {"instruction": sentence(rng, 6), "input": sentence(rng, 4) if n % 3 else "", "output": sentence(rng, 8)}


def cola(rng: random.Random, n: int) -> dict:
    return {"sentence": sentence(rng, 8, n % 2), "label": n % 2, "idx": n}


def qnli(rng: random.Random, n: int) -> dict:
    first = sentence(rng, 6)
    second = f"{first} {sentence(rng, 3)}" if n % 2 else sentence(rng, 9)
    return {"question": f"{first} ?", "sentence": second, "label": n % 2, "idx": n}


MADE = {"alpaca-llama": (alpaca, "alpaca.jsonl"), "glue-cola": (cola, "cola/[tv][ra]*")}
MADE["glue-qnli"] = (qnli, "qnli/[tv][ra]*")
KINDS = {"alpaca-llama": "causal", "glue-cola": "classify", "glue-qnli": "classify"}


def data(setting: str, folder: Path) -> str:
    """The files, and what `data_files` is then: of GLUE in three splits, the test split without labels."""
    make, place = MADE[setting]
    rng = random.Random(setting)
    if setting == "alpaca-llama":
        (folder / place).write_text("".join(json.dumps(make(rng, n)) + "\n" for n in range(80)))
        return str(folder / place)
    (folder / place).parent.mkdir()
    for split, size in (("train", 60), ("validation", 20), ("test", 8)):
        rows = [make(rng, n) | ({"label": -1} if split == "test" else {}) for n in range(size)]
        name = f"{split}-00000-of-00001.parquet"
        hub_stand_in.parquet.write_table(hub_stand_in.pyarrow.Table.from_pylist(rows), (folder / place).parent / name)
    return str(folder / place)


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home") / "hub"
    hub_stand_in.keep(folder, "model", "distilbert-base-uncased", hub_stand_in.distilbert)
    hub_stand_in.keep(folder, "model", "meta-llama/Llama-3.2-1B", llama)
    return folder


def test_the_settings_are_these():
    assert {*SETTINGS} == {*MADE} and len(ROWS) >= 5


def test_alpaca_s_rows_are_chats(tmp_path):
    found, _ = tasks.read("chat", data("alpaca-llama", tmp_path), DataSettings(task="chat"))
    rng = random.Random("alpaca-llama")
    rows = [alpaca(rng, n) for n in range(80)]
    asked = {"\n\n".join(filter(None, (row["instruction"], row["input"]))): row["output"] for row in rows}
    chats = [*found.train, *found.validation, *found.test]
    assert {chat[0]["content"]: chat[1]["content"] for chat in chats} == asked and len(chats) == 80
    assert {tuple(turn["role"] for turn in chat) for chat in chats} == {("user", "assistant")}


@pytest.mark.parametrize(("setting", "row"), ROWS, ids=["/".join(row) for row in ROWS])
def test_a_row_runs_to_its_record(hub, tmp_path, monkeypatch, capsys, setting, row):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = params.resolve({"setting": setting, "row": row})
    cut = CUT | ({"gradient_accumulation": 2} if asked.gradient_accumulation > 1 else {})
    cut = {name: value for name, value in cut.items() if name != "skip_warmup" or asked.skip != "none"}
    given = cut | {"data_files": data(setting, tmp_path), "record": str(tmp_path / "s0.json")}
    options = [part for name, value in given.items() for part in ("-p", f"{name}={json.dumps(value)}")]
    assert cli.main(["train", "-f", str(PARAMS / setting / f"{row}.yaml"), *options]) == 0, capsys.readouterr()
    record = records.read(tmp_path / "s0.json")
    steps = 3 if "gradient_accumulation" in cut else 6
    assert (record.status, record.setting, record.costs.accepted_steps) == ("done", setting, steps)
    kept = ("model", "task", "quantize", "skip", "budget_unit", "optimizer", "precision", "learning_rate")
    assert {name: record.resolved[name] for name in kept} == {name: getattr(asked, name) for name in kept}
    assert all(math.isfinite(value) for metrics in record.final.values() for value in metrics.values())
    assert ("accuracy" in record.final["test"]) == (KINDS[setting] == "classify")
    assert "learning rate not searched" in record.notes and record.fingerprints["data_source"] == "own data"
    assert f"budget: 0.5 epochs of 48 rows are {steps} accepted steps" in record.notes
    named = "train-00000-of-00001.parquet; validation: validation-00000-of-00001.parquet"
    assert f"train: {'alpaca.jsonl' if setting == 'alpaca-llama' else named}" in record.notes
    assert (asked.skip != "none") == bool(record.details.get("skip", {}).get("share_skipped"))
