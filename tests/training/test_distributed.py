"""Two processes over gloo: the same decisions and the same weights, bit for bit, on both."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import slora_runs
import torch
import training_runs as runs
import two_processes

from lorakit import records
from lorakit.adapters import attach
from lorakit.errors import CheckpointError
from lorakit.files import PROJECT
from lorakit.gates import build_gate
from lorakit.params import Params
from lorakit.settings import Gating, TokenSettings
from lorakit.skip.controller import SkipLoRA
from lorakit.tokens import build_tokens
from lorakit.training import Budget, BudgetTrainer, Diverged
from lorakit.training.arguments import training_arguments


def outcome(trainer, **more) -> dict:
    """What a run ended with; its ledger without what is each process' own: time, and the loss since the last point."""
    ledger = trainer.ledger.state_dict() | {"seconds": 0, "loss_sum": 0, "score_sum": 0}
    kept = {"weights": runs.weights(trainer.model), "decisions": trainer.gate_log.decisions, "ledger": ledger}
    return kept | {"processes": trainer.accelerator.num_processes} | more


def skipping(folder: str, **options) -> dict:
    """A short run that skips; what this process ended with."""
    model = attach(runs.tiny_bert(), "lora", rank=4, seed=0)
    settings = runs.skipping(warmup=0.2, explore=0.2, measure_every=2, **options)
    skip = SkipLoRA(model, settings=settings, seed=1)
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
    "exact": {"method": "baseline"},
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
        tokens=build_tokens(
            settings, model, "causal", loss=TokenSettings(loss="exact" if name == "exact" else "nll"),
            rank=int(os.environ.get("RANK", 0)),
        ),
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
        if name not in ("all", "exact"):
            assert mine["seen"]["predictions"] < 0.6 * other["seen"]["predictions"]  # half its batches have no label
    assert sum(first["gated"]["decisions"]) >= 2 and len(first["gated"]["decisions"]) == 6
    drawn = [side["drawn"]["seen"]["chosen"] for side in (first, second)]
    assert first["drawn"]["ledger"]["tokens_backpropagated"] == sum(drawn)
    # one process on the batches of both: chosen per sequence, what is kept does not depend on who has the sequence
    untrained = runs.weights(choosing(str(tmp_path), "gather", batch_size=16).model)
    for name in ("gather", "fractional", "all", "exact"):
        trainer = runs.ran(choosing(f"{tmp_path}/one", name, batch_size=16))
        sides = (runs.weights(trainer.model), first[name]["weights"])
        moved = [torch.cat([(a - b).flatten() for a, b in zip(side, untrained, strict=True)]) for side in sides]
        assert moved[0].norm() > 0.1
        assert (moved[0] - moved[1]).norm() < 1e-4 * moved[0].norm()


def last_without_labels(folder: str) -> dict:
    """Windows of two batches a process, the second of each without a label on either."""

    def emptied(row, place):
        return {"labels": [-100] * len(row["labels"])} if place % 32 >= 16 else row

    model = attach(runs.tiny_gemma(), "lora", rank=4, seed=0)
    given = {"batch_size": 8, "gradient_accumulation": 2, "learning_rate": 0.3, "optimizer": "sgd"}
    rows = runs.language_rows(96).map(emptied, with_indices=True)
    run = runs.trainer(model, folder, budget=Budget(3, "steps"), params=given, language=True, train_dataset=rows)
    run.args.train_sampling_strategy = "sequential"
    return outcome(runs.ran(run))


def test_a_last_batch_without_labels_keeps_the_weights_alike(tmp_path):
    first, second = two_processes.run("test_distributed", "last_without_labels", tmp_path)
    untrained = runs.weights(attach(runs.tiny_gemma(), "lora", rank=4, seed=0))
    assert first["processes"] == 2 and not runs.equal(first["weights"], untrained)
    assert runs.equal(first["weights"], second["weights"])


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


def losing(folder: str) -> dict:
    """The loss logged and averaged of two processes, by kind; and what ended a run with a NaN on the second one."""
    ended = {}
    for name in ("none", "gated", "chosen"):
        gate, tokens = runs.Alternating() if name == "gated" else None, None
        for broken in (False, True):
            model = attach(runs.tiny_gemma(), "lora", rank=4, seed=0)
            if name == "chosen":
                tokens = build_tokens(Gating(method="flora", topk_tokens=0.5, score="loss"), model, "causal")
            if name == "gated":
                gate = build_gate(runs.batch_gate("novelty", rate=0.5, burn_in=2, m=64, k=8), model, "causal")
            args = training_arguments(Params(batch_size=4, seed=3, learning_rate=1e-2), f"{folder}/{name}{broken}")
            args.train_sampling_strategy = "sequential"
            trainer = BudgetTrainer(
                model=model,
                args=args,
                train_dataset=runs.language_rows(96),
                eval_dataset=runs.language_rows(8),
                data_collator=runs.collate_language,
                compute_metrics=runs.metrics,
                kind="causal",
                budget=Budget(4, "steps"),
                gate=gate,
                tokens=tokens,
            )
            local, step = [], trainer._gated

            def seen(backward, loss, trainer=trainer, local=local, step=step, broken=broken, **options):
                local.append(trainer._part.loss if trainer._part.loss is not None else loss.item())
                step(backward, loss, **options)
                if broken and trainer.args.process_index == 1:  # from the second batch on
                    trainer.model.get_input_embeddings().weight.data.fill_(float("nan"))

            trainer._gated = seen
            error = ""
            try:
                trainer.train()
            except Diverged as diverged:
                error = str(diverged)
            ended[f"{name}{broken}"] = {
                "error": error,
                "steps": trainer.ledger.steps,
                "logged": [point.train_loss for point in trainer.curve.points],
                "local": local,
            }
    return ended


def test_the_loss_of_all_processes_is_logged_and_a_nan_of_one_ends_all(tmp_path):
    first, second = two_processes.run("test_distributed", "losing", tmp_path)
    for name in ("none", "gated", "chosen"):
        mine, other = first[f"{name}False"], second[f"{name}False"]
        mean = [(a + b) / 2 for a, b in zip(mine["local"], other["local"], strict=True)]
        assert mine["logged"] == other["logged"] == pytest.approx(mean, rel=1e-6)
        assert mine["local"] != pytest.approx(other["local"], rel=1e-3)
        for side in (first, second):
            ended = side[f"{name}True"]
            assert "training loss is not finite in one of the processes at step 2" in ended["error"]
            assert ended["steps"] == 1


def waiting(folder: str) -> dict:
    """How long this process waits for the others, after work that it did alone."""
    with pytest.MonkeyPatch.context() as alone:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            alone.delenv(name)
        assert training_arguments(Params(), folder).world_size == 1
    os.environ["LORAKIT_TIMEOUT"] = "9"
    arguments = training_arguments(Params(), folder)
    group = torch.distributed.group.WORLD._get_backend(arguments.device)
    return {"processes": arguments.world_size, "seconds": group.options._timeout.total_seconds()}


def test_a_process_that_worked_alone_before_waits_as_long_as_it_was_told(tmp_path):
    assert two_processes.run("test_distributed", "waiting", tmp_path) == 2 * [{"processes": 2, "seconds": 9}]


def saved(folder: str) -> dict:
    """Checkpoints of two processes, of both trainers."""
    model = attach(runs.tiny_bert(), "lora", rank=4, seed=0)
    runs.trainer(model, f"{folder}/budget", budget=Budget(2, "steps"), save_steps=1).train()
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    slora_runs.slora(slora_runs.lora(), f"{folder}/slora", gate_config=None, **options).train()
    return {}


def test_another_number_of_processes_does_not_resume(tmp_path):
    two_processes.run("test_distributed", "saved", tmp_path)
    budget = runs.trainer(slora_runs.lora(), tmp_path / "budget")
    plain = slora_runs.slora(slora_runs.lora(), tmp_path / "slora", gate_config=None, max_steps=4)
    for run in (budget, plain):
        before = runs.weights(run.model)
        with pytest.raises(CheckpointError, match=r"checkpoint-1: written by 2 process\(es\), .* resumed by 1"):
            run.train(resume_from_checkpoint=f"{run.args.output_dir}/checkpoint-1")
        assert runs.equal(runs.weights(run.model), before)
