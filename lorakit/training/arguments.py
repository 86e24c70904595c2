"""The run's parameters in the words of `transformers.TrainingArguments`."""

import os
from datetime import timedelta

import torch
from accelerate.state import AcceleratorState, PartialState
from transformers import Trainer, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.training_args import OptimizerNames
from transformers.utils import is_torch_bf16_gpu_available, is_torch_tf32_available

from lorakit.errors import ParameterError, require
from lorakit.params import Params

NO_LIMIT = 10**9  # steps: the budget ends the run, not a count of steps


def training_arguments(params: Params, output_dir: str) -> TrainingArguments:
    """TrainingArguments with the Trainer's own evaluation, saving and logging schedules off: the budget drives them.

    Raises:
        ParameterError: a precision, optimizer or report_to this machine does not have.
    """
    on_cuda = torch.cuda.is_available()
    require(params.precision != "fp16" or on_cuda, "precision", params.precision, "fp16 needs CUDA; use bf16 or fp32")
    usable = params.precision != "bf16" or not on_cuda or is_torch_bf16_gpu_available()
    require(usable, "precision", params.precision, "this GPU has no bf16; use fp32 or fp16")
    reports = [name.strip() for name in params.report_to.split(",") if name.strip() not in ("", "none")]
    known = ["all", *get_available_reporting_integrations()]
    allowed = f"must be none or, of what is installed here, {', '.join(known)}"
    require(not {*reports} - {*known}, "report_to", params.report_to, allowed)
    require(not reports or params.run_dir, "run_dir", params.run_dir, "is needed where report_to writes its logs")
    # the order of a stream with redundancy is the experiment
    sampling = "sequential" if params.redundancy else "group_by_length" if params.group_by_length else "random"
    waited = os.environ.get("LORAKIT_TIMEOUT") or "1800"
    require(waited.isdecimal() and 0 < int(waited) < 10**9, "LORAKIT_TIMEOUT", waited, "seconds to wait for the others")
    if not on_cuda:  # where the Trainer tells its process group no timeout
        AcceleratorState._reset_state(reset_partial_state=True)  # as it does: what there is would be kept, as it is
        PartialState(cpu=True, timeout=timedelta(seconds=int(waited)))
    alike = ("learning_rate", "weight_decay", "max_grad_norm", "seed", "dataloader_num_workers")
    arguments = TrainingArguments(
        output_dir=output_dir,
        max_steps=NO_LIMIT,
        per_device_train_batch_size=params.batch_size,
        per_device_eval_batch_size=params.eval_batch_size,
        gradient_accumulation_steps=params.gradient_accumulation,
        use_cpu=not on_cuda,
        bf16=params.precision == "bf16",
        fp16=params.precision == "fp16",
        tf32=True if params.tf32 and is_torch_tf32_available() else None,
        activation_checkpointing=params.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        train_sampling_strategy=sampling,
        data_seed=params.seed,
        logging_strategy="no",
        save_strategy="no",
        eval_on_start=params.evaluate_first,
        logging_nan_inf_filter=False,
        report_to=reports,
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_timeout=int(waited),
        ddp_find_unused_parameters=params.skip != "none",  # a skipped adapter takes no part in the backward
        dataloader_pin_memory=on_cuda,
        **{name: getattr(params, name) for name in alike},
    )
    if why := _lacking(arguments, params.optimizer):
        usable = [name.value for name in OptimizerNames if not _lacking(arguments, name.value)]
        raise ParameterError("optimizer", params.optimizer, f"{why}; there are {', '.join(usable)}")
    arguments.optim = OptimizerNames(params.optimizer)
    return arguments


def _lacking(arguments: TrainingArguments, optimizer: str) -> str:
    """Ask for the optimizer of that name: why the Trainer cannot build it here; empty if it can."""
    try:
        arguments.optim = optimizer
        Trainer.get_optimizer_cls_and_kwargs(arguments, torch.nn.Linear(1, 1))
    except (ImportError, ValueError, RuntimeError) as error:
        known = optimizer in [name.value for name in OptimizerNames]
        return " ".join(str(error).split())[:200] if known else "there is no optimizer of this name"
    return ""
