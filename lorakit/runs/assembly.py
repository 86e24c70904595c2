"""From parameters to everything a run works on: model, task, adapter, what acts between steps, trainer."""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from accelerate.state import PartialState
from transformers.utils import is_torch_tf32_available

from lorakit import adapters, assets, models, tasks
from lorakit.adapters.peft.config import build_config
from lorakit.base.quantize import quantisable
from lorakit.errors import require
from lorakit.fields import FREE, LARGEST, flagged
from lorakit.gates import GATES, build_gate, candidates
from lorakit.measure import environment
from lorakit.modules import resolve_trainable
from lorakit.params import Params
from lorakit.params import check as refuse
from lorakit.records import Record
from lorakit.settings import OWN, AdapterSettings, DataSettings
from lorakit.skip import cache
from lorakit.skip.controller import SkipLoRA
from lorakit.tasks.collate import require_apart
from lorakit.tasks.redundancy import redundant_stream
from lorakit.tasks.task import SPLITS
from lorakit.tokens import build_tokens
from lorakit.tokens.fractional import drops_out
from lorakit.training import Budget, BudgetTrainer, Schedule
from lorakit.training.arguments import training_arguments


class Assembled(NamedTuple):
    """What a run works on."""

    params: Params
    model: torch.nn.Module
    tokenizer: Any
    task: Any
    loaded: Any
    redundant: Any = None  # (N,) bool, which of the stream's batches (or, with a gate of examples, rows) are, by design
    elsewhere: Any = None  # the task that tells what was forgotten

    @property
    def notes(self) -> list[str]:
        """What a reader must know to read the run's numbers right."""
        noted, name, device = [*self.loaded.notes, *self.task.notes], self.params.optimizer, self.model.device.type
        if name.startswith("paged_") and device != "cuda":
            noted.append(f"optimizer {name!r}: nothing pages on {device}; its state stays in memory, unpaged")
        if self.params.tf32 and not is_torch_tf32_available():
            noted.append("tf32: not on this device; float32 is whole")
        if self.params.budget_unit == "epochs":
            steps, rows = budget_of(self.params, len(self.task.train)).steps(), len(self.task.train)
            noted.append(f"budget: {self.params.budget:g} epochs of {rows} rows are {steps:.0f} accepted steps")
        if self.params.attention == "flash_attention_2":
            noted.append("FLOPs: those inside flash attention are not counted")
        if "loss" in self.params.model_fields_set and self.task.kind == "classify":
            noted.append(f"loss {self.params.loss!r}: a classifier's is its own, of all its logits")
        return noted


def check(params: Params) -> None:
    """Refuse what one parameter alone cannot show to be wrong.

    Raises:
        ParameterError: a method or a gate that does not exist, or parameters that contradict each other.
    """
    for name, known in (("method", adapters.methods()), ("gate", GATES)):
        value = getattr(params, name)
        require(value in known, name, value, f"must be one of {', '.join(known)}")
    refuse(params)


def assemble(params: Params, dataset: Any = None) -> Assembled:
    """Model, task and what is trained, of `dataset` where there is one. Everything random is drawn from the seed."""
    from transformers import set_seed

    training_arguments(params, params.run_dir or ".")  # what this machine lacks is told before anything is loaded
    kind = tasks.kind(params.task, family := models.family(params.model))
    penalised = kind != "classify" and params.peft_type.upper() == "ADALORA" and params.loss != "nll"
    require(not penalised, "loss", params.loss, "AdaLoRA adds its penalty to the model's own loss: 'nll'")
    _try_outline(params, kind)
    set_seed(params.seed)
    # before a model is fetched that nothing could be done with
    text = tasks.read(params.task, params.data_files, params, dataset)
    asked = {name: getattr(params, name) for name in ("dtype", "attention", "seed", "base_dropout")}
    loaded = models.load(params.model, kind, classes=text[0].classes, **asked)
    if kind == "classify":  # as the first training step would say, which a run resumed at its end has none of
        loaded.model.config.problem_type = "single_label_classification"
    asked = dict(DataSettings.of(params)) | {"seed": params.seed}
    task = tasks.load(params.task, loaded.tokenizer, kind_of_model=family, text=text, **asked)
    rows, lacking = params.exact_match_rows, f"task {params.task!r} has no answers to generate and compare"
    require(not rows or task.kind == "causal" and bool(task.answers), "exact_match_rows", rows, lacking)
    elsewhere = None
    if params.forgetting:
        causal = [name for name in tasks.NAMES if name not in OWN and tasks.kind(name, "decoder") == "causal"]
        told = f"must be, in a causal language model's run, one of {', '.join(causal)}"
        require(kind == "causal" and params.forgetting in causal, "forgetting", params.forgetting, told)
        asked |= {"data_files": "", "packing": False}
        elsewhere = tasks.load(params.forgetting, loaded.tokenizer, kind_of_model="decoder", **asked)
    if params.max_length > (room := models.positions(loaded.model)):
        parts = [getattr(task, split) for split in SPLITS] + ([elsewhere.test] if elsewhere else [])
        longest = 1 + max(max(row.get("position_ids", range(len(row["input_ids"])))) for rows in parts for row in rows)
        told = f"a row has {longest} tokens, the model {room} positions; must be at most that"
        require(longest <= room, "max_length", params.max_length, told)
    if params.packing:
        require_apart(loaded.model, task.train, task.collator)
    redundant = None
    if params.redundancy:  # a stream whose share of redundant batches is known, for training rows
        wanted = {"share": params.redundancy, "kind": params.redundancy_kind, "pool": params.redundancy_pool}
        window, special = params.batch_size * params.gradient_accumulation, set(loaded.tokenizer.all_special_ids)
        stream, redundant = redundant_stream(task.train, batch_size=window, seed=params.seed, special=special, **wanted)
        task = replace(task, train=stream)
        redundant = redundant.repeat(window if candidates(params) > 1 else 1)  # of what is decided about
    rows, needed = len(task.train), params.batch_size * candidates(params)
    told = f"{needed} rows of batch_size={params.batch_size} make one candidate batch, and training has {rows}"
    require(needed == params.batch_size or rows >= needed, "gate_candidates", params.gate_candidates, told)
    if params.quantize == "nf4":
        adapters.quantize_nf4(loaded.model, double_quant=params.double_quant)
    steps = int(budget_of(params, len(task.train)).steps() or 0) or None
    model = adapters.attach(loaded.model, seed=params.seed, total_steps=steps, **adapters.asked_of(params))
    return Assembled(params, model, loaded.tokenizer, task, loaded, redundant, elsewhere)


def _try_outline(params: Params, kind: str) -> None:
    """What adapter, 4 bits, attention or a choice of tokens make impossible is refused before data are read."""
    astray = params.attention == "flash_attention_2" and (params.packing or params.budget_unit == "flops")
    require(not astray, "attention", params.attention, "mixes packed rows, and its FLOPs are not counted")
    outline = models.outline(params.model, kind, params.attention)
    if params.quantize == "nf4":
        quantisable(outline)
    if params.method == "peft":  # some types read weights as they are attached
        build_config(outline, params, AdapterSettings.of(params), resolve_trainable(outline, "head"), LARGEST[int])
    else:
        outline = adapters.attach(outline, **adapters.asked_of(params))
    build_tokens(params.gating, outline, kind)


def budget_of(params: Params, rows: int) -> Budget:
    """What the run may spend; epochs are the accepted steps that so many passes over the training rows take, ungated.

    Steps are counted as the Trainer's `num_train_epochs` does: what is left of the rows is a step of its own.
    """
    if params.budget_unit != "epochs":
        return Budget(params.budget, params.budget_unit)
    batches = math.ceil(rows / (params.batch_size * PartialState().num_processes))
    return Budget(math.ceil(params.budget * math.ceil(batches / params.gradient_accumulation)))


def fingerprints(assembled: Assembled) -> dict[str, Any]:
    """What data, model and code the run is about."""
    task, loaded, elsewhere = assembled.task, assembled.loaded, assembled.elsewhere
    data = {"data": dict(task.files), "data_source": task.source}
    data |= {"rows": {split: len(getattr(task, split)) for split in SPLITS}}
    data |= {"forgetting": dict(elsewhere.files)} if elsewhere else {}
    return data | {"model": loaded.fingerprint, "model_source": loaded.source, "code": environment.code_fingerprint()}


def build_trainer(assembled: Assembled, record: Record, folder: str) -> BudgetTrainer:
    """The trainer of the run that `record` is about, working in `folder`."""
    params, task, model = assembled.params, assembled.task, assembled.model
    args = training_arguments(params, folder)
    args.per_device_train_batch_size *= candidates(params)
    controllers = model.lorakit_attachment.controllers(model, params)
    if params.skip != "none":
        controllers.append(SkipLoRA(model, settings=params, seed=params.seed))
        controllers[-1].measures = params.prefix_cache == "none"  # else its share alone says what is skipped
    if params.prefix_cache != "none":
        folder = assets.cache.root() / "prefix" if params.prefix_cache == "disk" else None
        require(task.kind != "masked", "prefix_cache", params.prefix_cache, "masks are drawn anew: no row comes twice")
        sums = params.gating.selective and params.gating.score == "updates"
        require(not sums, "prefix_cache", params.prefix_cache, "gating.score 'updates' looks at every layer")
        draws = params.skip != "none" and drops_out(model)  # of a prefix from the start on, its first batch tells
        require(not draws, "prefix_cache", params.prefix_cache, "with skip needs base_dropout false, and dropout 0")
        needed, free = cache.room(task.train["input_ids"], model, folder)
        told = f"its states take {needed / 2**30:.3g} GiB, of which {free / 2**30:.3g} are free"
        require(needed <= free, "prefix_cache", params.prefix_cache, told)
        record.notes.append(f"prefix_cache: {needed / 2**30:.3g} GiB at most, each row's states once")
        controllers.append(cache.PrefixCache(model, folder, f"{params.precision} {params.attention} {params.tf32}"))
    free = flagged(Params, FREE)
    identity = {name: value for name, value in record.resolved.items() if name not in free}
    trial = f" at {params.learning_rate:g}" * (record.kind == "lr_search")
    return BudgetTrainer(
        model=model, args=args, kind=task.kind, processing_class=assembled.tokenizer, controllers=controllers,
        train_dataset=task.train, eval_dataset=task.validation,
        data_collator=task.collator, eval_collator=task.eval_collator,
        compute_metrics=lambda prediction: task.metrics(prediction.predictions),
        budget=budget_of(params, len(task.train)), schedule=Schedule(params.schedule, params.warmup),
        gate=build_gate(params, model, task.kind, seed=params.seed),
        tokens=build_tokens(params.gating, model, task.kind, loss=params, seed=params.seed, rank=args.process_index),
        identity=identity | {key: record.fingerprints.get(key) for key in ("data", "model", "code")},
        evaluations=params.evaluations, save_steps=params.save_steps if params.run_dir else 0,
        keep_best=params.select == "best", title=f"{params.setting}/{record.method} s{params.seed}{trial}",
    )  # fmt: skip
