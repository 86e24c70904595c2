"""What the suite adds: record keeping, FLOP counting and progress to a training step, and its import to torch's."""

from __future__ import annotations

import functools
import statistics
import tempfile

import torch

from benchmarks import _imports
from benchmarks._common import Claim

DESCRIPTION = (
    "a LoRA step of our trainer against the plain Hugging Face Trainer's, MiniLM; a run that counts FLOPs against one "
    "that does not, toy decoder; imports against torch's"
)
TARGET = "training time <= 1.02 x the plain Trainer's, and x the time without counting; import <= 1.5 x import torch"

STEPS, WARMUP = 100, 4
COUNTED_STEPS = (60, 200)
BATCH, LONGEST = 16, 64


def run() -> list[Claim]:
    return [*step_claims(), *counting_claims(), *_imports.claims()]


def step_claims() -> list[Claim]:
    """The median step, and all steps together: the first of each shape also counts FLOPs through a dispatch mode."""
    from lorakit.measure.lockstep import lockstep

    torch.set_num_threads(1)  # two trainers' thread pools would spin against each other
    with tempfile.TemporaryDirectory() as folder:
        shapes: list[list] = [[], []]
        ours, theirs = lockstep([_ours(folder, shapes[0]), _theirs(folder, shapes[1])], STEPS)
    assert shapes[0][:STEPS] == shapes[1][:STEPS], "the two trainers did not see the same batches"
    pairs = list(zip(ours[WARMUP:], theirs[WARMUP:], strict=True))
    ours, theirs = zip(*pairs, strict=True)
    ratio = statistics.median(a / b for a, b in pairs)
    median = [statistics.median(side) * 1e3 for side in (ours, theirs)]
    return [
        Claim("training step, median", *median, 1.02, "ms", ratio),
        Claim(f"{len(pairs)} training steps", sum(ours), sum(theirs), 1.02, "s"),
    ]


def counting_claims() -> list[Claim]:
    """Seconds of a run's steps from its first on, where FLOPs are counted, against a twin that counts none.

    The two take turns step by step. Beside the plain sums, which one slow moment of the machine moves by percents,
    stands the claim: steps with a count as they were, the others by the median of their ratios.
    """
    return [claim for mode in ("plain", "gather", "fractional") for claim in _counting_claims(mode)]


def _counting_claims(mode: str) -> list[Claim]:
    from lorakit.measure.lockstep import lockstep

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        counted, uncounted = (_decoder_run(mode, f"{folder}/{name}") for name in ("counted", "uncounted"))
        at = _steps_with_a_count(counted)
        uncounted.meter.measure = lambda key, sizes, function: (function(), 0)
        ours, theirs = lockstep([counted, uncounted], COUNTED_STEPS[-1])
    assert counted.ledger.flops_forward > 0 == uncounted.ledger.flops_forward
    usual = statistics.median(a / b for step, (a, b) in enumerate(zip(ours, theirs, strict=True)) if step not in at)
    typical = statistics.median(theirs)
    claims = []
    for steps in COUNTED_STEPS:
        first = {step for step in at if step < steps}
        extra = sum(ours[step] - theirs[step] for step in first)
        name = f"{steps} steps, {mode}, {len(first)} with a count"
        seconds = usual * typical * (steps - len(first)) + typical * len(first) + extra
        claims.append(Claim(name, seconds, typical * steps, 1.02, "s"))
        claims.append(Claim(f"{name}: plain sums", sum(ours[:steps]), sum(theirs[:steps]), float("inf"), "s"))
    return claims


def _steps_with_a_count(run) -> set[int]:
    """Filled while `run` trains: the steps in which FLOPs were counted rather than computed."""
    at, learn = set(), run.meter._learn

    def noted(*known) -> None:
        at.add(run.ledger.steps)
        learn(*known)

    run.meter._learn = noted
    return at


def _decoder_run(mode: str, folder: str):
    from lorakit.params import resolve
    from lorakit.runs.assembly import assemble, build_trainer
    from lorakit.runs.experiment import new_record

    given = {"model": "toy-decoder", "task": "toy-instruct", "batch_size": 8, "budget": COUNTED_STEPS[-1]}
    if mode != "plain":
        given["gating"] = {"method": "flora", "topk_tokens": 0.2, "mode": mode}
    params = resolve(given | {"max_validation": 8, "max_test": 8})
    return build_trainer(assemble(params), new_record(params, given), folder)


def _ours(folder: str, shapes: list):
    from lorakit.training import Budget, BudgetTrainer

    return BudgetTrainer(
        **_common(folder, shapes),
        kind="classify",
        budget=Budget(STEPS, "steps"),
        eval_dataset=_rows(BATCH),
        compute_metrics=lambda prediction: {"loss": float(prediction.predictions[:, 0].mean())},
    )


def _theirs(folder: str, shapes: list):
    from transformers import PrinterCallback, Trainer

    trainer = Trainer(**_common(folder, shapes, max_steps=STEPS))
    trainer.remove_callback(PrinterCallback)
    return trainer


def _common(folder: str, shapes: list, **limits):
    import dataclasses

    from lorakit.params import resolve
    from lorakit.training.arguments import training_arguments

    args = training_arguments(resolve({"batch_size": BATCH}), folder)
    return {
        "model": _model(),
        "args": dataclasses.replace(args, **limits),
        "train_dataset": _rows(BATCH * STEPS),
        "data_collator": functools.partial(_collate, shapes=shapes),
    }


def _model() -> torch.nn.Module:
    from transformers import AutoModelForSequenceClassification

    from lorakit import adapters, models

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(models.config("all-MiniLM-L6-v2"))
    return adapters.attach(model, "lora", seed=0)


def _rows(count: int) -> list[dict]:
    """Token lists of 4 to 64 tokens, lengths spread as sentences' are."""
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(count, generator=generator) * 10 + 25).clamp(4, LONGEST).long().tolist()
    return [{"ids": torch.randint(1000, 30000, (n,), generator=generator), "label": n % 2} for n in lengths]


def _collate(rows: list[dict], shapes: list) -> dict[str, torch.Tensor]:
    """Pad to a multiple of 8, as the tasks' collators do, and note the shape."""
    width = -(-max(len(row["ids"]) for row in rows) // 8) * 8
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    for row, line in zip(rows, ids, strict=True):
        line[: len(row["ids"])] = row["ids"]
    shapes.append(tuple(ids.shape))
    labels = torch.tensor([row["label"] for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}
