"""Text as rows of bytes, and one loop that trains a base (all its weights) and then LoRA on it (only A and B).

The target at each position is the byte that comes next; AdamW, linear warm-up and decay.
"""

import math
from collections.abc import Callable, Iterable, Sequence, Sized
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lorakit.errors import DataError, LorakitError, require
from lorakit.head import IGNORED
from lorakit.scratch.transformer import LoRATransformer

VOCAB_SIZE = 256
WARMUP = 0.05  # share of the steps
MAX_GRAD_NORM = 1.0


class DivergedError(LorakitError):
    """The loss is no longer a finite number."""


class Loader(Sized, Iterable[tuple[Tensor, ...]], Protocol):
    """Batches of (input_ids, labels) or (input_ids, labels, attention_mask), each (B, T).

    labels[b, t] is the target of the logits at t (already shifted, for a causal model); -100 is no target.
    """


def byte_rows(texts: Sequence[str], length: int) -> Tensor:
    """The texts, one a line, as rows (N, length + 1) of UTF-8 bytes; what does not fill a last row is dropped.

    Each row begins with the last byte of the row before, so that every byte but the first is a target once.

    Raises:
        ParameterError: length < 1.
        DataError: the texts do not fill one row.
    """
    require(length >= 1, "length", length, "must be >= 1")
    data = torch.frombuffer(bytearray("\n".join(texts).encode()) or bytearray(1), dtype=torch.uint8).long()
    if len(data) <= length:
        raise DataError(f"the texts have {len(data)} bytes, fewer than a row of {length} + 1")
    return data.unfold(0, length + 1, length)


def byte_loader(
    texts: Sequence[str], length: int, batch_size: int, shuffle: bool = False, seed: int = 0
) -> DataLoader[tuple[Tensor, ...]]:
    """Batches of (input_ids, labels), each (B, length); two loaders of one seed shuffle alike.

    Raises:
        ParameterError: length or batch_size below 1.
        DataError: the texts do not fill one row.
    """
    require(batch_size >= 1, "batch_size", batch_size, "must be >= 1")
    rows = byte_rows(texts, length)
    generator = torch.Generator().manual_seed(seed)
    dataset = TensorDataset(rows[:, :-1], rows[:, 1:])
    return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, generator=generator)


def rate(step: int, steps: int) -> float:
    """Factor on the learning rate at `step` of 0 … steps - 1: up over the first 5 %, then down towards zero.

    A function of the step alone: a schedule rebuilt from the last rate would shrink with every resumed training.
    """
    warmup = max(1, round(WARMUP * steps))
    return min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))


def summed_loss(model: LoRATransformer, batch: tuple[Tensor, ...]) -> tuple[Tensor, int]:
    """Cross-entropy summed over a batch's targets, in nats, and the number of targets."""
    device = model.embedding.weight.device
    input_ids, labels, *attention_mask = (tensor.to(device) for tensor in batch)
    logits = model(input_ids, *attention_mask)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss, int((labels != IGNORED).sum())


@torch.no_grad()
def evaluate(model: LoRATransformer, loader: Loader) -> float:
    """Mean cross-entropy in nats per target token over the whole loader; the model's mode is left as it was.

    Raises:
        ParameterError: the loader holds no targets.
    """
    training, total, count = model.training, 0.0, 0
    model.eval()
    for batch in loader:
        loss, targets = summed_loss(model, batch)
        total, count = total + loss.item(), count + targets
    model.train(training)
    require(count > 0, "loader", count, "must hold at least one target")
    return total / count


def check_rate(learning_rate: float, name: str = "learning_rate") -> None:
    """Refuse a learning rate that is not a positive number."""
    require(0 < learning_rate < math.inf, name, learning_rate, "must be a number > 0")


class Loop:
    """Epochs of AdamW over the parameters that require a gradient."""

    def __init__(self, model: LoRATransformer, loader: Loader, learning_rate: float, epochs: int):
        check_rate(learning_rate)
        require(isinstance(epochs, int) and epochs >= 1, "epochs", epochs, "must be an integer >= 1")
        require(len(loader) >= 1, "train_loader", len(loader), "must hold at least one batch")
        self.model, self.loader, self.learning_rate = model, loader, learning_rate
        self.step, self.steps = 0, epochs * len(loader)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=0.0)

    def epoch(self) -> tuple[float, int]:
        """One pass: the mean training loss (nats per target) and the number of targets.

        Raises:
            DivergedError: the loss is no longer a finite number.
        """
        self.model.train()
        total, count = 0.0, 0
        for batch in self.loader:
            loss, targets = summed_loss(self.model, batch)
            if not loss.isfinite():
                raise DivergedError(f"loss is {loss.item()} at step {self.step + 1}: lower learning_rate")
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate * rate(self.step, self.steps)
            self.optimizer.zero_grad(set_to_none=True)
            (loss / max(targets, 1)).backward()
            nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
            self.optimizer.step()
            self.step += 1
            total, count = total + loss.item(), count + targets
        require(count > 0, "train_loader", count, "must hold at least one target")
        return total / count, count


def pretrain(
    model: LoRATransformer,
    loader: Loader,
    epochs: int,
    learning_rate: float = 3e-3,
    log: Callable[[str], None] = lambda line: None,
) -> list[float]:
    """Train every weight of the base and no LoRA factor, then freeze the base.

    Args:
        log: told one line per epoch.

    Returns:
        The mean training loss of each epoch, in nats per token.

    Raises:
        ParameterError: epochs, learning_rate or the loader leaves nothing to do.
        DivergedError: the loss is no longer a finite number.
    """
    model.configure_pretraining()
    loop, losses = Loop(model, loader, learning_rate, epochs), []
    for epoch in range(epochs):
        losses.append(loop.epoch()[0])
        log(f"pretraining, epoch {epoch + 1} of {epochs}: training loss {losses[-1]:.3f}")
    model.configure_lora_training()
    return losses
