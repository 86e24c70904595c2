"""search(params) -> Record: every learning rate at the same small budget, compared on validation data."""

from pathlib import Path
from typing import Any

from lorakit import models, records, tasks
from lorakit.errors import require
from lorakit.fields import UNTRIED, flagged
from lorakit.params import Params, resolve
from lorakit.records import Record, SearchPoint
from lorakit.runs.experiment import attempt, new_record, train
from lorakit.settings import OWN


def search(given: dict[str, Any]) -> Record:
    """Try each of `params.search_rates` for `params.search_budget`, each fully decayed, and compare on validation data.

    A search that goes on where `params.record` holds an earlier one of the same run tries only the rates it lacks.

    Returns:
        A record of kind "lr_search"; the test split is never read. `best_rate` picks from it.
    """
    params = resolve(given)
    require(len(params.search_rates) > 0, "search_rates", params.search_rates, "must list the learning rates to try")
    spent, told = params.search_budget, "must be at least 1, but of epochs, of which at most the run's budget"
    require(spent <= params.budget if params.budget_unit == "epochs" else spent >= 1, "search_budget", spent, told)
    record = new_record(params, given)
    record.kind = "lr_search"
    known = _known(params, record)
    own = {"budget": params.search_budget, "evaluations": 1, "evaluate_first": False, "record": "", "run_dir": ""}
    try:
        for rate in params.search_rates:
            trial = params.model_copy(update=own | {"learning_rate": rate})
            record.search.append(known[rate] if rate in known else _try_rate(trial, record))
        record.status = "done"
    except KeyboardInterrupt:
        record.status, record.message = "interrupted", f"stopped after {len(record.search)} learning rates"
        raise
    finally:
        tried = [point.learning_rate for point in record.search]
        record.search += [known[rate] for rate in params.search_rates if rate in known and rate not in tried]
        if params.record and record.search:
            records.write(record, params.record)
    return record


def _known(params: Params, record: Record) -> dict[float, SearchPoint]:
    """Rate -> result of the search at `params.record`, where it was of the same run, in all but its list of rates."""
    if not params.record or not Path(params.record).is_file():
        return {}
    earlier = records.read(params.record)
    asked = {name: value for name, value in earlier.resolved.items() if name not in flagged(Params, UNTRIED)}
    if earlier.kind != "lr_search" or not asked.items() <= record.resolved.items():
        return {}
    told, model = earlier.fingerprints, params.model  # the files under a name may be others
    same = params.task not in OWN or tasks.read(params.task, params.data_files, params)[0].files == told.get("data")
    if not same or Path(model).expanduser().is_dir() and models.sources.resolve(model).fingerprint != told.get("model"):
        return {}
    record.fingerprints = earlier.fingerprints
    known = {point.learning_rate: point for point in earlier.search if point.status != "failed"}
    taken = [f"{rate:g}" for rate in params.search_rates if rate in known]
    if taken:
        record.notes.append(f"learning rates {', '.join(taken)} from the search started {earlier.started}")
    return known


def best_rate(record: Record) -> float:
    """The learning rate with the lowest validation loss among those that finished."""
    finished = [point for point in record.search if point.status == "done" and point.validation]
    require(bool(finished), "search_rates", [point.learning_rate for point in record.search], "none of them finished")
    return min(finished, key=lambda point: point.validation["loss"]).learning_rate


def _try_rate(params: Params, record: Record) -> SearchPoint:
    trial = new_record(params, {})
    trial.kind = record.kind
    tried = attempt(trial, params, lambda _, trainer: train(trainer, trial, params))
    record.notes += [note for note in trial.notes if note not in record.notes]
    record.fingerprints = trial.fingerprints
    if tried.stopped:
        raise tried.stopped
    chosen = tried.trainer.curve.chosen() if tried.trainer else None
    validation = chosen.validation if chosen and trial.status == "done" else None
    return SearchPoint(learning_rate=params.learning_rate, status=trial.status, validation=validation)
