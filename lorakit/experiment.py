"""run(params) -> Record: one run from parameters to a record, whatever happens on the way."""

from __future__ import annotations

import contextlib
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorakit import adapters, models, records, tasks
from lorakit.errors import CheckpointError, require
from lorakit.measure import environment, latency, memory
from lorakit.measure.optimizers import PREDICTABLE
from lorakit.params import Params, resolve
from lorakit.records import Costs, Latency, Record, SearchPoint

if TYPE_CHECKING:
    from lorakit.training import BudgetTrainer

# Parameters that may change between a checkpoint and its resumption without changing a single weight.
_FREE_TO_CHANGE = {
    *("record", "run_dir", "resume", "report_to", "data_dir", "latency_repeats", "predict_memory", "save_steps"),
    *("exact_match_rows", "search_rates", "search_budget", "max_test", "setting"),
}


@dataclass
class _Setup:
    """What a run works on."""

    params: Params
    model: torch.nn.Module
    tokenizer: Any
    task: Any
    loaded: Any


def run(given: dict[str, Any]) -> Record:
    """Train as `given` says and measure it.

    Args:
        given: names and values of `lorakit.Params`; what is not given keeps its default.

    Returns:
        The record, also written to `params.record` where that is set. Its status is "done", "diverged" (a loss became
        NaN or infinite) or "out_of_memory"; the files of the run are kept.

    Raises:
        LorakitError: bad parameters or data, before anything is written.
        KeyboardInterrupt: after the record with status "interrupted" was written.
    """
    params = resolve(given)
    record = _new_record(params, given)
    setup = _set_up(params)
    record.notes += [*setup.loaded.notes, *setup.task.notes]
    record.fingerprints = _fingerprints(setup)
    with _output_folder(params.run_dir) as folder, _interruptible():
        trainer = _trainer(setup, record, folder)
        stopped = _attempt(record, trainer, lambda: _train_and_evaluate(record, setup, trainer))
        _describe(record, setup, trainer)
    if params.record:
        records.write(record, params.record)
    if isinstance(stopped, KeyboardInterrupt):
        raise stopped
    return record


def search(given: dict[str, Any]) -> Record:
    """Try each of `params.search_rates` for `params.search_budget`, each fully decayed, and compare on validation data.

    Returns:
        A record of kind "lr_search"; the test split is never read. `best_rate` picks from it.
    """
    params = resolve(given)
    require(len(params.search_rates) > 0, "search_rates", params.search_rates, "must list the learning rates to try")
    record = _new_record(params, given)
    record.kind = "lr_search"
    for rate in params.search_rates:
        tried = params.model_copy(
            update={
                "learning_rate": rate,
                "budget": params.search_budget,
                "evaluations": 1,
                "record": "",
                "run_dir": "",
            }
        )
        record.search.append(_try_rate(tried, record))
    record.status = "done"
    if params.record:
        records.write(record, params.record)
    return record


def best_rate(record: Record) -> float:
    """The learning rate with the lowest validation loss among those that did not diverge."""
    finished = [point for point in record.search if point.status == "done" and point.validation]
    require(len(finished) > 0, "search_rates", [point.learning_rate for point in record.search], "all of them diverged")
    return min(finished, key=lambda point: point.validation["loss"]).learning_rate


def _try_rate(params: Params, record: Record) -> SearchPoint:
    trial = _new_record(params, {})
    setup = _set_up(params)
    record.notes = [*setup.loaded.notes, *setup.task.notes]
    record.fingerprints = _fingerprints(setup)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(setup, trial, folder)
        stopped = _attempt(trial, trainer, lambda: _train(trainer, trial, params))
    if isinstance(stopped, KeyboardInterrupt):
        raise stopped
    chosen = trainer.curve.chosen()
    validation = chosen.validation if chosen and trial.status == "done" else None
    return SearchPoint(learning_rate=params.learning_rate, status=trial.status, validation=validation)


# the steps of a run --------------------------------------------------------------------------------


def _new_record(params: Params, given: dict[str, Any]) -> Record:
    return Record(
        setting=params.setting,
        method=params.method,
        seed=params.seed,
        status="running",
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        params={name: value for name, value in given.items() if name not in ("record", "run_dir", "data_dir")},
        resolved=params.model_dump(exclude={"record", "run_dir", "data_dir"}),
        environment=environment.environment(),
    )


def _set_up(params: Params) -> _Setup:
    """Model, task and what is trained. Everything random is drawn from the run's seed."""
    from transformers import set_seed

    require(params.method in adapters.METHODS, "method", params.method, f"must be one of {', '.join(adapters.METHODS)}")
    set_seed(params.seed)
    kind = tasks.kind(params.task, models.family(params.model))
    loaded = models.load(params.model, kind, dtype=params.dtype, attention=params.attention, seed=params.seed)
    task = tasks.load(
        params.task,
        loaded.tokenizer,
        kind_of_model=models.family(params.model),
        data_dir=params.data_dir,
        max_length=params.max_length,
        max_train=params.max_train,
        max_validation=params.max_validation,
        max_test=params.max_test,
        packing=params.packing,
        seed=params.seed,
    )
    model = adapters.attach(
        loaded.model,
        params.method,
        rank=params.rank,
        alpha=params.alpha,
        dropout=params.dropout,
        target_modules=params.target_modules,
        init=params.init,
        rslora=params.rslora,
        seed=params.seed,
    )
    return _Setup(params, model, loaded.tokenizer, task, loaded)


def _fingerprints(setup: _Setup) -> dict[str, Any]:
    return {
        "data": dict(setup.task.files),
        "data_source": setup.task.source,
        "model": setup.loaded.fingerprint,
        "model_source": setup.loaded.source,
        "code": environment.code_fingerprint(),
    }


def _trainer(setup: _Setup, record: Record, folder: str) -> BudgetTrainer:
    from lorakit.training import Budget, BudgetTrainer, Schedule
    from lorakit.training.arguments import training_arguments

    params = setup.params
    identity = {name: value for name, value in record.resolved.items() if name not in _FREE_TO_CHANGE}
    return BudgetTrainer(
        model=setup.model,
        args=training_arguments(params, folder),
        train_dataset=setup.task.train,
        eval_dataset=setup.task.validation,
        data_collator=setup.task.collator,
        eval_collator=setup.task.eval_collator,
        compute_metrics=lambda prediction: setup.task.metrics(prediction.predictions),
        processing_class=setup.tokenizer,
        kind=setup.task.kind,
        budget=Budget(params.budget, params.budget_unit),
        schedule=Schedule(params.schedule, params.warmup),
        identity=identity | {key: record.fingerprints.get(key) for key in ("data", "model")},
        evaluations=params.evaluations,
        save_steps=params.save_steps if params.run_dir else 0,
        keep_best=params.select == "best",
        title=f"{params.setting}/{params.method} s{params.seed}",
    )


def _attempt(record: Record, trainer: BudgetTrainer, work: Callable[[], None]) -> BaseException | None:
    """Do `work` and say in the record how it ended; what stopped it is returned."""
    from lorakit.training import Diverged

    try:
        work()
        record.status = "done"
        return None
    except Diverged as error:
        record.status, record.message = "diverged", str(error)
        return error
    except (torch.OutOfMemoryError, MemoryError) as error:
        record.status, record.message = "out_of_memory", " ".join(str(error).split())[:500]
        return error
    except KeyboardInterrupt as error:
        record.status, record.message = "interrupted", f"stopped at step {trainer.ledger.steps}"
        return error
    finally:
        trainer.progress.close()


def _train_and_evaluate(record: Record, setup: _Setup, trainer: BudgetTrainer) -> None:
    _train(trainer, record, setup.params)
    _evaluate(record, setup, trainer)
    if setup.params.predict_memory:
        if setup.params.optimizer in PREDICTABLE:
            record.costs.predicted_memory = _predicted_memory(setup)
        else:
            record.notes.append(f"memory not predicted: the state of {setup.params.optimizer} is not known")
    if setup.params.run_dir:
        adapters.save_adapter(setup.model, Path(setup.params.run_dir) / "adapter")


def _train(trainer: BudgetTrainer, record: Record, params: Params) -> None:
    """Train to the end of the budget, from the newest checkpoint in the run's folder where there is one."""
    from lorakit.training import checkpoint

    resumed = checkpoint.newest(params.run_dir) if params.run_dir and params.resume else None
    if resumed:
        record.notes.append(f"resumed at step {resumed.name.split('-')[1]}")
    memory.reset_cuda_peak()
    try:
        trainer.train(resume_from_checkpoint=resumed)
    finally:  # a run that ran out of memory is the one whose peak is asked for
        record.costs.peak_memory_bytes = memory.cuda_peak_bytes()


def _describe(record: Record, setup: _Setup, trainer: BudgetTrainer) -> None:
    """Curve, costs and sizes: known however the run ended."""
    ledger = trainer.ledger
    record.curve = trainer.curve.points
    record.parameters = adapters.parameter_stats(setup.model)
    record.adapter_bytes = adapters.adapter_bytes(setup.model)
    for name in Costs.model_fields:
        if hasattr(ledger, name):
            setattr(record.costs, name, getattr(ledger, name))


def _predicted_memory(setup: _Setup) -> dict[str, int]:
    return memory.predict_step_memory(
        setup.model,
        _longest_batch(setup),
        optimizer=setup.params.optimizer,
        autocast=None if setup.params.precision == "fp32" else setup.params.precision,
        device=setup.model.device.type,
    )


def _longest_batch(setup: _Setup) -> dict[str, torch.Tensor]:
    """The batch the peak is predicted for: the longest training rows, as many as a batch holds."""
    rows = setup.task.train
    lengths = [len(ids) for ids in rows["input_ids"]]
    longest = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)[: setup.params.batch_size]
    return setup.task.collator([rows[index] for index in longest])


def _evaluate(record: Record, setup: _Setup, trainer: BudgetTrainer) -> None:
    """Final metrics of the chosen weights; the test split is read here and nowhere before."""
    from lorakit.training.callback import strip_prefix

    if setup.params.select == "best":
        trainer.curve.restore_best(setup.model)
    chosen = trainer.curve.chosen()
    record.final["validation"] = dict(chosen.validation)
    metrics = trainer.evaluate(setup.task.test, metric_key_prefix="test")
    record.final["test"] = strip_prefix(metrics, "test_")
    trainer.accelerator.unwrap_model(setup.model, keep_fp32_wrapper=False)  # what follows runs without autocast
    if setup.params.exact_match_rows:
        record.final["test"]["exact_match"] = _exact_match(setup)
    if setup.params.latency_repeats:
        record.latency = _latency(setup)


def _exact_match(setup: _Setup) -> float:
    from lorakit.tasks.exact_match import exact_match

    rows = setup.task.answer_rows("test", setup.params.exact_match_rows)
    return exact_match(setup.model, setup.tokenizer, rows, max_new_tokens=128, batch_size=setup.params.eval_batch_size)


def _latency(setup: _Setup) -> Latency:
    """Median milliseconds for one test batch, with the adapters beside the weights and merged into them."""
    count = min(setup.params.eval_batch_size, len(setup.task.test))
    batch = setup.task.eval_collator([setup.task.test[index] for index in range(count)])
    batch = {name: value.to(setup.model.device) for name, value in batch.items() if name != "labels"}
    repeats = setup.params.latency_repeats
    unmerged = latency.inference_latency(setup.model, batch, repeats)
    merged = None
    if setup.params.method not in ("head", "full"):
        with adapters.merged(setup.model):
            merged = latency.inference_latency(setup.model, batch, repeats)
    return Latency(batch_size=count, tokens=batch["input_ids"].numel(), unmerged_ms=unmerged, merged_ms=merged)


# surroundings --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _output_folder(run_dir: str) -> Iterator[str]:
    """The run's folder, or one that is gone afterwards."""
    if run_dir:
        if Path(run_dir).exists() and not Path(run_dir).is_dir():
            raise CheckpointError(f"run_dir={run_dir!r}: is a file, must be a folder")
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        yield run_dir
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield folder


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM (a batch system's stop) end a run as Ctrl-C does: with its record written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
