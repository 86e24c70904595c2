"""run(params) -> Record on the toy world: every status, what is written, what resumes, and what is refused."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time

import pytest
import torch
from safetensors.torch import load_file

import lorakit
from lorakit import models, records
from lorakit.errors import CheckpointError, DataError, LorakitError, ParameterError
from lorakit.runs import experiment
from lorakit.runs import search as lr_search
from lorakit.training import BudgetTrainer

QUICK = {
    **{"budget": 6, "evaluations": 2, "batch_size": 8, "max_train": 64, "max_validation": 32, "max_test": 32},
    **{"latency_repeats": 0, "predict_memory": False, "rank": 2},
}


def test_a_run_tells_what_it_did(tmp_path):
    path = tmp_path / "s0.json"
    record = lorakit.run(QUICK | {"record": str(path), "latency_repeats": 2, "predict_memory": True})
    assert records.read(path) == record
    assert (record.status, record.costs.accepted_steps, record.curve[-1].step) == ("done", 6, 6)
    assert set(record.final) == {"validation", "test"} and set(record.final["test"]) >= {"loss", "accuracy"}
    assert record.final["validation"] == record.curve[-1].validation
    assert record.costs.flops == pytest.approx(record.costs.flops_forward + record.costs.flops_backward)
    assert record.costs.predicted_memory["peak"] > record.costs.predicted_memory["parameters"] > 0
    assert record.parameters.trainable < record.parameters.total
    assert record.latency.merged_ms > 0
    assert record.params == QUICK | {"latency_repeats": 2, "predict_memory": True}
    assert record.resolved["learning_rate"] == lorakit.Params().learning_rate
    assert set(record.fingerprints) >= {"data", "model", "code"} and record.environment["versions"]["torch"]


def test_a_tilde_is_the_user_s_folder_everywhere(tmp_path, monkeypatch):
    """Record, checkpoints and adapter in one place, and the second half finds the first."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    given = QUICK | {"record": "~/r/s0.json", "run_dir": "~/run", "save_steps": 2}
    lorakit.run(given)
    again = lorakit.run(given)
    assert any(note.startswith("resumed at step 6") for note in again.notes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == ["r", "run"]
    assert (tmp_path / "home" / "run" / "adapter").is_dir() and records.read(tmp_path / "home" / "r" / "s0.json")


def test_same_seed_same_run_other_seed_other_run():
    losses = [[p.train_loss for p in lorakit.run(QUICK | {"seed": seed}).curve] for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("method", ["head", "full"])
def test_baselines_run_the_same_way(method):
    record = lorakit.run(QUICK | {"method": method})
    assert record.status == "done"
    assert (record.parameters.trainable == record.parameters.total) == (method == "full")


@pytest.mark.parametrize(("model", "task"), [("toy-encoder", "toy-stories"), ("toy-decoder", "toy-instruct")])
def test_language_models_run_the_same_way(monkeypatch, capsys, model, task):
    monkeypatch.setenv("LORAKIT_PROGRESS", "plain")
    rows = 2 * (task == "toy-instruct")
    given = {"model": model, "task": task, "batch_size": 4, "max_length": 160, "eval_batch_size": 8}
    record = lorakit.run(QUICK | given | {"exact_match_rows": rows})
    assert record.status == "done" and record.final["test"]["loss"] > 0
    assert not rows or 0 <= record.final["test"]["exact_match"] <= 1  # chat answers are generated and compared
    assert ("  generating answers\n" in capsys.readouterr().out) == (rows > 0)


def test_run_dir_keeps_an_adapter_that_gives_the_same_logits(tmp_path):
    from lorakit import adapters, models

    lorakit.run(QUICK | {"run_dir": str(tmp_path)})
    saved = load_file(str(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert any("lora_B" in name and tensor.abs().sum() > 0 for name, tensor in saved.items())
    model = models.load("toy-encoder", "classify").model
    adapters.load_adapter(model, tmp_path / "adapter")
    assert any(torch.equal(tensor, parameter) for tensor in saved.values() for parameter in model.parameters())


@pytest.mark.parametrize("method", ["head", "full", "lora"])
@pytest.mark.parametrize(
    ("model", "task", "auto"),
    [
        ("toy-encoder", "toy-reviews", "AutoModelForSequenceClassification"),
        ("toy-encoder", "toy-stories", "AutoModelForMaskedLM"),
        ("toy-decoder", "toy-stories", "AutoModelForCausalLM"),
    ],
)
def test_from_pretrained_opens_what_was_kept(tmp_path, monkeypatch, method, model, task, auto):
    import transformers

    trained, build = [], experiment.build_trainer
    monkeypatch.setattr(experiment, "build_trainer", lambda *given: trained.append(given[0]) or build(*given))
    given = {"method": method, "model": model, "task": task, "max_length": 64, "run_dir": str(tmp_path)}
    assert lorakit.run(QUICK | given).status == "done"
    whole = tmp_path / ("model" if method in ("head", "full") else "adapter")
    ours, words = trained[0].tokenizer, "A film to see again."
    assert transformers.AutoTokenizer.from_pretrained(whole)(words)["input_ids"] == ours(words)["input_ids"]
    assert (tmp_path / "model").exists() == (whole.name == "model")
    if whole.name == "model":
        opened, inputs = getattr(transformers, auto).from_pretrained(whole).eval(), ours(words, return_tensors="pt")
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        torch.testing.assert_close(opened(**inputs).logits, trained[0].model.eval()(**inputs).logits)


TOKENS = {"model": "toy-decoder", "task": "toy-stories", "max_length": 64}
FLORA = {"method": "flora", "topk_tokens": 0.5}


@pytest.mark.parametrize(
    "given",
    [
        {"method": "full"},
        TOKENS,
        TOKENS | {"gating": FLORA},
        TOKENS | {"gating": FLORA | {"mode": "fractional"}},
        TOKENS | {"gating": FLORA, "gate": "novelty"},
        TOKENS | {"gating": {"method": "random", "topk_tokens": 0.5}},
        TOKENS | {"model": "toy-encoder", "gating": FLORA},
        TOKENS | {"gate": "novelty"},
    ],
    ids=str,
)
def test_diverged_run_is_recorded_and_keeps_its_files(tmp_path, given):
    hot = {"learning_rate": 1.0e30, "max_grad_norm": 1.0e30, "record": str(tmp_path / "r.json"), "budget": 30}
    record = lorakit.run(QUICK | hot | given)
    assert records.read(tmp_path / "r.json").status == record.status == "diverged"
    assert re.search(r"loss.* at step \d+$", record.message) and record.final == {} and record.costs.steps > 0


CPU = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"


@pytest.mark.parametrize("where", ["training_step", "evaluate", "__init__"])
@pytest.mark.parametrize(
    ("error", "status", "raised"),
    [
        (torch.OutOfMemoryError("tried to allocate 12 GiB"), "out_of_memory", False),
        (MemoryError("std::bad_alloc"), "out_of_memory", False),
        (RuntimeError(CPU), "out_of_memory", False),
        (RuntimeError("could not create a primitive"), "out_of_memory", False),
        (RuntimeError("could not create a memory object"), "out_of_memory", False),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out_of_memory", False),
        (RuntimeError("could not create a primitive descriptor for the eltwise"), "failed", True),
        (OSError(errno.ENOSPC, "No space left on device"), "failed", False),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "failed", False),
        (RuntimeError("a bug"), "failed", True),
        (RuntimeError("cannot read igloo/file of gloo"), "failed", True),  # one process has lost nobody
        (KeyboardInterrupt(), "interrupted", True),
    ],
)
def test_what_ended_a_run_is_recorded(tmp_path, monkeypatch, where, error, status, raised):
    def end(*_, **__):
        raise error

    monkeypatch.setattr(BudgetTrainer, where, end)
    monkeypatch.setattr(experiment.memory, "cuda_peak_bytes", lambda: 11 * 2**30)
    with pytest.raises(type(error)) if raised else contextlib.nullcontext():
        lorakit.run(QUICK | {"record": str(tmp_path / "r.json"), "run_dir": str(tmp_path / "run"), "save_steps": 1})
    record = records.read(tmp_path / "r.json")
    assert record.status == status and (str(error) or "stopped at step") in record.message
    assert where == "__init__" or record.costs.peak_memory_bytes == 11 * 2**30
    assert {path.name for path in tmp_path.iterdir()} == {"r.json", "run"}


@pytest.mark.parametrize("name", ["save", "replace"])
def test_a_full_disk_while_saving_leaves_the_record_and_no_half_checkpoint(tmp_path, monkeypatch, name):
    real = {"save": torch.save, "replace": os.replace}[name]

    def full(*given, **options):
        if "checkpoint" in str(given[1]):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*given, **options)

    monkeypatch.setattr(torch if name == "save" else os, name, full)
    run_dir = tmp_path / "run"
    record = lorakit.run(QUICK | {"record": str(tmp_path / "r.json"), "run_dir": str(run_dir), "save_steps": 3})
    assert record == records.read(tmp_path / "r.json") and record.costs.steps == 3
    assert (record.status, record.message) == ("failed", "OSError: [Errno 28] No space left on device")
    assert [path.name for path in run_dir.iterdir()] == [".lock"]


def test_a_record_that_cannot_be_written_is_kept_elsewhere_and_that_is_said(tmp_path, monkeypatch):
    wanted, write = tmp_path / "r.json", records.write

    def full(record, path):
        if path == wanted:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(record, path)

    monkeypatch.setattr(records, "write", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(
        DataError, match="r.json': cannot be written: .*No space left on device; it is in .*r.json"
    ) as told:
        lorakit.run(QUICK | {"record": str(wanted)})
    assert records.read(str(told.value).rpartition(" ")[2]).status == "done" and not wanted.exists()


def test_a_search_that_is_stopped_keeps_what_it_tried(tmp_path, monkeypatch):
    given = QUICK | {"search_rates": [1.0e-3, 1.0e-4], "search_budget": 3, "record": str(tmp_path / "lr.json")}
    step, seen = BudgetTrainer.training_step, []

    def stopping(self, *given):
        seen.append(self.args.learning_rate)
        if seen[-1] == 1.0e-4:
            raise KeyboardInterrupt
        return step(self, *given)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(BudgetTrainer, "training_step", stopping)
        lorakit.search(given)
    stopped = records.read(tmp_path / "lr.json")
    assert (stopped.status, len(stopped.search)) == ("interrupted", 1)
    assert lorakit.search(given).search[0] == stopped.search[0]


def test_a_search_says_which_rate_it_tries(monkeypatch):
    seen, train = [], BudgetTrainer.train

    def told(self, **how):
        seen.append(self.progress.title)
        return train(self, **how)

    monkeypatch.setattr(BudgetTrainer, "train", told)
    lorakit.search(QUICK | {"search_rates": [1.0e-3, 4.0e-2], "search_budget": 1})
    lorakit.run(QUICK | {"budget": 1})
    assert seen == ["toy/lora s0 at 0.001", "toy/lora s0 at 0.04", "toy/lora s0"]


def test_ctrl_c_is_recorded_and_passed_on(tmp_path, monkeypatch):
    step = BudgetTrainer.training_step

    def stopping(self, *arguments):
        if self.ledger.steps == 3:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(BudgetTrainer, "training_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        lorakit.run(QUICK | {"record": str(tmp_path / "r.json")})
    record = records.read(tmp_path / "r.json")
    assert (record.status, record.message, len(record.curve)) == ("interrupted", "stopped at step 3", 3)


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_resumes_bitwise(tmp_path, stop):
    given = QUICK | {"budget": 40, "save_steps": 3, "evaluations": 4, "max_train": 120, "seed": 5}
    whole = lorakit.run(given | {"run_dir": str(tmp_path / "whole")})

    command = [sys.executable, "-m", "lorakit", "train"]
    for name, value in (given | {"record": f"{tmp_path}/r.json", "run_dir": f"{tmp_path}/cut"}).items():
        command += ["-p", f"{name}={json.dumps(value)}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": os.environ | {"CI": "1"}}
    process = subprocess.Popen(command, **quiet)
    while not list(tmp_path.glob("cut/checkpoint-*/run.json")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(stop)
    process.wait()
    assert not (tmp_path / "cut" / "adapter").exists()  # it was stopped on the way
    if stop == signal.SIGTERM:
        assert records.read(tmp_path / "r.json").status == "interrupted"

    resumed = lorakit.run(given | {"run_dir": str(tmp_path / "cut")})
    assert any(note.startswith("resumed at step") for note in resumed.notes)
    stored = [load_file(str(tmp_path / name / "adapter" / "adapter_model.safetensors")) for name in ("whole", "cut")]
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(stored[0][name], stored[1][name]) for name in stored[0])
    points = [[point.model_dump(exclude={"seconds"}) for point in record.curve] for record in (whole, resumed)]
    assert points[0] == points[1] and whole.final == resumed.final


def test_checkpoint_of_another_run_is_refused(tmp_path):
    lorakit.run(QUICK | {"run_dir": str(tmp_path), "save_steps": 2})
    with pytest.raises(CheckpointError, match="another run: learning_rate=0.004 there, 0.008 here"):
        lorakit.run(QUICK | {"run_dir": str(tmp_path), "save_steps": 2, "learning_rate": 0.008})


def test_the_test_split_is_read_once_at_the_end(monkeypatch):
    read = []
    evaluate = BudgetTrainer.evaluate

    def spy(self, dataset=None, **options):
        read.append((self.ledger.steps, dataset is None or dataset is self.eval_dataset))
        return evaluate(self, dataset, **options)

    monkeypatch.setattr(BudgetTrainer, "evaluate", spy)
    lorakit.run(QUICK | {"select": "best"})
    assert read == [(3, True), (6, True), (6, False)]


def test_search_compares_on_validation_only(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "_evaluate", lambda *_: pytest.fail("the search read the test split"))
    given = QUICK | {"search_rates": [1.0e-4, 1.0e-2], "search_budget": 12, "record": str(tmp_path / "lr.json")}
    record = lorakit.search(given)
    assert records.read(tmp_path / "lr.json").kind == "lr_search"
    assert [point.learning_rate for point in record.search] == [1.0e-4, 1.0e-2]
    losses = {point.learning_rate: point.validation["loss"] for point in record.search}
    assert lr_search.best_rate(record) == min(losses, key=losses.get)


def test_a_search_goes_on_where_it_stopped(tmp_path, monkeypatch):
    given = QUICK | {"search_rates": [1.0e-4], "search_budget": 3, "record": str(tmp_path / "lr.json")}
    first = lorakit.search(given)
    tried = []
    real = lr_search._try_rate
    monkeypatch.setattr(lr_search, "_try_rate", lambda p, r: (tried.append(p.learning_rate), real(p, r))[1])
    more = lorakit.search(given | {"search_rates": [1.0e-3, 1.0e-4]})
    assert tried == [1.0e-3] and more.search[1] == first.search[0]
    assert any("learning rates 0.0001 from the search started" in note for note in more.notes)
    lorakit.search(given | {"search_rates": [1.0e-3, 1.0e-4], "search_budget": 4})  # another budget: nothing to keep
    assert tried == [1.0e-3, 1.0e-3, 1.0e-4]
    rows = "".join(f"row {n},{n % 2}\n" for n in range(40))
    for name in ("train", "dev"):
        (tmp_path / f"{name}.csv").write_text("text,label\n" + rows.replace("row", name))
    loaded = models.load("toy-encoder", "classify")
    for part in (loaded.model, loaded.tokenizer):
        part.save_pretrained(tmp_path / "m")
    given |= {"task": "labelled", "data_files": str(tmp_path), "model": str(tmp_path / "m")}
    changes = [lambda: None, (tmp_path / "dev.csv").unlink, lambda: (tmp_path / "m" / "tokenizer_x").write_text("new")]
    for change in [*changes, lambda: None]:  # nothing there; a file less; another model of that name; all the same
        change()
        lorakit.search(given)
    assert tried[3:] == [1.0e-4] * 3


def test_search_passes_over_what_diverged():
    bad, good = {"learning_rate": 1.0, "status": "diverged"}, {"learning_rate": 0.1, "status": "done"}
    search = [records.SearchPoint(**bad), records.SearchPoint(**good, validation={"loss": 0.7})]
    record = records.Record(setting="toy", method="lora", seed=0, status="done", kind="lr_search", search=search)
    assert lr_search.best_rate(record) == 0.1
    with pytest.raises(ParameterError, match="none of them finished"):
        lr_search.best_rate(record.model_copy(update={"search": search[:1]}))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"learning_rate": "1e-4"}, "learning_rate='1e-4'.*1.0e-04"),
        ({"ranks": 8}, "ranks=8: unknown parameter"),
        ({"method": "lra"}, "method='lra'.*lora"),
        ({"task": "sst3"}, "sst3.*sst2"),
        ({"model": "no-such/model"}, "no-such/model"),
        ({"target_modules": ["q_proj"]}, "q_proj.*q_lin"),
        ({"task": "sst2", "data_files": "/nowhere"}, "/nowhere"),
        ({"model": "gemma-3-270m", "task": "instruct"}, "task instruct is read from data_files"),
        ({"model": "gemma-3-270m", "task": "instruct", "data_files": "."}, "train.jsonl"),
        ({"exact_match_rows": 2}, "exact_match_rows=2: task 'toy-reviews' has no answers"),
        ({"exact_match_rows": 2, "model": "toy-decoder", "task": "toy-stories"}, "exact_match_rows=2: task 'toy-st"),
        ({"record": "."}, "record=.*is a folder"),
        ({"record": "/dev/null"}, "record='/dev/null'.*a device"),
        ({"record": "/dev/null/r.json"}, "record='/dev/null/r.json': is under /dev/null"),
        ({"record": "/proc/r.json"}, "record='/proc/r.json': cannot be written"),
        ({"record": "x" * 256}, "record=.*name too long"),
        ({"run_dir": "/dev/null"}, "run_dir='/dev/null': is not a folder"),
        ({"run_dir": "/proc/run"}, "run_dir='/proc/run': cannot be written"),
        ({"run_dir": "/proc"}, "run_dir='/proc': cannot be written"),
        ({"run_dir": "x" * 256}, "run_dir=.*name too long"),
        ({"run_dir": "run", "record": "run"}, "record='run': is a folder of run_dir"),
        ({"run_dir": "run", "record": "run/adapter"}, "record='run/adapter': is a folder of run_dir"),
        ({"run_dir": "run/deep", "record": "run"}, "record='run': is a folder of run_dir"),
    ],
)
def test_bad_input_is_one_clear_error_and_writes_nothing(changed, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(BudgetTrainer, "train", lambda *_, **__: pytest.fail("trained before it was told"))
    monkeypatch.setattr("lorakit.assets.fetch", lambda *_: pytest.fail("fetched before it was told"))
    monkeypatch.setenv("LORAKIT_CACHE", "/dev/null")
    monkeypatch.delenv("LORAKIT_DATA", raising=False)
    with pytest.raises(LorakitError, match=message):
        lorakit.run(QUICK | {"record": str(tmp_path / "r.json")} | changed)
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_the_adapter_is_to_be_is_told_before_training(tmp_path):
    (tmp_path / "adapter").touch()
    with pytest.raises(ParameterError, match="run_dir=.*adapter': is not a folder"):
        lorakit.run(QUICK | {"run_dir": str(tmp_path)})
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
