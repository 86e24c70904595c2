"""Will it fit? The predicted peak memory of a training step, from a model's configuration alone, against GPU sizes."""

import argparse
from typing import Any, Literal, NamedTuple, Self

import torch
import transformers
from pydantic import model_validator
from torch import nn

from lorakit import adapters, models
from lorakit.base.mending import mend
from lorakit.base.nf4 import BLOCK, NESTED_BLOCK, bitsandbytes
from lorakit.base.quantize import quantisable
from lorakit.errors import ParameterError, require
from lorakit.fields import Settings, field
from lorakit.head import KINDS
from lorakit.measure import live
from lorakit.measure.memory import predict_step_memory
from lorakit.measure.optimizers import PREDICTABLE
from lorakit.models.loading import DTYPES
from lorakit.models.loading import KINDS as AUTO_CLASSES
from lorakit.modules import is_conv1d, replace_modules
from lorakit.params import Params
from lorakit.runs.assembly import check
from lorakit.settings import Gating, TokenSettings
from lorakit.tokens import build_tokens

GIB = 2**30
GPU_SIZES_GB = (8, 12, 16, 24, 40, 48, 80, 141)  # of 10**9 bytes: the careful reading of the label
CONTEXT_GIB = 1.0  # assumed: CUDA context, cuBLAS workspaces
FRAGMENTATION = 0.10  # assumed: the share of the peak that rounding and gaps in the allocator add
LENGTH = 512  # tokens of a row, where nothing is said and the model takes as many


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

    def __init__(self, model: str, **given: Any):
        super().__init__(model=model, **given)

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
    """Predicted bytes by kind with their sum "peak", parameter counts, the configuration's source, tokens of a row."""

    memory: dict[str, int]
    trainable: int
    total: int
    source: str
    seq: int


def predict(plan: Plan) -> Prediction:
    """Build on the meta device, attach, and run one step on fake tensors: no weights, no download of any.

    Raises:
        ParameterError: a value out of range, an unknown method or target, a sequence longer than the model takes.
        AssetError: nothing is known of a model of this name.
    """
    described = models.describe(plan.model)
    longest = getattr(described.config.get_text_config(), "max_position_embeddings", plan.seq or LENGTH)
    seq = plan.seq or min(LENGTH, longest)
    require(seq <= longest, "seq", seq, f"at most {longest} for this model")
    kind = plan.kind or {"decoder": "causal", "encoder": "classify"}[models.family(plan.model)]
    base = build(described.config, kind, plan.dtype)
    if plan.quantize == "nf4":
        quantize_meta(base)
    model = adapters.attach(base, plan.method, rank=plan.rank, target_modules=plan.targets)
    loss = TokenSettings(loss="exact" if plan.loss == "liger" else plan.loss)
    asked = {"optimizer": plan.optimizer, "autocast": None if plan.precision == "fp32" else plan.precision}
    asked |= {"gradient_checkpointing": plan.gradient_checkpointing, "device": "cuda"}
    tokens = build_tokens(plan.gating, model, kind, loss=loss)
    memory = predict_step_memory(model, make_batch(plan.batch, seq, kind), tokens=tokens, **asked)
    counts = adapters.parameter_stats(model)
    return Prediction(memory, counts.trainable, counts.total, described.source, seq)


def build(config: transformers.PreTrainedConfig, kind: str, dtype: str) -> transformers.PreTrainedModel:
    """The model of a configuration on the meta device."""
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0  # classifiers look for the last token that is not padding
    auto = getattr(transformers, AUTO_CLASSES[kind])
    try:
        with torch.device("meta"):
            return auto.from_config(config, dtype=DTYPES[dtype])
    except ValueError:
        raise ParameterError("kind", kind, f"not there for a {config.model_type} model") from None


def quantize_meta(model: nn.Module) -> None:
    """What `quantize_nf4` makes of a model, on the meta device: packed weights of no values, scales never filled in."""
    library, layers = bitsandbytes(), {}
    for linear in dict.fromkeys(map(model.get_submodule, quantisable(model))):  # once each, however many paths
        weight, bias = linear.weight, linear.bias
        shape = weight.T.shape if is_conv1d(linear) else weight.shape  # (out_features, in_features)
        layer = library.nn.Linear4bit(*shape[::-1], bias is not None, torch.bfloat16, quant_type="nf4", device="meta")
        packed = torch.empty(-(-weight.numel() // 2), 1, dtype=torch.uint8, device="meta")
        # scales, in 8 bits, and codebooks as bitsandbytes keeps them; real tensors, which a dry run leaves alone
        make, blocks = library.functional.QuantState, -(-weight.numel() // BLOCK)
        scales, of_scales = torch.empty(blocks, dtype=torch.uint8), torch.empty(-(-blocks // NESTED_BLOCK))
        nested = make(of_scales, code=torch.empty(256), blocksize=NESTED_BLOCK, dtype=torch.float32)
        state = make(scales, shape, torch.empty(16), BLOCK, "nf4", weight.dtype, offset=torch.empty(()), state2=nested)
        layer.weight = library.nn.Params4bit(
            packed, quant_state=state, blocksize=BLOCK, quant_type="nf4", bnb_quantized=True, module=layer
        )
        if bias is not None:
            layer.bias = nn.Parameter(torch.empty_like(bias, dtype=torch.bfloat16), requires_grad=False)
        mend(layer)
        layers[linear] = layer
    replace_modules(model, layers)
    model.is_loaded_in_4bit = True


def make_batch(batch: int, seq: int, kind: str) -> dict[str, torch.Tensor]:
    """Inputs of the right shapes: (batch, seq) ids and mask; labels (batch,) for classify, else (batch, seq)."""
    ids = torch.zeros(batch, seq, dtype=torch.long)
    labels = torch.zeros(batch, dtype=torch.long) if kind == "classify" else ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def report(plan: Plan, prediction: Prediction) -> str:
    """What `lorakit plan` prints: the step, its predicted bytes by kind, and what fits with the assumed margins."""
    rank = f" rank {plan.rank}" if plan.method not in ("head", "full") else ""
    extra = ", gradient checkpointing" if plan.gradient_checkpointing else ""
    autocast = "" if plan.precision == "fp32" else f", {plan.precision} autocast"
    chosen = "" if plan.tokens == 1 else f", {100 * plan.tokens:.3g} % of the tokens ({plan.mode})"
    base = "nf4 linear layers, other " if plan.quantize == "nf4" else ""
    lines = [
        f"{plan.model} ({prediction.source})",
        f"{plan.method}{rank}, batch {plan.batch} x {prediction.seq} tokens, {base}{plan.dtype} weights{autocast}, "
        f"{plan.optimizer}{extra}{chosen}",
        f"{prediction.trainable:,} of {prediction.total:,} parameters trained",
    ]
    memory = prediction.memory
    needed = memory["peak"] * (1 + FRAGMENTATION) + CONTEXT_GIB * GIB
    rooms = [(size, (size * 1e9 - needed) / GIB) for size in GPU_SIZES_GB]
    lines += [
        "\npredicted, alive at the peak of one training step",
        *(f"{kind:12s} {memory[kind] / GIB:10.3f} GiB" for kind in (*live.KINDS, "peak")),
        f"\nassumed on top: {CONTEXT_GIB:g} GiB for the CUDA context, {FRAGMENTATION:.0%} for fragmentation",
        f"predicted need {needed / GIB:.1f} GiB; room on common GPUs",
        *(f"{size:4d} GB  {'fits' if room >= 0 else 'does not fit':14s} {room:+9.1f} GiB" for size, room in rooms),
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """`lorakit plan MODEL …`."""
    parser = argparse.ArgumentParser(prog="lorakit plan", description=__doc__, argument_default=argparse.SUPPRESS)
    parser.add_argument("model", metavar="MODEL", help="hub id, local folder or asset; only its configuration is read")
    for name, info in [*Plan.model_fields.items()][1:]:
        kind = int if name == "seq" else type(info.default or "")
        option = {"action": "store_true"} if info.default is False else {"type": kind}
        shown = f" (default {info.default})" if info.default else ""
        parser.add_argument(f"--{name.replace('_', '-')}", help=f"{info.description}{shown}", **option)
    given: dict[str, Any] = vars(parser.parse_args(argv))
    if "," in given.get("targets", ""):
        given["targets"] = given["targets"].split(",")
    plan = Plan(**given)
    print(report(plan, predict(plan)))
    return 0
