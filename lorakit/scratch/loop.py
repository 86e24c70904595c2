"""Text as rows of bytes, and one loop that trains a base (all its weights) and then LoRA on it (only A and B).

The target at each position is the byte that comes next; AdamW, linear warm-up and decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lorakit.errors import DataError, LorakitError, require
from lorakit.head import IGNORED
from lorakit.scratch.transformer import LoRATransformer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Log = Callable[[str], None]
VOCAB_SIZE = 256
WARMUP = 0.05  # share of the steps
MAX_GRAD_NORM = 1.0


class DivergedError(LorakitError):
    """The loss is no longer a finite number."""

    status = 1


class Loader(Sized, Iterable[Sequence[Tensor] | Mapping[str, Tensor]], Protocol):
    """Batches of (input_ids, labels) or (input_ids, labels, attention_mask), each (B, T), or dicts of these names.

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


def byte_loader(texts: Sequence[str], length: int, batch_size: int, shuffle: bool = False, seed: int = 0) -> DataLoader:
    """Batches of (input_ids, labels), each (B, length); two loaders of one seed shuffle alike.

    Raises:
        ParameterError: length or batch_size below 1.
        DataError: the texts do not fill one row.
    """
    require(batch_size >= 1, "batch_size", batch_size, "must be >= 1")
    rows = byte_rows(texts, length)
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(rows[:, :-1], rows[:, 1:]), batch_size, shuffle, generator=generator)


def rate(step: int, steps: int) -> float:
    """Factor on the learning rate at `step` of 0 … steps - 1: up over the first 5 %, then down towards zero.

    A function of the step alone: a schedule rebuilt from the last rate would shrink with every resumed training.
    """
    warmup = max(1, round(WARMUP * steps))
    return min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))


def summed_loss(model: LoRATransformer, batch: Sequence[Tensor] | Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """Cross-entropy summed over a batch's targets, in nats, and the number of targets."""
    device = model.embedding.weight.device
    if isinstance(batch, Mapping):  # what else a collator put into it is not looked at
        batch = [batch[name] for name in ("input_ids", "labels", "attention_mask") if name in batch]
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


def check_rate(learning_rate: float) -> None:
    """Refuse a learning rate that is not a positive number."""
    require(0 < learning_rate < math.inf, "learning_rate", learning_rate, "must be a number > 0")


def passes(model: LoRATransformer, loader: Loader, learning_rate: float, epochs: int) -> Iterator[tuple[float, int]]:
    """Epochs of AdamW over the parameters that require a gradient: the mean loss (nats per target) and the targets.

    Raises:
        ParameterError: epochs, learning_rate or the loader leaves nothing to do.
        DivergedError: the loss is no longer a finite number.
    """
    check_rate(learning_rate)
    require(isinstance(epochs, int) and epochs >= 1, "epochs", epochs, "must be an integer >= 1")
    require(len(loader) >= 1, "train_loader", len(loader), "must hold at least one batch")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    for epoch in range(epochs):
        model.train()
        total, count = 0.0, 0
        for step, batch in enumerate(loader, epoch * len(loader)):
            loss, targets = summed_loss(model, batch)
            if not loss.isfinite():
                raise DivergedError(f"loss is {loss.item()} at step {step + 1}: lower learning_rate")
            optimizer.param_groups[0]["lr"] = learning_rate * rate(step, epochs * len(loader))
            optimizer.zero_grad(set_to_none=True)
            (loss / max(targets, 1)).backward()
            nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            optimizer.step()
            total, count = total + loss.item(), count + targets
        require(count > 0, "train_loader", count, "must hold at least one target")
        yield total / count, count


def pretrain(
    model: LoRATransformer, loader: Loader, epochs: int, learning_rate: float, log: Log = lambda line: None
) -> list[float]:
    """Train every weight of the base and no LoRA factor, then freeze the base.

    Args:
        log: told one line per epoch.

    Returns:
        The mean training loss of each epoch, in nats per token.

    Raises:
        ParameterError, DivergedError: see `passes`.
    """
    model.configure_pretraining()
    losses = []
    for loss, _ in passes(model, loader, learning_rate, epochs):
        losses.append(loss)
        log(f"pretraining, epoch {len(losses)} of {epochs}: training loss {loss:.3f}")
    model.configure_lora_training()
    return losses


class LoRATrainer:
    """Trains the LoRA factors of `model` and nothing else (it calls `configure_lora_training`).

    Args:
        model: best with a base that was trained; LoRA on a random frozen base learns little.
        train_loader, val_loader: batches as `Loader` says.
        learning_rate: of AdamW, at the top of its schedule.

    Attributes:
        history: what `train` returns.
        initial_val_loss: before the first training; None until then.

    Raises:
        ParameterError: learning_rate is not a positive number.
    """

    def __init__(self, model: LoRATransformer, train_loader: Loader, val_loader: Loader, learning_rate: float):
        check_rate(learning_rate)
        self.model, self.train_loader, self.val_loader = model, train_loader, val_loader
        self.learning_rate = learning_rate
        self.history: dict[str, list[float]] = {name: [] for name in ("train_loss", "val_loss", "tokens", "seconds")}
        self.initial_val_loss: float | None = None
        model.configure_lora_training()

    def train(self, epochs: int, log: Log = lambda line: None) -> dict[str, list[float]]:
        """Train for `epochs` passes; a second call goes on from the first, with a schedule of its own.

        Args:
            log: told one line per epoch.

        Returns:
            One entry per epoch: train_loss (mean over the epoch) and val_loss (after it), in nats per token; tokens
            (targets of the epoch) and seconds (of its training).

        Raises:
            ParameterError: epochs < 1, or a loader without targets.
            DivergedError: the loss is no longer a finite number.
        """
        self.model.configure_lora_training()
        if self.initial_val_loss is None:
            self.initial_val_loss = evaluate(self.model, self.val_loader)
        start = perf_counter()
        for epoch, (train_loss, tokens) in enumerate(passes(self.model, self.train_loader, self.learning_rate, epochs)):
            seconds = perf_counter() - start
            values = train_loss, evaluate(self.model, self.val_loader), tokens, seconds
            for series, value in zip(self.history.values(), values, strict=True):
                series.append(value)
            log(f"epoch {epoch + 1} of {epochs}: validation loss {self.history['val_loss'][-1]:.3f}")
            start = perf_counter()
        return self.history

    def plot_training_history(self) -> Figure:
        """Training and validation loss against epochs; the dotted line is the validation loss before LoRA.

        Raises:
            ParameterError: nothing was trained yet.
        """
        from lorakit.analysis import style

        require(bool(self.history["val_loss"]), "history", {}, "is empty: call train() first")
        train, validation = self.history["train_loss"], [self.initial_val_loss, *self.history["val_loss"]]
        with style.panel(3.2) as axes:
            # an epoch's training loss is its mean, so it stands in the epoch's middle
            middles, label = [n + 0.5 for n in range(len(train))], "training (mean of an epoch)"
            axes.plot(middles, train, "s--", color=style.COLORS[2], label=label)
            axes.plot(range(len(validation)), validation, "o-", color=style.COLORS[1], label="validation")
            axes.axhline(validation[0], color="0.4", linestyle=":", label="validation before LoRA")
            axes.set(xlabel="epochs", ylabel="loss (nats per token)")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.legend()
            return axes.get_figure()
