"""Every default, range and quarrel of a run's parameters, once, by the question each class answers; without torch."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from lorakit.errors import require
from lorakit.fields import APART, FREE, LARGEST, UNTRIED, Idle, Place, Refusal, Settings, field

Share = Annotated[float, Field(ge=0, le=LARGEST[float])]
Rate = Annotated[float, Field(gt=0, le=LARGEST[float])]
Compares = Literal["", "equal_steps", "equal_flops", "full_length"]
STEPS = ("accepted_steps", "epochs", "steps")
BudgetUnit = Literal[*STEPS, "tokens", "flops", "seconds"]
Score = Literal["sketch", "gradient_norm", "hidden_gradient", "loss", "entropy", "excess_loss", "update", "updates"]
BY_SHARE = "measures no layers: with it skip 'prefix' by skip_share, skip_decide 'ema'; a measured skip: 'gather'"
OWN, COLUMNS = ("labelled", "pairs", "text", "chat"), ("text_column", "pair_column", "label_column")  # own data
SKIPPABLE = ("lora", "sparse", "peft")  # methods whose update is a term of its own, which can be measured and detached


class RunSettings(Settings):
    """Which run this is"""

    question = "run"
    setting: str = field("toy", "folder of params/: the model, the data and the reference run", FREE, UNTRIED)
    row: str = field("", "the run's name in tables; empty: made from what is switched on", FREE, APART, UNTRIED)
    label: str = field("", "the row's name as tables print it; empty: by its name", FREE, APART, UNTRIED)
    seed: int = field(0, "of data order, initial values and every draw", ge=0, lt=2**32)  # numpy's
    record: Place = field("", "file the record is written to; empty: none is written", FREE, APART)
    run_dir: Place = field("", "folder for checkpoints and the adapter; empty: none is kept", FREE, APART)
    resume: bool = field(True, "go on from the newest checkpoint in run_dir", FREE, APART, UNTRIED)
    compares: Compares = field("", "a row whose one change is its budget: what that makes equal", FREE, APART, UNTRIED)
    combines: list[str] = field([], "rows of the setting whose changes this row makes together", FREE, APART, UNTRIED)
    differs: dict[str, str] = field({}, "parameter: why the row's method needs it so", FREE, APART, UNTRIED)


class DataSettings(Settings):
    """Model and data"""

    question = "data"
    model: str = field("toy-encoder", "a hub id, a local folder or a name `lorakit fetch` knows")
    task: str = field("toy-reviews", "a name of lorakit.tasks; of own data labelled, pairs, text or chat")
    data_files: Place = field("", "the task's files; empty: LORAKIT_DATA, else the hub or the package", FREE, APART)
    text_column: str = field("text", "own data: of the text, of a pair's first one")
    pair_column: str = field("pair", "own data: of a pair's second text")
    label_column: str = field("label", "own data: of the class, a name or a whole number")
    max_length: int = field(96, "tokens a sequence may have", ge=2)
    max_train: int = field(0, "rows; 0: all", ge=0)
    max_validation: int = field(0, "rows; 0: all", ge=0)
    max_test: int = field(0, "rows; 0: all", FREE, UNTRIED, ge=0)
    packing: bool = field(False, "chat tasks: several conversations a row, never attending across them")
    group_by_length: bool = field(False, "batches of rows of like length")
    redundancy: float = field(0.0, "share of redundant batches in the stream, for asking when a gate pays", ge=0, lt=1)
    redundancy_kind: Literal["repeat", "near"] = field("repeat", "what makes a batch redundant")
    redundancy_pool: int = field(64, "rows that are repeated", ge=1)
    idle = (Idle("redundancy", lambda p: p.redundancy == 0, ("redundancy_kind", "redundancy_pool")),
            Idle(f"task one of {', '.join(OWN)}", lambda p: p.task not in OWN, COLUMNS))  # fmt: skip


class BaseSettings(Settings):
    """How the frozen base is kept"""

    question = "base"
    quantize: Literal["none", "nf4"] = field("none", "nf4: linear layers in 4 bits (QLoRA)")
    double_quant: bool = field(True, "nf4: the blocks' scales in 8 bits")
    base_dropout: bool = field(True, "the model's own, while training; false: none but the adapters'")
    prefix_cache: Literal["none", "memory", "disk"] = field("none", "where to keep what frozen first blocks give a row")
    idle = (Idle("quantize", lambda p: p.quantize == "none", ("double_quant",)),)
    refuses = (
        Refusal("quantize", "4-bit weights cannot be trained: method 'full'",
                lambda p: p.quantize != "none" and p.method == "full"),
        Refusal("precision", "diverges on NF4: bf16, fp32", lambda p: p.quantize == "nf4" and p.precision == "fp16"),
        Refusal("prefix_cache", "skip none, or method lora's 'prefix' by skip_share, skip_explore 0", lambda p: not (
            p.prefix_cache == "none" or p.skip == "none" or p.method == "lora" and p.by_share and p.skip_explore == 0)),
    )  # fmt: skip


class AdapterSettings(Settings):
    """What one adapter is told; `alpha` scales the update, and a method without a scale (HiRA) has None"""

    question = "adapter"
    rank: int = field(8, "of the update", ge=1)
    alpha: float | None = field(16.0, "the update's scale is alpha / rank; HiRA has none", gt=0)
    dropout: float = field(0.0, "on the adapter's input only", ge=0, lt=1)
    init: Literal["kaiming", "gaussian"] = field("kaiming", "of A")
    rslora: bool = field(False, "scale by alpha / √rank")


class AttachSettings(Settings):
    """What is trained"""

    question = "adapter"
    method: str = field("lora", "lora | sparse | hira | peft (any, by peft_type) | head (only) | full")
    target_modules: str | list[str] = field("all-linear", 'names, a regular expression, or "all-linear"')
    peft_type: str = field("", "method peft: DORA, ADALORA, VERA, …")
    peft_options: dict[str, Any] = field({}, "method peft: fields of its config")
    refuses = (
        Refusal("alpha", "HiRA has no alpha: leave it out",  # a notebook may name every default
                lambda p: p.method == "hira" and p.alpha not in (None, AdapterSettings.model_fields["alpha"].default)),
        Refusal("rslora", "HiRA has no alpha, so nothing to rescale", lambda p: p.method == "hira" and p.rslora),
        Refusal("peft_type", "is for method 'peft'", lambda p: p.peft_type and p.method != "peft"),
        Refusal("peft_options", "is for method 'peft'", lambda p: p.peft_options and p.method != "peft"),
        Refusal("budget_unit", f"AdaLoRA's ranks go by {', '.join(STEPS)}; or peft_options' total_step", lambda p: (
            p.peft_type.upper() == "ADALORA" and p.budget_unit not in STEPS and not p.peft_options.get("total_step"))),
    )  # fmt: skip


class SparseSettings(Settings):
    """Method sparse: how zeros come into LoRA's factors while it trains, by the cubic of Zhu & Gupta (2017)"""

    question = "adapter"
    sparsify: Literal["magnitude", "l1", "structured"] = field("magnitude", "what is zeroed")
    sparsity: float = field(0.5, "share of zeros (structured: of ranks removed) at the end", ge=0, lt=1)
    sparse_factors: Literal["both", "A", "B"] = field("both", "which of LoRA's factors; structured: both")
    prune_start: float = field(0.2, "share of the budget at which the zeros begin to appear", ge=0, lt=1)
    prune_end: float = field(0.8, "share of the budget at which all are there", gt=0, le=1)
    l1: float = field(0.0, "sparsify l1: the penalty λ; 0: found while training, from `sparsity`", ge=0)
    idle = (Idle("method 'sparse'", lambda p: p.method != "sparse"), Idle("l1 0", lambda p: p.l1 > 0, ("sparsity",)))
    refuses = (Refusal("select", "must be 'last' for a method that prunes on the way",  # the best may be from before
                       lambda p: p.method == "sparse" and p.select != "last"),)  # fmt: skip

    @model_validator(mode="after")
    def _sparse_together(self) -> Self:
        both = self.sparsify != "structured" or self.sparse_factors == "both"
        require(both, "sparse_factors", self.sparse_factors, "structured pruning takes ranks from both: must be 'both'")
        after = f"must be after prune_start={self.prune_start} and at most 1"
        require(self.prune_end > self.prune_start, "prune_end", self.prune_end, after)
        require(self.sparsify == "l1" or self.l1 == 0, "l1", self.l1, f"is for sparsify 'l1', not {self.sparsify!r}")
        return self


class SkipSettings(Settings):
    """Which layers get a backward; `lorakit.skip.SkipLoRA` tells what is skipped"""

    question = "skip"
    skip: Literal["none", "adapter", "prefix"] = field("none", "SkipLoRA: what is skipped as one")
    skip_decide: Literal["ema", "forward"] = field("ema", "from an average; or in the forward, which waits per adapter")
    skip_threshold: Share | dict[str, Share] = field(0.05, "of ‖Δh‖/‖h‖; or by name: others are never skipped", le=None)
    skip_share: float = field(0.0, "of adapters to skip, by an adaptive threshold; 0: the fixed one", ge=0, lt=1)
    skip_warmup: float = field(0.1, "share of the budget before the first skip: at the start every M is 0", ge=0, lt=1)
    skip_min_active: int = field(1, "adapters that stay active, those with the largest M (prefix: the last)", ge=1)
    skip_explore: float = field(0.05, "chance of what would be skipped to be trained all the same", ge=0, le=1)
    skip_ema: float = field(0.2, "weight of the newest measurement", gt=0, le=1)
    skip_measure_every: int = field(4, "steps between measurements, where decided from the average", ge=1)
    idle = (Idle("skip", lambda p: p.skip == "none"),
            Idle("skip_decide 'ema'", lambda p: p.skip_decide == "forward", ("skip_measure_every",)))  # fmt: skip
    refuses = (Refusal("skip", f"needs a method of {', '.join(SKIPPABLE)}",
                       lambda p: p.skip != "none" and p.method not in SKIPPABLE),)  # fmt: skip

    @property
    def by_share(self) -> bool:
        """Whether which layers are skipped is known without measuring any."""
        return self.skip == "prefix" and self.skip_share > 0 and self.skip_decide == "ema"


class GateSettings(Settings):
    """Which batches get a backward; `lorakit.gates.HeadGradientGate` tells what a sketch's settings do"""

    question = "gate"
    gate: str = field(
        "none", "random, loss_floor, gradient_norm, novelty (SLoRA), novelty_loss, least_novel, excess_loss"
    )
    gate_level: Literal["batch", "example"] = field("batch", "what is chosen: whole batches, or a larger batch's rows")
    gate_candidates: int = field(4, "example: rows looked at for each that is trained on", ge=2)
    gate_rate: float = field(0.3, "share of batches to accept", gt=0, lt=1)
    gate_burn_in: int = field(20, "batches at the start that are all accepted", ge=0)
    gate_beta: float = field(10.0, "steepness of the decision, per spread of the score", gt=0)
    gate_ema: float = field(0.05, "weight of the newest batch in the running averages", gt=0, le=1)
    gate_m: int = field(512, "size of the sketch, a power of two", ge=2)
    gate_k: int = field(64, "rank of the basis", ge=1)
    gate_rows: int = field(0, "rows Frequent Directions keeps; 0: twice the rank", ge=0)
    gate_topk: int = field(64, "logits kept of each error; 0: all", ge=0)
    gate_refresh: int = field(4, "accepted batches between refreshes of the basis", ge=1)
    gate_decay: float = field(1.0, "forgetting of old batches, per accepted batch; 1: none", gt=0, le=1)
    gate_leverage: bool = field(False, "ridge-leverage novelty")
    idle = (Idle("gate", lambda p: p.gate == "none"),
            Idle("gate_level 'example'", lambda p: p.gate_level == "batch", ("gate_candidates",)),
            Idle("gate_level 'batch'", lambda p: p.gate_level == "example",
                 ("gate_rate", "gate_burn_in", "gate_beta")))  # fmt: skip
    refuses = (
        Refusal("precision", "fp16's gradient scaler needs a backward every step, a gate omits some; use bf16",
                lambda p: p.gate != "none" and p.precision == "fp16"),
        Refusal("gate", "compares with the base: needs an adapter, not method 'head' or 'full'",
                lambda p: p.gate == "excess_loss" and p.method in ("head", "full")),
    )  # fmt: skip

    @model_validator(mode="after")
    def _gate_together(self) -> Self:
        m, k, rows = self.gate_m, self.gate_k, self.gate_rows
        require(m.bit_count() == 1, "gate_m", m, "must be a power of two")
        require(k < m, "gate_k", k, f"must be below gate_m={m}")
        require(rows == 0 or k < rows <= m, "gate_rows", rows, f"must be 0, or above gate_k={k}, at most gate_m={m}")
        return self


class Gating(Settings):
    """Which tokens get a backward (FLoRA): the keys of `gating:`, the settings of the room `lorakit.tokens`

    "flora" chooses by `score`, see `lorakit.tokens.TokenScore`: policy "topk" the largest, biased; "pps" in proportion,
    weighted by the inverse (Horvitz and Thompson 1952), unbiased in mode "gather": all tokens go through the layers,
    the chosen through the head. "fractional": the chosen go again, against recorded keys and values (TokenTune).
    """

    method: Literal["baseline", "random", "flora"] = field("baseline", "all; a share drawn uniformly; by `score`")
    topk_tokens: float = field(0.2, "share of the predictions that is kept; 1: the baseline", gt=0, le=1)
    score: Score = field("sketch", "of a prediction")
    sketch_dim: int = field(512, "size of the sketch", ge=2)
    topk_logits: int = field(64, "words kept of each error, the label's always among them; 0: all", ge=0)
    policy: Literal["topk", "pps"] = field("topk", "the largest scores, or drawn in proportion and weighted")
    per: Literal["batch", "sequence"] = field("batch", "what the share is of: the (micro-)batch, or each sequence")
    mode: Literal["gather", "fractional"] = field("gather", "how far the backward of the others is saved")
    idle = (Idle("method", lambda p: p.method == "baseline"),
            Idle("method 'flora'", lambda p: p.method != "flora", ("score", "sketch_dim", "topk_logits", "policy")),
            Idle("score 'sketch'", lambda p: p.score != "sketch", ("sketch_dim",)))  # fmt: skip

    @property
    def selective(self) -> bool:
        return self.method != "baseline" and self.topk_tokens < 1

    @property
    def fractional(self) -> bool:
        return self.selective and self.mode == "fractional"

    @property
    def weighted(self) -> bool:
        return self.method == "flora" and self.policy == "pps"


class TokenSettings(Settings):
    """Which tokens get a backward, and what their loss is made of; `lorakit.tokens.head_loss` tells of each"""

    question = "tokens"
    gating: Gating = field(Gating(), "FLoRA; a mapping with keys of its own")
    loss: Literal["exact", "nll", "dft", "liger"] = field("exact", "of a language model")
    logits_mib: float = field(96, "what a chunk's logits may take; those kept for a backward, twice that", gt=0)
    idle = (Idle("loss 'exact'", lambda p: p.loss == "liger", ("logits_mib",)),)
    refuses = (
        Refusal("loss", "liger's kernel weighs no tokens; gating.policy 'topk', or loss 'exact'",
                lambda p: p.loss == "liger" and p.gating.selective and p.gating.weighted),
        Refusal("gating.score", "compares with the base: needs an adapter, not method 'head' or 'full'",
                lambda p: p.gating.selective and p.gating.score == "excess_loss" and p.method in ("head", "full")),
        Refusal("precision", "fp16's gradient scaler needs a backward every step, a batch without labels has none; use "
                "bf16 or fp32", lambda p: p.gating.selective and p.precision == "fp16"),
        Refusal("gradient_checkpointing", "drops the keys that gating.mode 'fractional' records; leave it out, or use "
                "'gather'", lambda p: p.gating.fractional and p.gradient_checkpointing),
        Refusal("gating.mode", BY_SHARE, lambda p: p.gating.fractional and p.skip != "none" and not p.by_share),
    )  # fmt: skip


class TrainingSettings(Settings):
    """Training"""

    question = "training"
    learning_rate: float = field(4.0e-3, "at its highest; toy's default, of others the method's", UNTRIED, gt=0)
    learning_rate_from: str = field("", "its search's record, or a source; empty: not searched", FREE, APART, UNTRIED)
    batch_size: int = field(16, "rows a forward sees", ge=1)
    gradient_accumulation: int = field(1, "batches an optimizer step adds up", ge=1)
    budget: float = field(60, "what the run may spend, in budget_unit", UNTRIED, gt=0, le=LARGEST[float])
    budget_unit: BudgetUnit = field("accepted_steps", "what is counted; epochs: the steps of passes without a gate")
    schedule: Literal["linear", "cosine", "constant"] = field("linear", "of the rate, over the share of budget spent")
    warmup: float = field(0.05, "share of the budget", ge=0, lt=1)
    weight_decay: float = field(0.0, "AdamW's", ge=0)
    max_grad_norm: float = field(1.0, "gradients are clipped to it", gt=0)
    optimizer: str = field("adamw_torch", "a name of transformers' OptimizerNames")
    precision: Literal["fp32", "bf16", "fp16"] = field("fp32", "of autocast; weights stay as loaded")
    dtype: Literal["fp32", "bf16", "auto"] = field("fp32", "of the loaded weights")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = field("sdpa", "the model's implementation")
    gradient_checkpointing: bool = field(False, "recompute activations in the backward")
    tf32: bool = field(False, "CUDA's shorter fp32, where there is some")
    dataloader_num_workers: int = field(0, "processes that make batches; 0: the run's own", FREE, APART, UNTRIED, ge=0)
    report_to: str = field("none", "comma-separated: tensorboard, wandb, trackio, …", FREE, APART, UNTRIED)
    refuses = (
        Refusal("budget", "must be at least 1, but of epochs", lambda p: p.budget < 1 and p.budget_unit != "epochs"),
        Refusal("attention", "computes in 16 bits only: precision or dtype 'bf16'", lambda p: (
            p.attention == "flash_attention_2" and p.precision == p.dtype == "fp32")),
    )  # fmt: skip


class EvaluationSettings(Settings):
    """Evaluation and records"""

    question = "evaluation"
    evaluations: int = field(6, "on validation data, spread evenly over the budget", UNTRIED, ge=1)
    evaluate_first: bool = field(False, "one more, before the first step: the curve's point 0", FREE, UNTRIED)
    eval_batch_size: int = field(64, "rows", ge=1)
    select: Literal["last", "best"] = field("last", "the final model; best: by validation loss, never by test")
    exact_match_rows: int = field(0, "chat tasks: GSM8K-style answers generated at the end", FREE, UNTRIED, ge=0)
    forgetting: str = field("", "plain-text task whose loss is taken before and after; empty: none", FREE, UNTRIED)
    save_steps: int = field(0, "steps between checkpoints; 0: none", FREE, UNTRIED, ge=0)
    latency_repeats: int = field(10, "inference timings; 0: none", FREE, UNTRIED, ge=0)
    predict_memory: bool = field(True, "of one step, by a run on tensors without data", FREE, UNTRIED)


class SearchSettings(Settings):
    """Learning-rate search (`lorakit search`)"""

    question = "search"
    search_rates: list[Rate] = field([], "rates to try", FREE, APART, UNTRIED)
    search_budget: float = field(60, "of each trial, in budget_unit", FREE, APART, gt=0, le=LARGEST[float])
