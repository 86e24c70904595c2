"""SLoRA on the Hugging Face Trainer's own terms: epochs or max_steps, its schedule, its logs, its checkpoints."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed

from lorakit.errors import LorakitError, require
from lorakit.gates.novelty import HeadGradientGate
from lorakit.head import kind_of
from lorakit.seams import AlwaysOpen, Gate
from lorakit.settings import Gating, TokenSettings
from lorakit.tokens import build_tokens
from lorakit.training import checkpoint
from lorakit.training.callback import StepCallback
from lorakit.training.gated import GatedTrainer

OF_MODEL = ("d_hidden", "vocab_size", "kind", "softcap", "device")  # what a gate is told of its model
KEYS = tuple(name for name in inspect.signature(HeadGradientGate).parameters if name not in OF_MODEL)


class SLoRATrainer(GatedTrainer):
    """A `transformers.Trainer` that backpropagates only batches whose head gradient is novel.

    Steps of the Trainer (`max_steps`, `logging_steps`, `save_steps`, its learning-rate schedule) count candidate
    batches; `gate/accepted_steps` in its logs counts those that were trained on. Works on lorakit's adapters, on PEFT
    models, on 4-bit bases, for classifiers and language models. The loss is the one that was asked for, the model's own
    where that is not the cross-entropy of its labels; the novelty is that of the cross-entropy's gradient.

    Args:
        model: with something to train; args: `TrainingArguments`, not fp16.
        gate_config: the keys of `HeadGradientGate` that are not the model's (KEYS), `target_novelty` being the target
            acceptance rate; {} for all defaults, which are the method's as described and not a run's (see there), None
            for the ungated baseline.
        gate: a gate of your own instead.
        loss: "nll", the one that was asked for, of all logits; "exact", "dft" or "liger": see `TokenSettings`; with
            `label_smoothing_factor` where there is one. Evaluation is the Trainer's, logits and all.
        model_init: makes the model, once, where none is given; the gate belongs to that one.
        everything else: `train_dataset`, `eval_dataset`, `processing_class`, …, goes to `transformers.Trainer`.

    Raises:
        ParameterError: an unknown key or a value out of range, fp16, both gate and gate_config.
        LorakitError: with a gate, a model without an output head, or of no kind that gates know; with a loss, too.
        CheckpointError: resuming from a checkpoint without this gate's state.
    """

    remedy = "go on from an older one, or start over"

    def __init__(
        self, model: torch.nn.Module | None = None, args: TrainingArguments | None = None, train_dataset: Any = None,
        eval_dataset: Any = None, processing_class: Any = None, gate_config: Mapping[str, Any] | None = None, *,
        gate: Gate | None = None, loss: str = "nll", model_init: Callable[[], torch.nn.Module] | None = None,
        **options: Any,
    ):  # fmt: skip
        args = args or TrainingArguments("tmp_trainer")
        model = made_model(model, model_init, args.seed)
        require(gate is None or gate_config is None, "gate_config", gate_config, "must be None where a gate is given")
        kind = known_kind(model) if gate_config is not None or (gate and gate.needs_hidden) else kind_of(model)
        if gate_config is not None:
            unknown = sorted(set(gate_config) - set(KEYS))
            require(not unknown, "gate_config", unknown, f"unknown keys; known are {', '.join(KEYS)}")
            gate = HeadGradientGate.of_model(model, kind, **gate_config)
        gate = gate or AlwaysOpen()
        require(not (args.fp16 and gate.selective), "fp16", True, "its gradient scaler needs every backward; use bf16")
        if loss != "nll" and "tokens" not in options:
            made = {"loss": TokenSettings(loss=loss), "smoothing": args.label_smoothing_factor}
            options["tokens"] = build_tokens(Gating(), model, known_kind(model, f"loss={loss!r}"), **made)
        data = {"train_dataset": train_dataset, "eval_dataset": eval_dataset, "processing_class": processing_class}
        super().__init__(kind=kind, gate=gate, model=model, args=args, **data, **options)
        self.add_callback(StepCallback(self.run))

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **options: Any) -> Any:
        """As the Trainer's; True goes on from the newest checkpoint that is whole, the gate's state included."""
        if resume_from_checkpoint is True and (found := checkpoint.numbered(self.args.output_dir)):
            whole = (path for path in reversed(found) if not checkpoint.damage(path, self.checkpoint_files))
            resume_from_checkpoint = next(whole, found[-1])
        if isinstance(resume_from_checkpoint, (str, Path)):
            self.require_resumable(resume_from_checkpoint)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **options)

    @property
    def checkpoint_files(self) -> list[str]:
        written = super().checkpoint_files
        return [*(written[:2] if self.args.save_only_model else written), "trainer_state.json", checkpoint.LEDGER]

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        for part in (self.model, self.processing_class):  # for who opens it; resuming reads the trained weights
            if self.args.should_save and hasattr(part, "save_pretrained"):
                part.save_pretrained(output_dir)

    def _save_checkpoint(self, model, trial) -> None:
        if self.args.should_save:  # first: the Trainer's last act is to remove older ones
            folder = checkpoint.folder(self.args.output_dir, self.state.global_step)
            folder.mkdir(parents=True, exist_ok=True)
            checkpoint.save_seams(self.run, folder)
            torch.save(self.ledger.state_dict(), folder / checkpoint.LEDGER)
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        folder = Path(resume_from_checkpoint)
        checkpoint.load_seams(self.run, folder)
        super()._load_from_checkpoint(resume_from_checkpoint)
        self.ledger.load_state_dict(torch.load(folder / checkpoint.LEDGER, weights_only=True))


def made_model(model: torch.nn.Module | None, make: Callable[[], torch.nn.Module] | None, seed: int) -> torch.nn.Module:
    """`model`, or what `make` gives from the Trainer's seed.

    Raises:
        ParameterError: both were given, or neither.
    """
    require((model is None) != (make is None), "model_init", make, "give either it or a model")
    if model is None:
        set_seed(seed)
    return make() if model is None else model


def known_kind(model: torch.nn.Module, asked: str = "a gate by head gradients") -> str:
    """ "classify", "masked" or "causal", which what was `asked` for needs to know.

    Raises:
        LorakitError: the class of `model` says none of them.
    """
    if kind := kind_of(model):
        return kind
    raise LorakitError(f"{type(model).__name__}: {asked} needs a classifier, a masked or a causal language model")
