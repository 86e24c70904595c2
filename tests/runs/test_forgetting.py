"""What a base unlearns while it learns something else: its loss of other text, before and after."""

from __future__ import annotations

import pytest
import torch

import lorakit
from lorakit import models, tasks
from lorakit.errors import ParameterError

QUICK = {
    **{"model": "toy-decoder", "task": "toy-instruct", "budget": 6, "evaluations": 2, "batch_size": 4, "rank": 2},
    **{"max_train": 64, "max_validation": 32, "max_test": 8, "max_length": 160, "eval_batch_size": 8},
    **{"latency_repeats": 0, "predict_memory": False},
}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_was_forgotten_is_the_rise_of_the_base_s_own_loss(method):
    """Against Transformers' own loss of the untrained model; and it changes nothing of the run."""
    given = QUICK | {"method": method}
    record = lorakit.run(given | {"forgetting": "toy-stories"})
    found = record.details["forgetting"]
    assert (found["task"], found["rows"]) == ("toy-stories", 8)
    assert record.final["test"]["forgetting"] == found["trained"] - found["base"] != 0
    loaded = models.load("toy-decoder", "causal")
    task = tasks.load("toy-stories", loaded.tokenizer, kind_of_model="decoder", max_length=160, max_test=8)
    summed = count = 0
    for row in task.test:
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        with torch.no_grad():
            predicted = int((labels[:, 1:] != -100).sum())
            summed += float(loaded.model(ids, labels=labels).loss) * predicted
        count += predicted
    assert found["base"] == pytest.approx(summed / count, rel=1e-5)
    plain = lorakit.run(given)
    assert [point.train_loss for point in plain.curve] == [point.train_loss for point in record.curve]
    assert plain.final["test"].items() <= record.final["test"].items() and "forgetting" not in plain.details


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (
            {"model": "toy-encoder", "task": "toy-reviews"},
            "'toy-stories': must be, in a causal language model's run, one of ",
        ),
        ({"forgetting": "toy-reviews"}, "'toy-reviews': must be, .*, one of wikitext2, .*toy-stories"),
        ({"forgetting": "stories"}, "'stories': must be, .*toy-stories"),
    ],
)
def test_text_that_cannot_tell_is_refused_before_training(changed, says, monkeypatch):
    monkeypatch.setattr("lorakit.runs.experiment.train", None)
    with pytest.raises(ParameterError, match=f"^forgetting={says}"):
        lorakit.run(QUICK | {"forgetting": "toy-stories"} | changed)
