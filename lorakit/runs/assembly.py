"""From parameters to everything a run works on: model, task, adapter, what acts between steps, trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from lorakit import adapters, models, tasks
from lorakit.adapters.attach import ALPHA
from lorakit.errors import require
from lorakit.gates import GATES, GateSettings, build_gate
from lorakit.measure import environment
from lorakit.params import Params
from lorakit.records import Record
from lorakit.tokens import build_tokens

if TYPE_CHECKING:
    from lorakit.seams import Controller, Gate, TokenSelection
    from lorakit.training import BudgetTrainer

# Parameters that may change between a checkpoint and its resumption without changing a single weight.
_FREE_TO_CHANGE = {
    *("record", "run_dir", "resume", "report_to", "data_dir", "latency_repeats", "predict_memory", "save_steps"),
    *("exact_match_rows", "search_rates", "search_budget", "max_test", "setting", "row"),
}
SKIPPABLE = ("lora", "sparse", "peft")  # methods whose update is a term of its own, which can be measured and detached


@dataclass
class Assembled:
    """What a run works on."""

    params: Params
    model: torch.nn.Module
    tokenizer: Any
    task: Any
    loaded: Any
    redundant: Any = None  # (N,) bool, which of the stream's batches are redundant by design

    @property
    def notes(self) -> list[str]:
        """What a reader must know to read the run's numbers right."""
        noted = optimizer_note(self.params.optimizer, self.model.device.type)
        return [*self.loaded.notes, *self.task.notes, *([noted] if noted else [])]


def check(params: Params, given: Mapping[str, Any]) -> None:
    """Refuse what one parameter alone cannot show to be wrong.

    Raises:
        ParameterError: a method that does not exist, or parameters that contradict each other.
    """
    method = params.method
    require(method in adapters.methods(), "method", method, f"must be one of {', '.join(adapters.methods())}")
    if method == "hira":
        untouched = given.get("alpha", ALPHA) == ALPHA  # a notebook's parameters name every default
        require(untouched, "alpha", params.alpha, "HiRA has no alpha: leave it out")
    for name in ("peft_type", "peft_options"):
        value = getattr(params, name)
        require(method == "peft" or not value, name, value, f"is for method 'peft', not {method!r}")
    nf4 = params.quantize != "none"
    require(not nf4 or method != "full", "quantize", params.quantize, "4-bit weights cannot be trained: method 'full'")
    require(
        not nf4 or params.precision != "fp16", "precision", params.precision, "fp16 diverges on NF4; use bf16 or fp32"
    )
    skips = params.skip != "none"
    require(not skips or method in SKIPPABLE, "skip", params.skip, f"needs a method of {', '.join(SKIPPABLE)}")
    _check_gate(params)
    params.gating.check(params.precision, params.gradient_checkpointing, skips)
    if method == "sparse":
        # the best weights by validation loss may be from before the pruning
        require(params.select == "last", "select", params.select, "must be 'last' for a method that prunes on the way")


def _check_gate(params: Params) -> None:
    require(params.gate in GATES, "gate", params.gate, f"must be one of {', '.join(GATES)}")
    gated = params.gate != "none"
    require(
        not gated or params.precision != "fp16",
        "precision",
        params.precision,
        "fp16's gradient scaler needs a backward every step, a gate leaves some out; use bf16 or fp32",
    )
    m, k = params.gate_m, params.gate_k
    require(m & (m - 1) == 0, "gate_m", m, "must be a power of two")
    require(k < m, "gate_k", k, f"must be below gate_m={m}")
    rows = params.gate_rows
    require(rows == 0 or k < rows <= m, "gate_rows", rows, f"must be 0, or above gate_k={k} and at most gate_m={m}")


def assemble(params: Params) -> Assembled:
    """Model, task and what is trained. Everything random is drawn from the run's seed."""
    from transformers import set_seed

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
    task, redundant = _redundant(params, task, loaded.tokenizer) if params.redundancy else (task, None)
    return Assembled(params, _adapted(params, loaded.model), loaded.tokenizer, task, loaded, redundant)


def _redundant(params: Params, task: Any, tokenizer: Any) -> tuple[Any, Any]:
    """The task with a stream whose share of redundant batches is known for training rows; which they are, (N,) bool."""
    from lorakit.tasks.redundancy import redundant_stream

    stream, redundant = redundant_stream(
        task.train,
        share=params.redundancy,
        kind=params.redundancy_kind,
        batch_size=params.batch_size * params.gradient_accumulation,
        pool=params.redundancy_pool,
        seed=params.seed,
        special=set(tokenizer.all_special_ids),
    )
    return replace(task, train=stream), redundant


def _gate(params: Params, model: torch.nn.Module, kind: str) -> Gate:
    settings = GateSettings(
        name=params.gate,
        rate=params.gate_rate,
        beta=params.gate_beta,
        burn_in=params.gate_burn_in,
        ema=params.gate_ema,
        m=params.gate_m,
        k=params.gate_k,
        rows=params.gate_rows,
        topk=params.gate_topk,
        refresh=params.gate_refresh,
        decay=params.gate_decay,
        leverage=params.gate_leverage,
    )
    return build_gate(settings, model, kind, seed=params.seed)


def _adapted(params: Params, model: torch.nn.Module) -> torch.nn.Module:
    """`model` on the base and with the adapter asked for."""
    if params.quantize == "nf4":
        adapters.quantize_nf4(model, double_quant=params.double_quant)
    steps = params.budget_unit in ("steps", "accepted_steps")
    return adapters.attach(
        model,
        params.method,
        rank=params.rank,
        alpha=None if params.method == "hira" else params.alpha,
        dropout=params.dropout,
        target_modules=params.target_modules,
        init=params.init,
        rslora=params.rslora,
        seed=params.seed,
        peft_type=params.peft_type,
        peft_options=params.peft_options,
        total_steps=int(params.budget) if steps else None,
    )


def _controllers(params: Params, model: torch.nn.Module) -> list[Controller]:
    """What acts between the steps."""
    found: list[Controller] = []
    if params.method == "sparse":
        from lorakit.adapters.sparsify import Sparsifier

        found.append(
            Sparsifier(
                model,
                adapters.SparseSettings(
                    kind=params.sparsify,
                    sparsity=params.sparsity,
                    factors=params.sparse_factors,
                    start=params.prune_start,
                    end=params.prune_end,
                    l1=params.l1,
                ),
            )
        )
    if params.method == "peft":
        from lorakit.adapters.peft.schedule import PeftSchedule

        found.append(PeftSchedule(model))
    if params.skip != "none":
        from lorakit.skip.choice import SkipSettings
        from lorakit.skip.controller import SkipLoRA

        found.append(
            SkipLoRA(
                model,
                SkipSettings(
                    mode=params.skip,
                    decide=params.skip_decide,
                    threshold=params.skip_threshold,
                    share=params.skip_share,
                    warmup=params.skip_warmup,
                    min_active=params.skip_min_active,
                    explore=params.skip_explore,
                    ema=params.skip_ema,
                    measure_every=params.skip_measure_every,
                ),
                seed=params.seed,
            )
        )
    return found


def optimizer_note(name: str, device: str) -> str | None:
    """What a record must say of an optimizer that cannot do here what its name promises; None where it can."""
    if name.startswith("paged_") and device != "cuda":
        return f"optimizer {name!r}: nothing pages on {device}; its state stays in memory, unpaged"
    return None


def tokens_of(assembled: Assembled, rank: int = 0) -> TokenSelection:
    """Which tokens get a backward."""
    params = assembled.params
    return build_tokens(params.gating, assembled.model, assembled.task.kind, seed=params.seed, rank=rank)


def fingerprints(assembled: Assembled) -> dict[str, Any]:
    """What data, model and code the run is about."""
    return {
        "data": dict(assembled.task.files),
        "data_source": assembled.task.source,
        "model": assembled.loaded.fingerprint,
        "model_source": assembled.loaded.source,
        "code": environment.code_fingerprint(),
    }


def build_trainer(assembled: Assembled, record: Record, folder: str) -> BudgetTrainer:
    """The trainer of the run that `record` is about, working in `folder`."""
    from lorakit.training import Budget, BudgetTrainer, Schedule
    from lorakit.training.arguments import training_arguments

    params, task = assembled.params, assembled.task
    args = training_arguments(params, folder)
    identity = {name: value for name, value in record.resolved.items() if name not in _FREE_TO_CHANGE}
    return BudgetTrainer(
        model=assembled.model,
        args=args,
        train_dataset=task.train,
        eval_dataset=task.validation,
        data_collator=task.collator,
        eval_collator=task.eval_collator,
        compute_metrics=lambda prediction: task.metrics(prediction.predictions),
        processing_class=assembled.tokenizer,
        kind=task.kind,
        budget=Budget(params.budget, params.budget_unit),
        schedule=Schedule(params.schedule, params.warmup),
        gate=_gate(params, assembled.model, task.kind),
        tokens=tokens_of(assembled, rank=args.process_index),
        controllers=_controllers(params, assembled.model),
        identity=identity | {key: record.fingerprints.get(key) for key in ("data", "model")},
        evaluations=params.evaluations,
        save_steps=params.save_steps if params.run_dir else 0,
        keep_best=params.select == "best",
        title=f"{params.setting}/{record.method} s{params.seed}",
    )
