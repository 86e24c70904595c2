"""Does LoRA need a trained base? The same LoRA on reviews, on a base trained on stories and on one left at random."""

from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch

from lorakit.errors import require
from lorakit.scratch.loop import VOCAB_SIZE, Loader, Log, LoRATrainer, byte_loader, check_rate, pretrain
from lorakit.scratch.transformer import LoRATransformer
from lorakit.tasks.toy.grammar import reviews, split_seed, stories


def _option(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Settings:
    """What the comparison is told; its fields are the options of `lorakit scratch`."""

    lora_r: int = _option(8, "rank of the updates")
    lora_alpha: float = _option(16.0, "updates are scaled by lora_alpha / lora_r")
    epochs: int = _option(3, "passes of LoRA over the reviews")
    learning_rate: float = _option(5e-3, "of LoRA")
    batch_size: int = _option(16, "rows a step")
    pretrain_epochs: int = _option(2, "passes over the stories, all weights trained")
    pretrain_learning_rate: float = _option(3e-3, "of pretraining")
    d_model: int = _option(96, "width")
    num_heads: int = _option(4, "attention heads")
    num_layers: int = _option(2, "layers")
    length: int = _option(128, "bytes a row")
    texts: int = _option(1500, "stories, and reviews, to train on")
    seed: int = _option(0, "of weights, text and order")

    def __post_init__(self):
        for name, value in asdict(self).items():
            if name.endswith("learning_rate"):
                check_rate(value, name)
            elif name != "lora_alpha":
                least = 0 if name == "seed" else 1
                require(value >= least, name, value, f"must be >= {least}")

    def model_arguments(self) -> dict[str, float]:
        """Arguments of the `LoRATransformer` that is trained."""
        names = ("d_model", "num_heads", "num_layers", "lora_r", "lora_alpha")
        chosen = {name: value for name, value in asdict(self).items() if name in names}
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
