"""LoRATrainer: train A and B of a LoRATransformer, keep the losses of every epoch, draw them."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING

from lorakit.errors import require
from lorakit.scratch.loop import Loader, Loop, check_rate, evaluate
from lorakit.scratch.transformer import LoRATransformer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

History = dict[str, list[float]]


class LoRATrainer:
    """Trains the LoRA factors of `model` and nothing else (it calls `configure_lora_training`).

    Args:
        model: best with a base that was trained; LoRA on a random frozen base learns little.
        train_loader, val_loader: batches as `loop.Loader` says.
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
        self.history: History = {name: [] for name in ("train_loss", "val_loss", "tokens", "seconds")}
        self.initial_val_loss: float | None = None
        model.configure_lora_training()

    def train(self, epochs: int, log: Callable[[str], None] = lambda line: None) -> History:
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
        loop = Loop(self.model, self.train_loader, self.learning_rate, epochs)
        if self.initial_val_loss is None:
            self.initial_val_loss = evaluate(self.model, self.val_loader)
        for epoch in range(epochs):
            start = perf_counter()
            train_loss, tokens = loop.epoch()
            seconds = perf_counter() - start
            values = train_loss, evaluate(self.model, self.val_loader), tokens, seconds
            for series, value in zip(self.history.values(), values, strict=True):
                series.append(value)
            log(f"epoch {epoch + 1} of {epochs}: validation loss {self.history['val_loss'][-1]:.3f}")
        return self.history

    def plot_training_history(self) -> Figure:
        """Training and validation loss against epochs; the dotted line is the validation loss before LoRA.

        Raises:
            ParameterError: nothing was trained yet.
        """
        from lorakit.analysis import style

        require(bool(self.history["val_loss"]), "history", {}, "is empty: call train() first")
        train, validation = self.history["train_loss"], [self.initial_val_loss, *self.history["val_loss"]]
        with style.context():
            figure = style.figure(3.2)
            axes = figure.subplots()
            # an epoch's training loss is its mean, so it stands in the epoch's middle
            middles, label = [n + 0.5 for n in range(len(train))], "training (mean of an epoch)"
            axes.plot(middles, train, "s--", color=style.COLORS[2], label=label)
            axes.plot(range(len(validation)), validation, "o-", color=style.COLORS[1], label="validation")
            axes.axhline(validation[0], color="0.4", linestyle=":", label="validation before LoRA")
            axes.set(xlabel="epochs", ylabel="loss (nats per token)")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.legend()
        return figure
