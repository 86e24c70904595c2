"""A run's parameters in the words of TrainingArguments, and what of them a machine has."""

from __future__ import annotations

from datetime import timedelta

import pytest

from lorakit.errors import ParameterError
from lorakit.params import Params
from lorakit.training import arguments
from lorakit.training.arguments import training_arguments

GIVEN = {
    "batch_size": 3, "eval_batch_size": 5, "gradient_accumulation": 7, "learning_rate": 0.25, "weight_decay": 0.125,
    "max_grad_norm": 2.5, "precision": "bf16", "gradient_checkpointing": True, "seed": 11, "optimizer": "sgd",
    "report_to": " tensorboard, none,", "run_dir": "here", "skip": "prefix",
}  # fmt: skip
TOLD = {
    "output_dir": "there", "max_steps": 1_000_000_000, "per_device_train_batch_size": 3,
    "per_device_eval_batch_size": 5, "gradient_accumulation_steps": 7,
    "learning_rate": 0.25, "weight_decay": 0.125, "max_grad_norm": 2.5,
    "use_cpu": True, "bf16": True, "fp16": False, "tf32": None, "activation_checkpointing": True,
    "activation_checkpointing_kwargs": {"use_reentrant": False}, "train_sampling_strategy": "random", "seed": 11,
    "data_seed": 11, "logging_strategy": "no", "eval_strategy": "no", "save_strategy": "no",
    "logging_nan_inf_filter": False, "report_to": ["tensorboard"], "remove_unused_columns": False,
    "label_names": ["labels"], "ddp_timeout": 7, "ddp_find_unused_parameters": True, "dataloader_pin_memory": False,
    "optim": "sgd",
}  # fmt: skip


@pytest.fixture
def cpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def test_each_parameter_is_told_under_the_trainers_name(monkeypatch, cpu):
    seen = []
    monkeypatch.setenv("LORAKIT_TIMEOUT", "7")
    monkeypatch.setattr(arguments, "PartialState", lambda **given: seen.append(given))
    made = training_arguments(Params(**GIVEN), "there")
    assert {name: getattr(made, name) for name in TOLD} == TOLD
    assert seen == [{"cpu": True, "timeout": timedelta(seconds=7)}]


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [({"report_to": "none"}, "report_to", []), ({"skip": "none"}, "ddp_find_unused_parameters", False),
     ({"gradient_checkpointing": False}, "activation_checkpointing", False), ({"precision": "fp32"}, "bf16", False),
     ({"group_by_length": True}, "train_sampling_strategy", "group_by_length"),
     ({"redundancy": 0.5}, "train_sampling_strategy", "sequential"), ({}, "ddp_timeout", 1)],
)  # fmt: skip
def test_another_value_is_another_argument(monkeypatch, cpu, given, name, value):
    monkeypatch.setenv("LORAKIT_TIMEOUT", "1")
    assert getattr(training_arguments(Params(**GIVEN | given), "there"), name) == value


def test_half_an_hour_is_waited_for_the_others(monkeypatch, cpu):
    monkeypatch.delenv("LORAKIT_TIMEOUT", raising=False)
    assert training_arguments(Params(), "there").ddp_timeout == 1800


@pytest.mark.parametrize(
    ("precision", "has", "refused"),
    [("bf16", False, "precision"), ("bf16", True, "report_to"), ("fp16", False, "report_to"),
     ("fp32", False, "report_to")],
)  # fmt: skip
def test_a_gpus_precision_is_refused_only_where_it_lacks_it(monkeypatch, precision, has, refused):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(arguments, "is_torch_bf16_gpu_available", lambda: has)
    with pytest.raises(ParameterError, match=f"^{refused}="):
        training_arguments(Params(precision=precision, report_to="nobody"), "there")


@pytest.mark.parametrize("asked", [True, False])
def test_tf32_is_asked_for_where_there_is_any(monkeypatch, cpu, asked):
    enabled = []
    for module in ("lorakit.training.arguments", "transformers.training_args"):
        monkeypatch.setattr(f"{module}.is_torch_tf32_available", lambda: True)
    monkeypatch.setattr("transformers.training_args.enable_tf32", enabled.append)
    assert training_arguments(Params(tf32=asked, precision="fp32"), "there").tf32 is (True if asked else None)
    assert any(enabled) == asked


def test_everything_that_is_installed_may_report(cpu):
    known = set(training_arguments(Params(report_to="all", run_dir="here"), "there").report_to)
    assert "tensorboard" in known and "all" not in known
