"""Does LoRA need a trained base? The same LoRA on reviews, on a base trained on stories and on one left at random."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, fields

import torch

from lorakit.errors import require
from lorakit.scratch.loop import Loader, check_rate, pretrain
from lorakit.scratch.text import VOCAB_SIZE, byte_loader
from lorakit.scratch.trainer import LoRATrainer
from lorakit.scratch.transformer import LoRATransformer
from lorakit.tasks.toy.grammar import reviews, split_seed, stories


@dataclass(frozen=True)
class Settings:
    """What the comparison is told; its fields are the options of `lorakit scratch`."""

    lora_r: int = 8
    lora_alpha: float = 16.0
    epochs: int = 3  # over the reviews
    learning_rate: float = 5e-3  # of LoRA
    batch_size: int = 16
    pretrain_epochs: int = 2  # over the stories
    pretrain_learning_rate: float = 3e-3
    d_model: int = 96
    num_heads: int = 4
    num_layers: int = 2
    length: int = 128  # bytes a row
    texts: int = 1500  # stories, and reviews, to train on
    seed: int = 0  # of weights, text and order

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("learning_rate"):
                check_rate(value, field.name)
            elif isinstance(field.default, int) and field.name != "seed":
                require(value >= 1, field.name, value, "must be >= 1")
        require(self.seed >= 0, "seed", self.seed, "must be >= 0")

    def model_arguments(self) -> dict[str, float]:
        """Arguments of the `LoRATransformer` that is trained."""
        names = ("d_model", "num_heads", "num_layers", "lora_r", "lora_alpha")
        chosen = {name: value for name, value in asdict(self).items() if name in names}
        return {"vocab_size": VOCAB_SIZE, "adapt_feedforward": True} | chosen


@dataclass(frozen=True)
class Comparison:
    """LoRA trained on two bases that differ in nothing but the pretraining of one."""

    settings: Settings
    pretrain_loss: list[float]  # nats per byte of stories, the mean of each epoch
    pretrained: LoRATrainer
    random: LoRATrainer


def review_loaders(settings: Settings) -> tuple[Loader, Loader]:
    """Training and validation batches of reviews; no validation text was trained on."""
    train = [text for text, _ in reviews(settings.texts, split_seed("train", settings.seed))]
    known = set(train)
    other = reviews(max(settings.texts // 4, 40), split_seed("validation", settings.seed))
    validation = [text for text, _ in other if text not in known]
    return (
        byte_loader(train, settings.length, settings.batch_size, shuffle=True, seed=settings.seed),
        byte_loader(validation, settings.length, settings.batch_size),
    )


def compare(settings: Settings, log: Callable[[str], None] = lambda line: None) -> Comparison:
    """Pretrain, then train LoRA on the trained and on the untrained base: same initial weights, same batches in order.

    Args:
        log: told one line per epoch.

    Raises:
        ParameterError: a setting is out of range.
        DataError: too little text to fill a row.
        DivergedError: a loss is no longer a finite number.
    """
    torch.manual_seed(settings.seed)
    model = LoRATransformer(**settings.model_arguments())
    untrained = deepcopy(model)
    review_loaders(settings)  # too little text is to be known before the minute of pretraining
    text = stories(settings.texts, split_seed("pretrain", settings.seed))
    loader = byte_loader(text, settings.length, settings.batch_size, shuffle=True, seed=settings.seed)
    losses = pretrain(model, loader, settings.pretrain_epochs, settings.pretrain_learning_rate, log)
    trainers = [_adapt(base, settings, log, name) for base, name in ((model, "pretrained"), (untrained, "random"))]
    return Comparison(settings, losses, *trainers)


def _adapt(model: LoRATransformer, settings: Settings, log: Callable[[str], None], name: str) -> LoRATrainer:
    trainer = LoRATrainer(model, *review_loaders(settings), settings.learning_rate)
    trainer.train(settings.epochs, lambda line: log(f"LoRA on {name} base, {line}"))
    return trainer
