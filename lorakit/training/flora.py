"""FLoRA on the Hugging Face Trainer's own terms: a share of each batch's tokens gets a backward."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainingArguments

from lorakit.head import kind_of
from lorakit.params import Params, check
from lorakit.settings import Gating, TokenSettings
from lorakit.tokens import build_tokens
from lorakit.training.slora import SLoRATrainer, known_kind, made_model


class FLoRATrainer(SLoRATrainer):
    """A `transformers.Trainer` that backpropagates the losses of chosen tokens only.

    The loss is divided by the chosen tokens of the whole accumulation window and of all processes (sampled ones, which
    are weighted, by all labels). Evaluation is the Trainer's. With `gate_config` whole batches are gated first, and a
    rejected batch costs its one forward pass.

    Args:
        model: a causal or masked language model with something to train; args: `TrainingArguments`, not fp16.
        gating: the keys of `lorakit.Gating`: method ("baseline", "random", "flora"), topk_tokens, sketch_dim,
            topk_logits, score, policy, per, mode.
        gate_config, gate: SLoRA's, see there.
        everything else: goes to `SLoRATrainer`.

    Raises:
        ParameterError: an unknown key, a value out of range, a key without the one it belongs to, fp16, a classifier,
            checkpointing with "fractional".
        LorakitError: a model without an output head, or one that mode "fractional" cannot serve.
        CheckpointError: resuming from a checkpoint without this selection's state.
    """

    def __init__(
        self, model: torch.nn.Module | None = None, args: TrainingArguments | None = None, train_dataset: Any = None,
        eval_dataset: Any = None, processing_class: Any = None, gating: Mapping[str, Any] | None = None, **options: Any,
    ):  # fmt: skip
        args = args or TrainingArguments("tmp_trainer")
        model = made_model(model, options.pop("model_init", None), args.seed)
        settings = TokenSettings(gating=dict(gating or {})).gating
        if settings.method != "baseline" or "method" not in (gating or {}):  # who names the baseline means it
            Gating.require_meant(settings, gating or {}, "gating.")
        asked = {"precision": "fp16" if args.fp16 else "fp32", "gradient_checkpointing": args.gradient_checkpointing}
        check(Params(gating=settings if settings.selective else Gating(), **asked))
        loss = options.get("loss", "nll")
        asked = f"gating.method={settings.method!r}" if settings.selective else f"loss={loss!r}"
        kind = known_kind(model, asked) if settings.selective or loss != "nll" else kind_of(model)
        smoothing = 0.0 if settings.selective else args.label_smoothing_factor
        made = {"loss": TokenSettings(loss=loss), "smoothing": smoothing, "seed": args.seed}
        tokens = build_tokens(settings, model, kind, rank=args.process_index, **made)
        super().__init__(model, args, train_dataset, eval_dataset, processing_class, tokens=tokens, **options)
