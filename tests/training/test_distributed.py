"""Two processes over gloo: the same decisions and the same weights, bit for bit, on both."""

from __future__ import annotations

import os
import subprocess
import sys

import torch
import training_runs as runs
import two_processes

from lorakit import records
from lorakit.adapters import attach
from lorakit.files import PROJECT
from lorakit.gates import build_gate
from lorakit.settings import Gating
from lorakit.skip.controller import SkipLoRA
from lorakit.tokens import build_tokens
from lorakit.training import Budget, BudgetTrainer


def outcome(trainer, **more) -> dict:
    """What a run ended with; its ledger without what is each process' own: time, and the loss since the last point."""
    ledger = trainer.ledger.state_dict() | {"seconds": 0, "loss_sum": 0, "score_sum": 0}
    kept = {"weights": runs.weights(trainer.model), "decisions": trainer.gate_log.decisions, "ledger": ledger}
    return kept | {"processes": trainer.accelerator.num_processes} | more


def skipping(folder: str, **options) -> dict:
    """A short run that skips; what this process ended with."""
    model = attach(runs.tiny_bert(), "lora", rank=4, seed=0)
    settings = runs.skipping(warmup=0.2, explore=0.2, measure_every=2, **options)
    skip = SkipLoRA(model, settings, seed=1)
    decided = []
    after = skip.after_step
    skip.after_step = lambda *a: (decided.append(skip.signature()[0]), after(*a))
    given = {"budget": Budget(12, "steps"), "params": {"skip": options["mode"]}}
    trainer = runs.ran(runs.trainer(model, folder, controllers=[skip], **given))
    seen = {"metric": skip.metric, "tokens": trainer.ledger.tokens, "processes": trainer.accelerator.num_processes}
    return seen | {"weights": runs.weights(model), "decided": decided}


def both_kinds(folder: str) -> dict:
    prefix = skipping(f"{folder}/prefix", mode="prefix", share=0.5)
    return {"prefix": prefix, "forward": skipping(f"{folder}/forward", mode="adapter", decide="forward", share=0.5)}


def test_skiplora_decides_alike_everywhere(tmp_path):
    results = two_processes.run("test_distributed", "both_kinds", tmp_path)
    untrained = runs.weights(attach(runs.tiny_bert(), "lora", rank=4, seed=0))
    for kind in ("prefix", "forward"):
        first, second = (result[kind] for result in results)
        assert first["processes"] == second["processes"] == 2
        assert first["decided"] == second["decided"] and len(set(first["decided"])) > 1
        assert first["metric"] == second["metric"] and first["tokens"] == second["tokens"]
        assert runs.equal(first["weights"], second["weights"])
        assert not runs.equal(first["weights"], untrained)


def gating(folder: str) -> dict:
    """Runs with a novelty gate, with a gate that is open, and without one; what this process ended with."""
    ended = {}
    for name in ("novelty", "open", "none"):
        model = attach(runs.tiny_bert(), "lora", rank=4, seed=0)
        settings = runs.batch_gate(name, rate=0.4, burn_in=3, m=64, k=8, topk=0, ema=0.1, refresh=2)
        gate = runs.Open() if name == "open" else build_gate(settings, model, "classify")
        trainer = runs.ran(
            runs.trainer(model, f"{folder}/{name}", budget=Budget(14, "steps"), gate=gate, save_steps=14)
        )
        ended[name] = outcome(trainer, log=trainer.gate_log.points, basis=getattr(gate, "basis", None))
    return ended


def test_a_gate_decides_alike_everywhere(tmp_path):
    first, second = two_processes.run("test_distributed", "gating", tmp_path)
    mine, other = first["novelty"], second["novelty"]
    assert mine["processes"] == other["processes"] == 2
    assert 3 < sum(mine["decisions"]) < 14  # some were rejected, in windows of two micro-batches a process
    assert all(mine[name] == other[name] for name in ("decisions", "log", "ledger"))
    assert torch.equal(mine["basis"], other["basis"])
    assert runs.equal(mine["weights"], other["weights"])
    # averaging once per accepted window is what DistributedDataParallel does
    assert runs.equal(first["open"]["weights"], second["open"]["weights"])
    assert runs.near(first["open"]["weights"], first["none"]["weights"])
    untrained = runs.weights(attach(runs.tiny_bert(), "lora", rank=4, seed=0))
    assert not runs.equal(first["open"]["weights"], untrained)


CHOICES = {
    "gather": {"mode": "gather", "score": "loss", "per": "sequence"},
    "fractional": {"mode": "fractional", "score": "loss", "per": "sequence"},
    "drawn": {"mode": "fractional", "score": "loss", "policy": "pps"},
    "gated": {"mode": "fractional", "method": "random"},
    "all": {"method": "baseline"},
}


def choosing(folder: str, name: str, batch_size: int = 8) -> BudgetTrainer:
    """A run on chosen tokens; the first eight rows of sixteen have no label: one rank's batch, every other step."""
    rows = runs.half_empty(96, every=32)
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
    model = attach(runs.tiny_gemma(**layers), "lora", rank=4, seed=0)
    settings = Gating(**{"method": "flora", "topk_tokens": 0.3} | CHOICES[name])
    gate = runs.batch_gate("novelty" if name == "gated" else "none", rate=0.5, burn_in=2, m=64, k=8)
    constant = {
        "batch_size": batch_size,
        "learning_rate": 0.3,
        "optimizer": "sgd",
        "schedule": "constant",
        "warmup": 0.0,
    }
    run = runs.trainer(
        model, f"{folder}/{name}", budget=Budget(6, "steps"), params=constant | {"gradient_accumulation": 1},
        language=True, train_dataset=rows, eval_dataset=rows.select(range(8, 16)),
        gate=build_gate(gate, model, "causal"),
        tokens=build_tokens(settings, model, "causal", rank=int(os.environ.get("RANK", 0))),
    )  # fmt: skip
    run.args.train_sampling_strategy = "sequential"
    return run


def choosing_tokens(folder: str) -> dict:
    """What this process ended with, by choice."""
    ended = {}
    for name in CHOICES:
        trainer = runs.ran(choosing(folder, name))
        ended[name] = outcome(trainer, seen=getattr(trainer.tokens, "seen", None))
    return ended


def test_tokens_are_chosen_on_each_process_and_learnt_by_both(tmp_path):
    first, second = two_processes.run("test_distributed", "choosing_tokens", tmp_path)
    for name in CHOICES:
        mine, other = first[name], second[name]
        assert mine["processes"] == other["processes"] == 2
        assert mine["decisions"] == other["decisions"] and mine["ledger"] == other["ledger"]
        assert runs.equal(mine["weights"], other["weights"]), name
        if name != "all":
            assert mine["seen"]["predictions"] < 0.6 * other["seen"]["predictions"]  # half its batches have no label
    assert sum(first["gated"]["decisions"]) >= 2 and len(first["gated"]["decisions"]) == 6
    drawn = [side["drawn"]["seen"]["chosen"] for side in (first, second)]
    assert first["drawn"]["ledger"]["tokens_backpropagated"] == sum(drawn)
    # one process on the batches of both: chosen per sequence, what is kept does not depend on who has the sequence
    untrained = runs.weights(choosing(str(tmp_path), "gather", batch_size=16).model)
    for name in ("gather", "fractional", "all"):
        trainer = runs.ran(choosing(f"{tmp_path}/one", name, batch_size=16))
        sides = (runs.weights(trainer.model), first[name]["weights"])
        moved = [torch.cat([(a - b).flatten() for a, b in zip(side, untrained, strict=True)]) for side in sides]
        assert moved[0].norm() > 0.1
        assert (moved[0] - moved[1]).norm() < 1e-4 * moved[0].norm()


def test_accelerate_launch_runs_a_params_file_without_a_notebook(tmp_path):
    quick = ["budget=6", "gate_burn_in=3", "batch_size=4", "max_test=16", "max_validation=16", "evaluations=1"]
    given = [*quick, "latency_repeats=0", "predict_memory=false", f"record={tmp_path / 'record.json'}"]
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", "params/accelerate/two_processes_cpu.yaml", "--main_process_port", "0"]
    command += ["-m", "lorakit", "train", "-f", "params/toy/_setting.yaml", "-f", "params/toy/slora.yaml"]
    command += [word for one in given for word in ("-p", one)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LORAKIT_PROGRESS": "none"}
    done = subprocess.run(command, env=environment, cwd=PROJECT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    record = records.read(tmp_path / "record.json")
    assert record.method == "slora" and record.costs.accepted_steps == 6
    assert record.costs.examples == 2 * 4 * record.costs.steps  # two processes saw four rows a step each
    assert done.stdout.count("validation loss") == 1
