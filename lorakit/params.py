"""Every parameter of a run, its type and its default: the defaults are the toy run that ends in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lorakit.errors import LorakitError, ParameterError
from lorakit.gating import Gating

BudgetUnit = Literal["accepted_steps", "steps", "tokens", "flops", "seconds"]


class Params(BaseModel):
    """What a run is told. Notebook parameter cells, params files and `lorakit train` all speak these names."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())

    # which run this is
    setting: str = "toy"
    method: str = "lora"  # what is trained: lora | sparse | hira | peft (any, by peft_type) | head (only) | full
    row: str = ""  # the run's name in tables and figures; empty: made from what is switched on
    seed: int = Field(0, ge=0)
    record: str = ""  # file the record is written to; empty: none is written
    run_dir: str = ""  # folder for checkpoints and the adapter; empty: none is kept
    resume: bool = True  # go on from the newest checkpoint in run_dir

    # model and data
    model: str = "toy-encoder"
    task: str = "toy-reviews"
    data_dir: str = ""  # folder with the task's files; empty: LORAKIT_DATA, else the hub or the package
    max_length: int = Field(96, ge=2)  # tokens a sequence may have
    max_train: int = Field(0, ge=0)  # rows; 0: all
    max_validation: int = Field(0, ge=0)
    max_test: int = Field(0, ge=0)
    packing: bool = False  # chat tasks: several conversations a row, never attending across them
    group_by_length: bool = False

    # how the frozen base is kept
    quantize: Literal["none", "nf4"] = "none"  # nf4: linear layers in 4 bits (QLoRA)
    double_quant: bool = True  # nf4: the blocks' scales in 8 bits

    # what is trained
    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0)  # HiRA has none
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"  # names, a regex, or "all-linear"
    init: Literal["kaiming", "gaussian"] = "kaiming"
    rslora: bool = False
    peft_type: str = ""  # method peft: DORA, ADALORA, VERA, …
    peft_options: dict[str, Any] = {}  # method peft: fields of its config
    sparsify: Literal["magnitude", "l1", "structured"] = "magnitude"  # method sparse
    sparsity: float = Field(0.5, ge=0, lt=1)  # share of zeros (structured: of ranks removed) at the end
    sparse_factors: Literal["both", "A", "B"] = "both"
    prune_start: float = Field(0.2, ge=0, lt=1)  # shares of the budget between which the zeros appear
    prune_end: float = Field(0.8, gt=0, le=1)
    l1: float = Field(0.0, ge=0)  # sparsify l1: the penalty; 0: found while training, from `sparsity`

    # which layers get a backward
    skip: Literal["none", "adapter", "prefix"] = "none"  # SkipLoRA
    skip_decide: Literal["ema", "forward"] = "ema"
    skip_threshold: float = Field(0.05, ge=0)  # an adapter whose ‖Δh‖/‖h‖ is below it is skipped
    skip_share: float = Field(0.0, ge=0, lt=1)  # of adapters to skip, by an adaptive threshold; 0: the fixed one
    skip_warmup: float = Field(0.1, ge=0, lt=1)  # share of the budget before the first skip
    skip_min_active: int = Field(1, ge=1)
    skip_explore: float = Field(0.05, ge=0, le=1)  # chance of what would be skipped to be trained all the same
    skip_ema: float = Field(0.2, gt=0, le=1)  # weight of the newest measurement
    skip_measure_every: int = Field(4, ge=1)  # steps between measurements, where decided from the average

    # which batches get a backward
    gate: str = "none"  # none | random | loss_floor | gradient_norm | novelty (SLoRA) | novelty_loss | least_novel
    gate_rate: float = Field(0.3, gt=0, lt=1)  # share of batches to accept
    gate_burn_in: int = Field(20, ge=0)  # batches at the start that are all accepted
    gate_beta: float = Field(10.0, gt=0)  # steepness of the decision, per spread of the score
    gate_ema: float = Field(0.05, gt=0, le=1)  # weight of the newest batch in the running averages
    gate_m: int = Field(512, ge=2)  # size of the sketch, a power of two
    gate_k: int = Field(64, ge=1)  # rank of the basis
    gate_rows: int = Field(0, ge=0)  # rows Frequent Directions keeps; 0: twice the rank
    gate_topk: int = Field(64, ge=0)  # logits kept of each error; 0: all
    gate_refresh: int = Field(4, ge=1)  # accepted batches between refreshes of the basis
    gate_decay: float = Field(1.0, gt=0, le=1)  # forgetting of old batches, per accepted batch; 1: none
    gate_leverage: bool = False  # ridge-leverage novelty

    # which tokens get a backward: FLoRA; see lorakit.gating for its keys
    gating: Gating = Gating()

    # the stream of training batches, for asking when a gate pays
    redundancy: float = Field(0.0, ge=0, lt=1)  # share of redundant batches
    redundancy_kind: Literal["repeat", "near", "cluster"] = "repeat"
    redundancy_pool: int = Field(64, ge=1)  # rows that are repeated

    # training
    learning_rate: float = Field(4.0e-3, gt=0)
    batch_size: int = Field(16, ge=1)
    gradient_accumulation: int = Field(1, ge=1)
    budget: float = Field(60, ge=1)
    budget_unit: BudgetUnit = "accepted_steps"
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = Field(0.05, ge=0, lt=1)  # share of the budget
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    optimizer: str = "adamw_torch"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of autocast; weights stay as loaded
    dtype: Literal["fp32", "bf16", "auto"] = "fp32"  # of the loaded weights
    attention: Literal["sdpa", "eager"] = "sdpa"
    gradient_checkpointing: bool = False
    tf32: bool = False
    report_to: str = "none"  # comma-separated: tensorboard, wandb, trackio, …

    # evaluation and records
    evaluations: int = Field(6, ge=1)  # on validation data, spread evenly over the budget
    eval_batch_size: int = Field(64, ge=1)
    select: Literal["last", "best"] = "last"  # the final model; best: by validation loss, never by test
    exact_match_rows: int = Field(0, ge=0)  # chat tasks: GSM8K-style answers generated at the end
    save_steps: int = Field(0, ge=0)  # steps between checkpoints; 0: none
    latency_repeats: int = Field(10, ge=0)  # inference timings; 0: none
    predict_memory: bool = True

    # learning-rate search (`lorakit search`)
    search_rates: list[Annotated[float, Field(gt=0)]] = []
    search_budget: float = Field(60, ge=1)


NESTED = {"gating": Gating}  # parameters that are mappings with keys of their own, merged key by key


def merge(first: dict[str, Any], then: dict[str, Any]) -> dict[str, Any]:
    """`first` with the values of `then` where both have one; mappings of NESTED are merged themselves."""
    joined = first | then
    for name in NESTED:
        if isinstance(first.get(name), dict) and isinstance(then.get(name), dict):
            joined[name] = first[name] | then[name]
    return joined


def resolve(given: dict[str, Any]) -> Params:
    """Validate `given`, filling in defaults.

    Raises:
        ParameterError: naming the first offending key, its value and what is allowed.
    """
    try:
        return Params(**given)
    except ValidationError as error:
        raise _explained(error.errors()[0], given) from None


def _explained(problem: dict[str, Any], given: dict[str, Any]) -> ParameterError:
    path = [str(part) for part in problem["loc"]] if problem["loc"][0] in NESTED else [str(problem["loc"][0])]
    name, value = ".".join(path), given.get(path[0])
    if len(path) > 1 and isinstance(value, dict):
        value = value.get(path[1])
    if problem["type"] == "extra_forbidden":
        known = NESTED[path[0]].model_fields if len(path) > 1 else Params.model_fields
        return ParameterError(name, value, f"unknown parameter; known are {', '.join(known)}")
    allowed = problem["msg"]
    if isinstance(value, str) and _is_number(value):
        allowed += f"; it is a string: YAML reads 1e-4 as text, write {float(value):.1e} with a dot and no quotes"
    return ParameterError(name, value, allowed)


def _is_number(text: str) -> bool:
    try:
        return float(text) == float(text)
    except ValueError:
        return False


def collect(namespace: dict[str, Any]) -> dict[str, Any]:
    """The parameters among a notebook's `globals()`, for `lorakit.run`."""
    return {name: namespace[name] for name in Params.model_fields if name in namespace}


def read_files(paths: list[str | Path]) -> dict[str, Any]:
    """Merge YAML params files, later files winning.

    Raises:
        ParameterError: a file is missing or is not a mapping of names to values.
    """
    import yaml

    merged: dict[str, Any] = {}
    for path in map(Path, paths):
        if not path.is_file():
            raise ParameterError("-f", str(path), "no such params file")
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise LorakitError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
        values = {} if values is None else values
        if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
            raise ParameterError("-f", str(path), "must be a mapping of parameter names to values")
        merged = merge(merged, values)
    return merged


def given(files: list[str | Path], overrides: list[str]) -> dict[str, Any]:
    """Params files and what was typed after `-p`, later ones winning; see `read_files`, `parse_override`."""
    merged = read_files(files)
    for name, value in map(parse_override, overrides):
        merged = merge(merged, {name: value})
    return merged


def parse_override(text: str) -> tuple[str, Any]:
    """`name=value` as typed after `-p`; the value is read as YAML, so types are the parameter's own.

    `gating.mode=gather` is one key of the mapping `gating`; to be joined by `merge`.
    """
    import yaml

    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ParameterError("-p", text, "must be name=value")
    try:
        read = yaml.safe_load(value) if value else ""
        outer, dot, inner = name.partition(".")
        return (outer, {inner: read}) if dot and outer in NESTED else (name, read)
    except yaml.YAMLError as error:
        raise ParameterError("-p", text, f"the value is not YAML: {' '.join(str(error).split())}") from None
