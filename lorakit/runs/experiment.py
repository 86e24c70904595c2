"""run(params) -> Record: one run from parameters to a record, whatever happens on the way."""

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorakit import adapters, records
from lorakit.errors import DataError, LorakitError, ParameterError, require
from lorakit.files import LOCK, alone, aside, require_place, written
from lorakit.measure import environment, latency, memory, weights
from lorakit.params import Params, rate_note, resolve, row_of
from lorakit.quiet import interruptible, quiet
from lorakit.records import Latency, Record, Spent
from lorakit.runs.assembly import Assembled, assemble, build_trainer, check, fingerprints
from lorakit.tokens import build_tokens
from lorakit.training import BudgetTrainer, Diverged, checkpoint
from lorakit.training.callback import strip_prefix

MADE = ("adapter", "model")  # what a run leaves in its run_dir beside checkpoints
# what allocators say on a CPU, where no exception of its own does: PyTorch's, oneDNN's, the system's
OUT_OF_MEMORY = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|out of memory|Cannot allocate memory|bad_alloc"
    r"|could not (create a (memory|memory object|primitive)|execute a primitive)$"
)


def run(given: dict[str, Any], dataset: Mapping[str, Any] | None = None) -> Record:
    """Train as `given` says and measure it.

    Args:
        given: names and values of `lorakit.Params`; what is not given keeps its default.
        dataset: split -> rows of own data (a `datasets.DatasetDict`), for task "labelled", "pairs", "text" or "chat".

    Returns:
        The record, also written to `params.record` where that is set. Its status is "done", "diverged" (a loss became
        NaN or infinite), "out_of_memory" or "failed" (a file could not be written: a full disk, a closed pipe); the
        files of the run are kept.

    Raises:
        LorakitError: bad parameters or data, before anything is written.
        KeyboardInterrupt: after the record with status "interrupted" was written.
        Exception: what else ended the run, after the record with status "failed" was written.
    """
    params = resolve(given)
    record = new_record(params, given)
    with interruptible():
        tried = attempt(record, params, lambda *parts: _train_and_evaluate(record, *parts), dataset)
        if tried.trainer:
            with contextlib.nullcontext() if record.status == "done" else contextlib.suppress(Exception):
                _describe(record, tried.assembled, tried.trainer)
        if tried.trainer is None or tried.trainer.is_world_process_zero():
            made = [Path(params.run_dir) / name for name in MADE] if params.run_dir and record.status == "done" else []
            beside = [folder / records.BESIDE for folder in made if folder.is_dir()]
            for path in filter(None, [params.record, *beside]):
                _write(record, Path(path))
    if tried.stopped:
        raise tried.stopped
    return record


# the steps of a run --------------------------------------------------------------------------------


def new_record(params: Params, given: dict[str, Any]) -> Record:
    """A record of a run that begins; what contradicts itself, or names no place to write to, is refused here."""
    check(params)
    if params.run_dir:
        base = Path(os.path.realpath(os.path.expanduser(params.model)))
        for name in ("", *MADE):
            require_place(folder := Path(params.run_dir) / name, "run_dir", folder=True)
            told = "is what a run left in run_dir, from where the next one moves it; name another run_dir"
            require(not name or not base.is_relative_to(os.path.realpath(folder)), "model", params.model, told)
        if params.save_steps:
            checkpoint.require_room(params.run_dir)
    if params.record:
        require_place(params.record, "record")
        run_dir = Path(os.path.realpath(params.run_dir or os.devnull))
        clash = Path(os.path.realpath(params.record)) in (*(run_dir / name for name in ("", *MADE)), *run_dir.parents)
        require(not clash, "record", params.record, "is a folder of run_dir; name a file")
    apart = {"record", "run_dir", "data_files"}
    return Record(
        setting=params.setting, method=row_of(params), seed=params.seed, status="running",
        started=datetime.now(UTC).isoformat(timespec="seconds"), environment=environment.environment(),
        params={name: value for name, value in given.items() if name not in apart},
        resolved=params.model_dump(exclude=apart), notes=[note for note in [rate_note(params)] if note],
    )  # fmt: skip


@dataclass
class Attempt:
    """How far a run came; stopped: to be raised once its record is written."""

    assembled: Assembled | None = None
    trainer: BudgetTrainer | None = None
    stopped: BaseException | None = None


def attempt(record: Record, params: Params, work: Callable[..., None], dataset: Any = None) -> Attempt:
    """Assemble the run, do `work` with that and its trainer and say in the record how it ended.

    Raises:
        LorakitError: bad parameters or data, before anything was trained.
    """
    tried = Attempt()
    try:
        tried.assembled = assemble(params, dataset)
        record.notes += tried.assembled.notes
        record.fingerprints = fingerprints(tried.assembled)
        with _held(params.run_dir) as temporary:
            tried.trainer = build_trainer(tried.assembled, record, params.run_dir or temporary)
            try:
                work(tried.assembled, tried.trainer)
            finally:
                tried.trainer.progress.close()
        record.status = "done"
    except LorakitError:
        raise
    except Diverged as error:
        record.status, record.message = "diverged", str(error)
    except KeyboardInterrupt as error:
        tried.stopped, step = error, tried.trainer.ledger.steps if tried.trainer else 0
        record.status, record.message = "interrupted", f"stopped at step {step}"
    except Exception as error:
        full = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or bool(OUT_OF_MEMORY.search(str(error)))
        said = " ".join(str(error).split())[:500]
        several = tried.trainer is not None and tried.trainer.args.world_size > 1
        lost = several and (isinstance(error, torch.distributed.DistError) or bool(re.search(r"\bgloo\b", said)))
        what = "another process of this run ended, or did not answer in time" if lost else type(error).__name__
        record.status, record.message = "out_of_memory" if full else "failed", said if full else f"{what}: {said}"
        tried.stopped = None if full or lost or isinstance(error, OSError) else error
    return tried


def train(trainer: BudgetTrainer, record: Record, params: Params) -> None:
    """Train to the end of the budget, from the newest checkpoint in the run's folder where there is one."""
    asked, files = params.run_dir and params.resume, trainer.checkpoint_files
    resumed, damaged = checkpoint.intact(params.run_dir, files) if asked else (None, [])
    record.notes += [f"put away, for {problem}" for problem in damaged]
    if resumed:
        record.notes.append(f"resumed at step {resumed.name.split('-')[1]}")
        if checkpoint.about(resumed)["identity"].get("code") != record.fingerprints["code"]:
            record.notes.append("resumed from a checkpoint that other code wrote")
    elif params.run_dir and trainer.is_world_process_zero():
        checkpoint.begin(params.run_dir, None, *MADE)
    memory.reset_cuda_peak()
    try:
        trainer.train(resume_from_checkpoint=resumed)
    finally:  # a run that ran out of memory is the one whose peak is asked for
        record.costs.peak_memory_bytes = memory.cuda_peak_bytes()


def _train_and_evaluate(record: Record, assembled: Assembled, trainer: BudgetTrainer) -> None:
    params, model, elsewhere = assembled.params, assembled.model, assembled.elsewhere
    before = trainer.evaluate(elsewhere.test, metric_key_prefix="base") if elsewhere else {}
    train(trainer, record, params)
    if params.select == "best":
        trainer.curve.restore_best(model)
    if params.predict_memory:
        try:
            with trainer.progress.doing("predicting memory"):
                record.costs.predicted_memory = _predicted_memory(assembled)
        except (ParameterError, RuntimeError) as error:  # of fake tensors, as of Mixtral's experts in fp32
            record.notes.append(f"memory not predicted: {' '.join(str(error).split()):.200}")
    record.details |= {controller.name: controller.report() for controller in trainer.controllers}
    if params.method == "sparse" and params.sparsify == "structured":
        adapters.compact(model)
    _evaluate(record, assembled, trainer, before)
    if params.run_dir and trainer.is_world_process_zero():
        _keep(assembled, Path(params.run_dir))


def _keep(assembled: Assembled, run_dir: Path) -> None:
    """The adapter; of "head" and "full" also the model, as `from_pretrained` opens it; the tokenizer beside it."""
    params, model = assembled.params, assembled.model
    adapters.save_adapter(model, run_dir / MADE[0])
    whole = params.method in ("head", "full") and params.quantize == "none"
    with written(run_dir / MADE[whole], folder=True) as folder, quiet():
        if whole:
            model.save_pretrained(folder)
        assembled.tokenizer.backend_tokenizer.no_truncation()  # of training's texts, for who reads its file alone
        assembled.tokenizer.save_pretrained(folder)


def _describe(record: Record, assembled: Assembled, trainer: BudgetTrainer) -> None:
    """Curve, costs and sizes: known however the run ended."""
    model, ledger = assembled.model, trainer.ledger
    record.curve = trainer.curve.points
    record.details |= {"classes": [*assembled.task.classes]} if assembled.task.classes else {}
    record.parameters = adapters.parameter_stats(model)
    record.adapter_bytes = adapters.adapter_bytes(model)
    # of a run that was cut short: none has been told of
    record.details |= {each.name: each.report() for each in trainer.controllers if each.name not in record.details}
    if chooses := trainer.gate.selective or trainer.gate.candidates > 1:
        record.details["gate"] = trainer.gate_log.report()
    if chooses and assembled.redundant is not None:  # of those seen, which were so by design
        accepted = np.array(trainer.gate_log.decisions, dtype=bool)
        redundant = np.resize(assembled.redundant, len(accepted))  # which begins anew at its end
        told = {"redundant_accepted": redundant & accepted, "fresh_accepted": accepted & ~redundant}
        told = {"redundant_seen": redundant} | told
        record.details["gate"] |= {name: int(batches.sum()) for name, batches in told.items()}
    if trainer.tokens.selective:
        record.details["tokens"] = trainer.tokens.report()
    if assembled.params.quantize != "none":
        record.details["weights"] = weights.weight_table(model)
    for name in (*Spent.model_fields, "flops"):
        setattr(record.costs, name, getattr(ledger, name))


def _evaluate(record: Record, assembled: Assembled, trainer: BudgetTrainer, before: dict[str, float]) -> None:
    """Final metrics of the chosen weights; the test split is read here and nowhere before.

    Args:
        before: what the base said, untrained, to the text that tells what was forgotten.
    """
    params = assembled.params
    record.final["validation"] = dict(trainer.curve.chosen().validation)
    record.final["test"] = strip_prefix(trainer.evaluate(assembled.task.test, metric_key_prefix="test"), "test_")
    if elsewhere := assembled.elsewhere:
        losses = {"base": before["base_loss"], "trained": trainer.evaluate(elsewhere.test)["eval_loss"]}
        record.final["test"]["forgetting"] = losses["trained"] - losses["base"]
        record.details["forgetting"] = {"task": elsewhere.name, "rows": len(elsewhere.test), **losses}
    trainer.accelerator.unwrap_model(assembled.model, keep_fp32_wrapper=False)  # what follows runs without autocast
    if params.exact_match_rows:
        from lorakit.tasks.exact_match import exact_match

        rows = assembled.task.answers[: params.exact_match_rows]
        limits = {"max_new_tokens": 128, "batch_size": params.eval_batch_size}
        with trainer.progress.doing("generating answers"):
            record.final["test"]["exact_match"] = exact_match(assembled.model, assembled.tokenizer, rows, **limits)
    if params.latency_repeats:
        with trainer.progress.doing("measuring latency"):
            record.latency = _latency(assembled)


def _latency(assembled: Assembled) -> Latency:
    """Median milliseconds for one test batch, with the adapters beside the weights and merged into them."""
    params, model, batch = assembled.params, assembled.model, first_test_batch(assembled)
    unmerged = latency.inference_latency(model, batch, params.latency_repeats)
    merged = None
    if adapters.can_merge(model):
        with adapters.merged(model):
            merged = latency.inference_latency(model, batch, params.latency_repeats)
    sizes = {"batch_size": len(batch["input_ids"]), "tokens": batch["input_ids"].numel()}
    return Latency(**sizes, unmerged_ms=unmerged, merged_ms=merged)


def first_test_batch(assembled: Assembled) -> dict[str, torch.Tensor]:
    """Its inputs, on the model's device."""
    test = assembled.task.test
    batch = assembled.task.eval_collator([test[n] for n in range(min(assembled.params.eval_batch_size, len(test)))])
    return {name: value.to(assembled.model.device) for name, value in batch.items() if name != "labels"}


def _predicted_memory(assembled: Assembled) -> dict[str, int]:
    """The peak of a batch of the longest training rows, as many as a batch holds."""
    params, model, task = assembled.params, assembled.model, assembled.task
    longest = np.argsort([-len(ids) for ids in task.train["input_ids"]], kind="stable")[: params.batch_size]
    batch = task.collator([task.train[index] for index in longest.tolist()])
    tokens = build_tokens(params.gating, model, task.kind, loss=params, seed=params.seed)
    asked = {"optimizer": params.optimizer, "autocast": None if params.precision == "fp32" else params.precision}
    return memory.predict_step_memory(model, batch, device=model.device.type, tokens=tokens, **asked)


def _write(record: Record, path: Path) -> None:
    """Write the record where it was asked for, or where it can be.

    Raises:
        DataError: it was not where it was asked for; the message says where it is.
    """
    try:
        records.write(record, path)
    except (OSError, ParameterError) as error:
        kept = records.write(record, Path(tempfile.mkdtemp(prefix="record-")) / path.name)
        raise DataError(f"record={str(path)!r}: cannot be written: {error}; it is in {kept}") from None


def _held(run_dir: str) -> contextlib.AbstractContextManager[Any]:
    """The run's folder, with nobody else at work in it; a temporary one, which is given, where none is named."""
    if not run_dir:
        return aside(tempfile.gettempdir(), "run")
    first = os.environ.get("RANK", "0") == "0"  # which keeps others out
    return alone(Path(run_dir) / LOCK, "run_dir", run_dir, "another run") if first else contextlib.nullcontext()
