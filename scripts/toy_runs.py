"""Short runs of the comparison's rows on the toy models, and how far other models are from what they end with."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any, NamedTuple

import torch

from lorakit import adapters, models
from lorakit.errors import LorakitError
from lorakit.files import PARAMS
from lorakit.params import Params
from lorakit.params.files import row_of_file
from lorakit.params.whole import method_of
from lorakit.records import Point
from lorakit.runs import experiment
from lorakit.runs.assembly import Assembled
from lorakit.tasks import Task
from lorakit.training import BudgetTrainer

ROWS = {  # row -> the setting whose folder of params/ says what it is
    "head": "toy", "full": "toy", "lora": "toy", "sparse": "toy", "sparse_ranks": "sst2-minilm", "hira": "toy",
    "qlora": "toy", "skip": "toy", "slora": "toy", "flora": "toy-instruct", "flora_fractional": "toy-instruct",
}  # fmt: skip
PLACES = {
    "encoder": {"model": "toy-encoder", "task": "toy-reviews"},
    "masked": {"model": "toy-encoder", "task": "toy-stories"},
    "decoder": {"model": "toy-decoder", "task": "toy-instruct"},
}
BOTH = ("encoder", "decoder")  # a classifier and a causal language model
SHORT = {
    "budget": 6, "budget_unit": "steps", "evaluations": 1, "batch_size": 8, "max_train": 64, "max_validation": 32,
    "max_test": 8, "predict_memory": False, "latency_repeats": 0,
}  # fmt: skip
SOON = {"slora": {"gate_burn_in": 2}}  # so that six batches are enough for a rejected one
ROUNDING = {"none": 1e-4, "nf4": 0.02}  # QLoRA takes products in bf16, but for those of a merged or exported model


class Trained(NamedTuple):
    """A short run, at its end."""

    params: Params
    model: torch.nn.Module
    task: Task
    curve: list[Point]
    notes: list[str]
    processes: int


def params_of(row: str, place: str, **changed: Any) -> Params:
    """What its params file says, on the toy model of that place, for six steps."""
    own = method_of(row) | row_of_file(PARAMS / ROWS[row], row)
    return Params(**own | SHORT | PLACES[place] | SOON.get(row, {}) | changed, row=row)


def train(params: Params, stop: int = 0) -> Trained | None:
    """A run; None where it was stopped, as by Ctrl-C, after that many steps.

    Raises:
        LorakitError: the package refused it.
        RuntimeError: it did not end well, or its method did nothing.
    """
    record = experiment.new_record(params, {})

    def work(assembled: Assembled, trainer: BudgetTrainer) -> None:
        before, step = adapters.adapter_state(assembled.model), trainer.training_step

        def stopping(*given: Any) -> torch.Tensor:
            if stop and trainer.ledger.steps == stop:
                raise KeyboardInterrupt
            return step(*given)

        trainer.training_step = stopping
        experiment.train(trainer, record, params)
        after = adapters.adapter_state(assembled.model)
        require(any(not torch.equal(after[name], before[name]) for name in after), f"{params.row}: nothing was trained")
        require(acted(params, trainer), f"{params.row}: its method did nothing in {SHORT['budget']} steps")
        if params.method == "sparse" and params.sparsify == "structured":
            adapters.compact(assembled.model)

    tried = experiment.attempt(record, params, work)
    if stop and record.status == "interrupted":
        return None
    if tried.stopped:
        raise tried.stopped
    require(record.status == "done", f"{params.row}: {record.status}: {record.message}")
    made, trainer = tried.assembled, tried.trainer
    return Trained(params, made.model, made.task, trainer.curve.points, record.notes, trainer.args.world_size)


def acted(params: Params, trainer: BudgetTrainer) -> bool:
    """Whether what the row is about happened: zeros, layers skipped or kept, batches rejected, tokens left out."""
    reports = [each.report() for each in trainer.controllers]
    happened = [any(report.get(name) for name in ("reached", "share_skipped", "from_cache")) for report in reports]
    if trainer.gate.selective:
        happened.append(trainer.ledger.accepted_steps < trainer.ledger.steps)
    if trainer.gate.candidates > 1:
        happened.append(trainer.gate_log.report()["level"] == "example")
    if trainer.tokens.selective:
        seen = trainer.tokens.report()
        happened.append(seen["chosen"] < seen["predictions"])
    asked = [params.method == "sparse", params.skip != "none", params.gate != "none", params.gating.selective]
    asked.append(params.prefix_cache != "none")
    return happened == [True] * sum(asked)


def require(condition: bool, message: str) -> None:
    """A fault ends the command."""
    if not condition:
        raise RuntimeError(message)


@cache
def tried(row: str, place: str) -> Trained | LorakitError:
    """The run of a row at a place, or why the package refuses it."""
    try:
        return train(params_of(row, place))
    except LorakitError as error:
        return error


def trained(row: str, place: str) -> Trained:
    found = tried(row, place)
    if isinstance(found, LorakitError):
        raise found
    return found


def runs_of(row: str) -> list[Trained]:
    """On both models, as far as the row serves them."""
    found = [tried(row, place) for place in BOTH]
    return [run for run in found if isinstance(run, Trained)] or [trained(row, "encoder")]


# --- what is compared ------------------------------------------------------------------------------------------------
def outputs(model: torch.nn.Module, run: Trained) -> Any:
    """Loss and logits of the validation rows, as one batch."""
    rows = run.task.validation
    with torch.no_grad():
        return model.eval()(**run.task.eval_collator([rows[n] for n in range(len(rows))]))


def difference(model: torch.nn.Module, run: Trained) -> float:
    """How far `model`'s logits are from the trained one's."""
    return apart(outputs(model, run), outputs(run.model, run), run)


def apart(one: Any, other: Any, run: Trained) -> float:
    """The largest difference of two outputs' logits, as a part of the largest logit."""
    here, there = one.logits.float(), other.logits.float()
    found = float((here - there).abs().max() / there.abs().max())
    told = f"{run.params.row}, {run.params.model}: logits differ by {found:.1e} of the largest"
    require(found <= ROUNDING[run.params.quantize], told)
    return found


def base_of(run: Trained) -> torch.nn.Module:
    """The model as it was before anything was attached."""
    params, kind = run.params, run.task.kind
    model = models.load(params.model, kind, dtype=params.dtype, attention=params.attention, seed=params.seed).model
    return adapters.quantize_nf4(model, double_quant=params.double_quant) if params.quantize == "nf4" else model


def digest(model: torch.nn.Module) -> str:
    """Of everything that was trained, bit for bit."""
    found = hashlib.sha256()
    for name, tensor in sorted(adapters.adapter_state(model).items()):
        found.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return found.hexdigest()
