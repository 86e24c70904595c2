"""Records survive writing and reading; a failure leaves the old file; a bad one is named by file and field."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from synthetic_records import record, search

from lorakit import records
from lorakit.errors import DataError
from lorakit.records import Record


def raw(**changes) -> dict:
    return record().model_dump() | changes


def put(folder, values) -> str:
    path = folder / "record.json"
    text = json.dumps(values) if isinstance(values, dict) else values
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


@pytest.mark.parametrize("made", [record(), record("full", 3, message="ünïcode"), search()])
def test_round_trip(tmp_path, made):
    path = records.write(made, tmp_path / "new" / "folder" / "s0.json")
    assert records.read(path) == made
    assert [item.name for item in path.parent.iterdir()] == ["s0.json"]


def test_writing_twice_gives_the_same_bytes(tmp_path):
    first = records.write(record(), tmp_path / "a.json").read_bytes()
    second = records.write(records.read(tmp_path / "a.json"), tmp_path / "b.json").read_bytes()
    assert first == second and first.endswith(b"}\n")


def half(self, text: str, write=Path.write_text, **options):
    """A disk that is full after half of a text."""
    write(self, text[: len(text) // 2], **options)
    raise OSError("no space left")


@pytest.mark.parametrize("failing", [(os, "replace"), (Path, "chmod"), (Path, "write_text")])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_in_the_middle_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing, error):
    path = records.write(record(seed=1), tmp_path / "s.json")
    before = path.read_bytes()

    def stop(*args, **options):
        raise error("no space left")

    for place, put_in, raised in ((failing, stop, error), ((Path, "write_text"), half, OSError)):
        with monkeypatch.context() as patch, pytest.raises(raised, match="no space left"):
            patch.setattr(*place, put_in)
            records.write(record(seed=2), path)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["s.json"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_json_holds_no_nan_and_what_was_nan_is_read_as_nothing(tmp_path, bad):
    made = record()
    made.curve[1].train_loss = bad
    made.curve[1].validation = {"loss": bad, "accuracy": 0.5}
    made.final = {"test": {"loss": bad, "accuracy": 0.5}}
    made.params = {"learning_rate": bad, "search_rates": [0.1, bad]}
    path = records.write(made, tmp_path / "s.json")
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in the file"))
    found = records.read(path)
    assert found.curve[1].train_loss is None
    assert found.curve[1].validation == {"accuracy": 0.5}
    assert found.final == {"test": {"accuracy": 0.5}}
    assert found.params["search_rates"] == [0.1, None]


def test_null_that_was_given_stays(tmp_path):
    made = record(params={"nothing": None})
    assert records.read(records.write(made, tmp_path / "s.json")).params == {"nothing": None}


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_schema_version_is_an_error(tmp_path, version):
    with pytest.raises(DataError, match=rf"record.json: schema_version={version!r}: this lorakit reads 1"):
        records.read(put(tmp_path, raw(schema_version=version)))


@pytest.mark.parametrize(
    ("field", "change"),
    [("status", {"status": "fine"}), ("kind", {"kind": "walk"}), ("seed", {"seed": "first"}),
     ("setting", {"setting": None}), ("surprise", {"surprise": 1}), ("costs.flops", {"costs": {"flops": "many"}}),
     ("curve.0.step", {"curve": [{"tokens": 1}]}), ("final.test.accuracy", {"final": {"test": {"accuracy": "high"}}}),
     ("latency.unmerged_ms", {"latency": {"batch_size": 1, "tokens": 1}}),
     ("search.0.status", {"search": [{"learning_rate": 0.1, "status": "ok"}]}),
     ("costs.seconds", {"costs": {"seconds": -1.0}}), ("costs.tokens", {"costs": {"tokens": -1}}),
     ("costs.predicted_memory.peak", {"costs": {"predicted_memory": {"peak": -1}}}),
     ("latency.unmerged_ms", {"latency": {"batch_size": 1, "tokens": 1, "unmerged_ms": -0.5}}),
     ("details: .*gate", {"details": {"gate": [1]}}), ("details: .*gate.log", {"details": {"gate": {"log": 3}}}),
     ("details: .*gate.log.0", {"details": {"gate": {"log": [None]}}}),
     ("details: .*gate.acceptance_rate", {"details": {"gate": {"acceptance_rate": "much"}}}),
     ("details: .*tokens.gating", {"details": {"tokens": {"gating": "flora"}}}),
     ("details: .*sparsity", {"details": {"sparsity": 0.5}}),
     ("fingerprints: .*data", {"fingerprints": {"data": "f" * 64}}),
     ("environment: .*versions", {"environment": {"versions": ["torch 2"]}}),
     *((f"resolved: .*{name}", {"resolved": {name: " "}}) for name in ("budget", "learning_rate", "redundancy")),
     *((f"resolved: .*{name}", {"resolved": {name: []}}) for name in ("method", "task", "gate", "label", "schedule")),
     ("resolved: .*differs", {"resolved": {"differs": ["rank"]}}),
     ("resolved: .*gating.mode", {"resolved": {"gating": {"method": "flora", "topk_tokens": 0.5}}}),
     ("details: .*gate.target_rate", {"details": {"gate": {"target_rate": "0.3"}}}),
     ("adapter_bytes", {"adapter_bytes": 10**400}), ("costs.tokens", {"costs": {"tokens": 10**400}})],
)  # fmt: skip
def test_a_bad_field_is_named_with_its_file(tmp_path, field, change):
    with pytest.raises(DataError, match=rf"record\.json: field {field}: "):
        records.read(put(tmp_path, raw(**change)))


@pytest.mark.parametrize("missing", ["setting", "method", "seed", "status"])
def test_a_missing_field_is_named(tmp_path, missing):
    with pytest.raises(DataError, match=f"field {missing}: Field required"):
        records.read(put(tmp_path, {name: value for name, value in raw().items() if name != missing}))


@pytest.mark.parametrize("text", ["", "{", '{"schema_version": 1', "[]", "3", "null", b'{"schema_version": "\xff"}'])
def test_a_file_that_is_no_record_is_an_error(tmp_path, text):
    with pytest.raises(DataError, match="record.json: not a record"):
        records.read(put(tmp_path, text))


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(DataError, match="nothing.json: not a record"):
        records.read(tmp_path / "nothing.json")


def test_read_all_finds_records_of_one_kind_in_files_and_folders(tmp_path):
    for seed in (1, 0):
        records.write(record("lora", seed), tmp_path / "deep" / "lora" / f"s{seed}.json")
    records.write(search("lora"), tmp_path / "deep" / "search.json")
    records.write(record("full"), tmp_path / "alone.json")
    (tmp_path / "deep" / "note.txt").write_text("not JSON, not read")
    records.write(record("lora", 1), tmp_path / "deep" / "lora" / ".ipynb_checkpoints" / "s1-checkpoint.json")
    found = records.read_all([tmp_path / "deep", tmp_path / "alone.json"])
    assert [(run.method, run.seed) for run in found] == [("lora", 0), ("lora", 1), ("full", 0)]
    assert [run.kind for run in records.read_all(str(tmp_path), kind="lr_search")] == ["lr_search"]


@pytest.mark.parametrize("marker", records.TRAINED)
def test_a_trainer_s_folder_beside_the_records_is_none(tmp_path, marker):
    records.write(record("lora", 0), tmp_path / "lora" / "s0.json")
    (tmp_path / "lora" / "s0" / "checkpoint-10").mkdir(parents=True)
    for name in (marker, "tokenizer.json"):
        (tmp_path / "lora" / "s0" / "checkpoint-10" / name).write_text("{}")
    assert [run.seed for run in records.read_all(tmp_path)] == [0]
    (tmp_path / "lora" / "s1.json").write_text("{}")  # but half a record is not passed over
    with pytest.raises(DataError, match="s1.json: schema_version=None"):
        records.read_all(tmp_path)
    with pytest.raises(DataError, match=f"{marker}: schema_version=None"):  # nor what was named
        records.read_all(tmp_path / "lora" / "s0" / "checkpoint-10" / marker)


def test_the_defaults_of_a_record_are_not_shared():
    one, two = (Record(setting="s", method="m", seed=0, status="running") for _ in range(2))
    one.curve.append(record().curve[0])
    one.costs.steps = 5
    assert two.curve == [] and two.costs.steps == 0
