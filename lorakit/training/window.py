"""An optimizer step's window: its micro-batches before the decision, their gradients, and whether any come to be."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lorakit.errors import require
from lorakit.gates.log import GateLog
from lorakit.modules import adapter_parameters
from lorakit.seams import Candidate

STALLED = 2000  # batches in a row without a backward after which the run is ended
GRADIENTS_BY = 3  # accepted batches after which an adapter must have had a gradient


@dataclass
class Part:
    """A micro-batch between its forward and the decision about its window.

    cost: key and sizes of its backward, see `FlopMeter.measure`.
    tokens: how many a backward passes through; targets: labels it has.
    candidate: what the gate will look at; or measured, gate_flops: what it found while the tokens were chosen.
    loss: mean over all labels where the one to backpropagate is of chosen tokens only, else None.
    finish: runs what is left of the forward, if anything, and gives the loss to backpropagate.
    """

    cost: tuple[Hashable, tuple[int, ...]]
    tokens: int
    targets: int
    candidate: Candidate | None = None
    measured: Tensor | None = None
    gate_flops: float = 0.0
    loss: float | None = None
    finish: Callable[[], Tensor] | None = None
    options: dict[str, Any] = field(default_factory=dict)


def blank(candidate: Candidate) -> Candidate:
    """One of the same shapes that is finite: its measurement is as long, and will not be read."""
    seen = {name: getattr(candidate, name) for name in ("loss", "logits", "hidden")}
    zeros = {name: torch.zeros_like(value) for name, value in seen.items() if value is not None}
    return replace(candidate, token_losses=None, maxima=None, **zeros)


def average_gradients(model: nn.Module, accelerator: Accelerator) -> None:
    """Mean over ranks, in one reduction: what DistributedDataParallel does, which was told not to.

    A rank whose batches had nothing to learn from has no gradients; it takes part with zeros.
    """
    if accelerator.num_processes == 1:
        return
    trained = [p for p in model.parameters() if p.requires_grad]
    present = torch.tensor([p.grad is not None for p in trained], device=accelerator.device).float()
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    flat = accelerator.reduce(torch.cat([present, *(g.flatten().float() for g in parts)]), "mean")
    present, *means = flat.split([len(trained), *(p.numel() for p in trained)])
    for parameter, part, mean, anywhere in zip(trained, parts, means, present.tolist(), strict=True):
        if anywhere:
            part.copy_(mean.view_as(part))
            parameter.grad = part


class Diverged(Exception):
    """The loss is not a finite number any more, or no batch is accepted any more; the message says where."""


def leaves_layers_out(model: nn.Module) -> bool:
    """Whether the configuration says that a forward may leave layers out: LayerDrop, a mixture of experts."""
    config = getattr(model, "config", None)
    told = config.to_dict() if hasattr(config, "to_dict") else {}
    parts = [told, *(part for part in told.values() if isinstance(part, dict))]
    numbers = [(name, of) for part in parts for name, of in part.items() if isinstance(of, (int, float))]
    return any(of > 0 for name, of in numbers if "layerdrop" in name or "experts" in name)


class Watch:
    """Looks at `model` after every window; warnings go to `log`."""

    def __init__(self, model: nn.Module, log: GateLog):
        self.log, self.adapted = log, adapter_parameters(model)
        self.without_backward = self.windows = 0
        self.layers = {path: module for path, module in model.named_modules() if hasattr(module, "adapter_parameters")}
        self.count = len(self.layers)  # of which those that a gradient reached leave
        self.refuses = False  # what the loss does not reach: a model of one's own may leave layers out now and then

    def finite(self, broken: float, step: int, loss: float | str = "not finite in one of the processes") -> None:
        """Every process stops where the loss of one is not finite, before they wait for each other.

        Raises:
            Diverged: `broken` of them.
        """
        if broken:
            raise Diverged(f"training loss is {loss} at step {step}")

    def window(self, trained: bool) -> None:
        """A window got its backward, or was rejected or without labels.

        Raises:
            Diverged: `STALLED` of them in a row got none.
        """
        self.without_backward = 0 if trained else self.without_backward + 1
        if self.without_backward >= STALLED:
            raise Diverged(f"{STALLED} batches in a row had no label or were rejected (gate {self.log.gate.name!r})")

    def gradients(self) -> None:
        """A window was accepted and its gradients are there, or in the first `GRADIENTS_BY` they are not: told then.

        Raises:
            ParameterError: if `refuses`, in the first: of some adapters no parameter has one, of others some has.
        """
        by = 1 if self.refuses else GRADIENTS_BY
        self.windows += 1
        if self.windows <= by:
            for path, layer in [*self.layers.items()]:
                trained = [p for p in layer.adapter_parameters().values() if p.requires_grad]
                skipped = (probe := getattr(layer, "probe", None)) is not None and not probe.active
                if skipped or not trained or any(p.grad is not None for p in trained):
                    del self.layers[path]
            if self.windows == by and 0 < len(self.layers) < self.count:
                told = f"no gradient reached {len(self.layers)} adapters by step {by}: the loss does not depend on "
                told += f"{', '.join([*self.layers][:8])}; name the layers it depends on"
                require(not self.refuses, "target_modules", next(iter(self.layers)), told)
                self.log.warn(f"target_modules: {told}")
        if any(p.grad is not None and bool(p.grad.any()) for p in self.adapted):
            self.adapted = []  # they get one: never look again
        if self.adapted and self.windows == GRADIENTS_BY:
            asked = "is it attached to layers that take part in the forward, and does it require gradients?"
            self.log.warn(f"no gradient reached an adapter in the first {GRADIENTS_BY} accepted batches: {asked}")
