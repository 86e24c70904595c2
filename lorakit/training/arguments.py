"""The run's parameters in the words of `transformers.TrainingArguments`."""

import torch
from transformers import TrainingArguments

from lorakit.errors import ParameterError, require
from lorakit.params import Params

NO_LIMIT = 10**9  # steps: the budget ends the run, not a count of steps


def training_arguments(params: Params, output_dir: str) -> TrainingArguments:
    """TrainingArguments with the Trainer's own evaluation, saving and logging schedules off: the budget drives them.

    Raises:
        ParameterError: a precision, tf32, optimizer or report_to this machine does not have.
    """
    on_cuda = torch.cuda.is_available()
    require(params.precision != "fp16" or on_cuda, "precision", params.precision, "fp16 needs CUDA; use bf16 or fp32")
    require(not params.tf32 or on_cuda, "tf32", params.tf32, "needs a CUDA GPU")
    reports = [name.strip() for name in params.report_to.split(",") if name.strip() not in ("", "none")]
    require(not reports or params.run_dir != "", "run_dir", params.run_dir, "is needed where report_to writes its logs")
    sampling = "group_by_length" if params.group_by_length else "random"
    if params.redundancy:
        sampling = "sequential"  # the stream's order is the experiment
    try:
        return TrainingArguments(
            output_dir=output_dir,
            max_steps=NO_LIMIT,
            per_device_train_batch_size=params.batch_size,
            per_device_eval_batch_size=params.eval_batch_size,
            gradient_accumulation_steps=params.gradient_accumulation,
            learning_rate=params.learning_rate,
            weight_decay=params.weight_decay,
            max_grad_norm=params.max_grad_norm,
            optim=params.optimizer,
            use_cpu=not on_cuda,
            bf16=params.precision == "bf16",
            fp16=params.precision == "fp16",
            tf32=True if params.tf32 else None,
            activation_checkpointing=params.gradient_checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False} if params.gradient_checkpointing else None,
            train_sampling_strategy=sampling,
            seed=params.seed,
            data_seed=params.seed,
            logging_strategy="no",
            eval_strategy="no",
            save_strategy="no",
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            report_to=reports or "none",
            remove_unused_columns=False,
            label_names=["labels"],
            ddp_find_unused_parameters=params.skip != "none",  # a skipped adapter takes no part in the backward
            dataloader_pin_memory=on_cuda,
        )
    except ValueError as error:
        for name in ("optimizer", "precision", "tf32"):
            word = {"optimizer": "OptimizerNames"}.get(name, name)
            if word in str(error):
                raise ParameterError(name, getattr(params, name), str(error)) from None
        raise
