"""Does LoRA need a trained base? The same LoRA on reviews, on a base trained on stories and on one left at random."""

from copy import deepcopy
from typing import NamedTuple

import torch

from lorakit import fields
from lorakit.fields import field
from lorakit.scratch.loop import VOCAB_SIZE, Loader, Log, LoRATrainer, byte_loader, pretrain
from lorakit.scratch.transformer import LoRATransformer
from lorakit.tasks.toy.grammar import reviews, split_seed, stories


class Settings(fields.Settings):
    """What the comparison is told; its fields are the options of `lorakit scratch`."""

    lora_r: int = field(8, "rank of the updates", ge=1)
    lora_alpha: float = field(16.0, "updates are scaled by lora_alpha / lora_r", gt=0)
    epochs: int = field(3, "passes of LoRA over the reviews", ge=1)
    learning_rate: float = field(5e-3, "of LoRA", gt=0)
    batch_size: int = field(16, "rows a step", ge=1)
    pretrain_epochs: int = field(2, "passes over the stories, all weights trained", ge=1)
    pretrain_learning_rate: float = field(3e-3, "of pretraining", gt=0)
    d_model: int = field(96, "width", ge=1)
    num_heads: int = field(4, "attention heads", ge=1)
    num_layers: int = field(2, "layers", ge=1)
    length: int = field(128, "bytes a row", ge=1)
    texts: int = field(1500, "stories, and reviews, to train on", ge=1)
    seed: int = field(0, "of weights, text and order", ge=0)

    def model_arguments(self) -> dict[str, float]:
        """Arguments of the `LoRATransformer` that is trained."""
        chosen = self.model_dump(include={"d_model", "num_heads", "num_layers", "lora_r", "lora_alpha"})
        return {"vocab_size": VOCAB_SIZE, "adapt_feedforward": True} | chosen


class Comparison(NamedTuple):
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
    sizes = settings.length, settings.batch_size
    return byte_loader(train, *sizes, shuffle=True, seed=settings.seed), byte_loader(validation, *sizes)


def compare(settings: Settings, log: Log = lambda line: None) -> Comparison:
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
    trainers = {}
    for name, base in {"pretrained": model, "random": untrained}.items():
        trainers[name] = LoRATrainer(base, *review_loaders(settings), settings.learning_rate)
        trainers[name].train(settings.epochs, lambda line, name=name: log(f"LoRA on {name} base, {line}"))
    return Comparison(settings, losses, **trainers)
