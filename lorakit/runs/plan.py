"""The predicted peak memory and the FLOPs of a training step, from a model's configuration alone."""

import copy
import re
from typing import Literal, NamedTuple, Self

import torch
import transformers
from pydantic import model_validator
from torch import nn

from lorakit import adapters, models
from lorakit.base.quantize import four_bit, quantisable
from lorakit.errors import require
from lorakit.fields import Settings, field
from lorakit.head import KINDS
from lorakit.measure import live
from lorakit.measure.flops import FlopCount
from lorakit.measure.memory import PREDICTABLE, predict_step_memory
from lorakit.models.loading import build
from lorakit.modules import replace_modules
from lorakit.params import Params
from lorakit.runs.assembly import check
from lorakit.settings import Gating, TokenSettings
from lorakit.tokens import build_tokens

GIB = 2**30
CONTEXT_GIB = 1.0  # assumed: CUDA context, cuBLAS workspaces
FRAGMENTATION = 0.10  # assumed: the share of the peak that rounding and gaps in the allocator add
LENGTH = 512  # tokens of a row, where nothing is said and the model takes as many
DEPTHS = (2, 4)  # blocks of the two models through which the line to a deep one's depth is drawn


class Plan(Settings):
    """A training step to be, named as in a run's parameters, and the options of `lorakit plan`."""

    model: str
    method: str = field("lora", "what is trained")
    batch: int = field(4, "rows in a batch", ge=1)
    seq: int | None = field(None, f"tokens in a row, at most what the model takes (default {LENGTH}, or as many)", ge=1)
    dtype: Literal["fp32", "bf16"] = field("bf16", "of the frozen weights: fp32, bf16")
    precision: str = field("fp32", "of autocast: fp32 (none), bf16, fp16")
    quantize: str = field("none", "of the frozen linear layers: none, nf4 (4 bits, scales in 8)")
    rank: int = field(8, "of the adapters")
    targets: str | list[str] = field("all-linear", "adapted layers: names with commas between, or a regular expression")
    optimizer: str = field("adamw_torch", f"one of {', '.join(PREDICTABLE)}")
    kind: Literal[KINDS] | None = field(None, f"one of {', '.join(KINDS)} (default: by the model's family)")
    gradient_checkpointing: bool = field(False, "recompute activations in the backward")
    tokens: float = field(1.0, "that get a backward (FLoRA), a share of those that are predicted")
    mode: str = field("gather", "of that backward: gather (through the head only), fractional (through the layers)")
    loss: str = field("exact", "of a language model: exact (no logits kept), nll (all logits), dft, liger")

    @model_validator(mode="after")
    def _as_a_run(self) -> Self:
        require(0 < self.tokens <= 1, "tokens", self.tokens, "a share inside (0, 1]")
        named = ("method", "precision", "quantize", "rank", "gradient_checkpointing", "gating", "loss")
        check(Params(target_modules=self.targets, **{name: getattr(self, name) for name in named}))
        return self

    @property
    def gating(self) -> Gating:
        """Which tokens get a backward."""
        chosen = Gating(method="flora", topk_tokens=self.tokens, mode=self.mode)
        return chosen if chosen.selective else Gating()


class Prediction(NamedTuple):
    """Of a step: bytes by kind with their sum "peak", parameter counts, FLOPs, and what it was predicted for: the
    configuration's source, tokens of a row, numbers of a token's state."""

    memory: dict[str, int]
    trainable: int
    total: int
    flops: int
    source: str
    seq: int
    width: int = 0

    @property
    def need(self) -> float:
        """Bytes that a card must have, with what is assumed on top."""
        return self.memory["peak"] * (1 + FRAGMENTATION) + CONTEXT_GIB * GIB


def predict(plan: Plan) -> Prediction:
    """Build on the meta device, attach, and run one step on fake tensors: no weights, no download of any.

    Of a deep model with an adapter on all its blocks two shallow ones are run, and a line through them gives the depth.
    Where more than a tenth of the weights is trained, which moment is the peak depends on the depth: then the whole
    model is run, as where it is shallow or its blocks are not alike.

    Raises:
        ParameterError: a value out of range, an unknown method or target, a sequence longer than the model takes.
        AssetError: nothing is known of a model of this name.
    """
    described = models.describe(plan.model)
    config = described.config.get_text_config()
    seq = plan.seq or min(LENGTH, longest(plan))
    require(seq <= longest(plan), "seq", seq, f"at most {longest(plan)} for this model")
    depth, (near, far), found = getattr(config, "num_hidden_layers", 0), DEPTHS, None
    named = [plan.targets] if isinstance(plan.targets, str) else plan.targets
    if depth > far and plan.method != "full" and all(re.fullmatch(r"[a-zA-Z_.-]+", name) for name in named):
        low, high = (_step(plan, shortened(described.config, blocks), seq) for blocks in DEPTHS)
        found = {name: round(low[name] + (high[name] - low[name]) * (depth - near) / (far - near)) for name in low}
    alike = found and found["base"] == build(described.config, kind_of(plan), plan.dtype).num_parameters()
    if not alike or 10 * found["trainable"] > found["total"]:
        found = _step(plan, described.config, seq)
    memory, counts = {kind: found[kind] for kind in (*live.KINDS, "peak")}, ("trainable", "total", "flops")
    return Prediction(memory, *(found[name] for name in counts), described.source, seq, config.hidden_size)


def kind_of(plan: Plan) -> str:
    """What the model must do: as asked for, else by its family."""
    return plan.kind or {"decoder": "causal", "encoder": "classify"}[models.family(plan.model)]


def longest(plan: Plan) -> int:
    """Tokens of the longest row that the model takes, as far as its configuration says."""
    return getattr(models.config(plan.model).get_text_config(), "max_position_embeddings", 2**17)


def _step(plan: Plan, config: transformers.PreTrainedConfig, seq: int) -> dict[str, int]:
    """Bytes by kind, parameter counts, the base's among them, and FLOPs of one step of a model so configured."""
    kind, count = kind_of(plan), FlopCount()
    base = build(config, kind, plan.dtype)
    known = {"base": base.num_parameters()}
    if plan.quantize == "nf4":
        quantize_meta(base)
    model = adapters.attach(base, plan.method, rank=plan.rank, target_modules=plan.targets)
    loss = TokenSettings(loss="exact" if plan.loss == "liger" else plan.loss)
    tokens = build_tokens(plan.gating, model, kind, loss=loss)
    asked = {"optimizer": plan.optimizer, "autocast": None if plan.precision == "fp32" else plan.precision}
    asked |= {"gradient_checkpointing": plan.gradient_checkpointing, "device": "cuda"}
    memory = predict_step_memory(model, make_batch(plan.batch, seq, kind), tokens=tokens, count=count, **asked)
    stats = adapters.parameter_stats(model)
    return memory | known | {"trainable": stats.trainable, "total": stats.total, "flops": count.total}


def shortened(config: transformers.PreTrainedConfig, blocks: int) -> transformers.PreTrainedConfig:
    """A copy with the first `blocks` blocks only; what is listed block by block is cut as well."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            setattr(text, name, value[:blocks])
    text.num_hidden_layers = blocks
    return config


def quantize_meta(model: nn.Module) -> None:
    """What `quantize_nf4` makes of a model, on the meta device: packed weights of no values, scales never filled in."""
    for linear in dict.fromkeys(map(model.get_submodule, quantisable(model))):  # once each, however many paths
        layer = four_bit(linear, True, torch.bfloat16)
        state = layer.weight.quant_state
        for held in map(vars, (state, state.state2)):  # its tensors real, which a dry run leaves alone
            held |= {name: torch.empty_like(t, device="cpu") for name, t in held.items() if torch.is_tensor(t)}
        replace_modules(model, {linear: layer})
    model.is_loaded_in_4bit = True


def make_batch(batch: int, seq: int, kind: str) -> dict[str, torch.Tensor]:
    """Inputs of the right shapes: (batch, seq) ids and mask; labels (batch,) for classify, else (batch, seq)."""
    ids = torch.zeros(batch, seq, dtype=torch.long)
    labels = torch.zeros(batch, dtype=torch.long) if kind == "classify" else ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
