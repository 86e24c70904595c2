"""The Hugging Face Trainer with one forward per batch, a gate before the backward, and a ledger of what both cost."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Trainer

from lorakit.gates import AllTokens, AlwaysOpen, Candidate, Gate, TokenSelection
from lorakit.gates.head import HeadInput, find_head
from lorakit.gates.log import GateLog
from lorakit.gates.tokens import count_tokens
from lorakit.training import checkpoint
from lorakit.training.controllers import Controller
from lorakit.training.costs import FlopMeter, Ledger
from lorakit.training.loss import MeanLoss
from lorakit.training.watch import Diverged, Watch


@dataclass
class _Held:
    """A micro-batch between its forward and the decision about its window."""

    loss: torch.Tensor
    options: dict[str, Any]
    key: Hashable
    tokens: int


class GatedTrainer(Trainer):
    """One forward per micro-batch; at the end of a window of accumulated ones the gate decides about their backwards.

    A rejected window leaves weights, moments and gradients as they were. With gradient accumulation the graphs of a
    window's micro-batches stay in memory until its end, which is what one forward and whole windows cost. With several
    processes the measurements are summed over them before the decision, and gradients are averaged by one reduction per
    accepted window.

    Args:
        kind: "classify", "masked" or "causal": how logits and labels belong together.
        gate, tokens: which batches and which tokens get a backward; all of them by default, in which case the weights
            are bitwise those of the plain Trainer.
        controllers: what else acts between steps, in this order.
        Everything else goes to `transformers.Trainer`.

    Raises:
        Diverged: the training loss became NaN or infinite, or `watch.STALLED` batches in a row got no backward.
    """

    def __init__(
        self,
        *,
        kind: str,
        gate: Gate | None = None,
        tokens: TokenSelection | None = None,
        controllers: Sequence[Controller] = (),
        **trainer_arguments: Any,
    ):
        super().__init__(**{"compute_loss_func": MeanLoss(kind)} | trainer_arguments)
        self.kind = kind
        self.gate, self.tokens = gate or AlwaysOpen(), tokens or AllTokens()
        self.controllers = tuple(controllers)
        for controller in self.controllers:
            controller.bind(self.total_over_ranks)
        self.ledger, self.meter, self.gate_log = Ledger(), FlopMeter(), GateLog(self.gate)
        self._head = HeadInput(find_head(self.model, kind)) if self.gate.needs_hidden else None
        self._candidate: Candidate | None = None
        self._facts: dict[str, Any] = {}
        self._shape: Hashable = ()
        self._window: list[_Held] = []
        self._measured: torch.Tensor | None = None
        self.watch = Watch(self.model, self.gate_log)

    # one micro-batch -----------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of one forward pass; in training its FLOPs are counted and the gate will see its outputs."""
        if not model.training:  # evaluation is no candidate and no cost of training
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels, forward = inputs["labels"], super().compute_loss
        tokens = count_tokens(inputs, getattr(self.model.config, "pad_token_id", None))
        self._facts = {
            "examples": len(inputs["input_ids"]),
            "tokens": tokens,
            "tokens_backpropagated": self.tokens.backpropagated(inputs, tokens),
        }
        self._shape = _shape(inputs)
        selected = lambda **batch: self.tokens.forward(model, batch)  # noqa: E731
        (loss, outputs), flops = self.meter.measure(
            self._key("forward"), lambda: forward(selected, inputs, True, num_items_in_batch)
        )
        self.ledger.add(examples=self._facts["examples"], tokens=tokens, flops_forward=flops)
        logits = getattr(outputs, "logits", None)
        logits = None if logits is None else logits.detach()
        self._candidate = Candidate(
            loss=loss.detach(),
            logits=logits,
            labels=labels,
            hidden=self._head.take(logits) if self._head else None,
            kind=self.kind,
            softcap=self._head.head.softcap if self._head else None,
            token_losses=getattr(self.compute_loss_func, "token_losses", None),
        )
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As the Trainer's, but its call of `accelerator.backward` first passes the gate."""
        backward = self.accelerator.backward
        self.accelerator.backward = lambda loss, **options: self._gated(backward, loss, **options)
        try:
            with self._unsynchronised(model):
                return super().training_step(model, inputs, num_items_in_batch)
        finally:
            self.accelerator.backward = backward

    def _unsynchronised(self, model: torch.nn.Module) -> contextlib.AbstractContextManager:
        """DistributedDataParallel expects a backward after each forward it takes part in; a gate's may never come."""
        several = self.gate.selective and self.accelerator.num_processes > 1
        return self.accelerator.no_sync(model) if several else contextlib.nullcontext()

    def _gated(self, backward: Callable[..., None], loss: torch.Tensor, **options: Any) -> None:
        candidate, self._candidate = self._candidate, None
        value = loss.item()
        if not math.isfinite(value):
            raise Diverged(f"training loss is {value} at step {self.ledger.steps + 1}")
        self.ledger.add(loss=value)
        held = _Held(loss, options, self._key("backward"), self._facts["tokens_backpropagated"])
        targets = torch.tensor([float(candidate.targets)], dtype=torch.float64)
        if not self.gate.selective:
            del candidate  # frees the logits' storage as early as the plain Trainer would
            self._open(backward, held, targets)
            return
        self.ledger.add(flops_gate=self.gate.flops(candidate))
        measured = torch.cat([targets, self.gate.measure(candidate)])
        self._measured = measured if self._measured is None else self._measured + measured
        self._window.append(held)
        del candidate
        if self.accelerator.sync_gradients:
            self._close_window(backward)

    def _open(self, backward: Callable[..., None], held: _Held, targets: torch.Tensor) -> None:
        """Without a gate: the backward at once, unless no rank has a label to learn from."""
        learns = self.total_over_ranks(targets).item() > 0
        if learns:
            self._backward(backward, held)
        else:
            self.ledger.add(without_labels=1)
        self.watch.window(learns)

    # one window ----------------------------------------------------------------------------------------

    def _close_window(self, backward: Callable[..., None]) -> None:
        """Decide about the window, on every rank the same, and run its backwards or drop its graphs."""
        window, self._window = self._window, []
        targets, *_ = total = self.total_over_ranks(self._measured) / self.accelerator.num_processes
        self._measured = None
        if targets.item() == 0:  # nothing to learn from; the gate does not count it
            self.ledger.add(without_labels=1)
            self.watch.window(False)
            return
        decision = self.gate.decide(total[1:])
        accept = self._as_first_rank(decision.accept)
        self.gate_log.decided(accept, decision.score)
        if decision.score is not None:
            self.ledger.add(score=decision.score, scored=1)
        if accept:
            for held in window:
                self._backward(backward, held)
            self._average_gradients()
            self.watch.gradients()
        self.watch.window(accept)

    def _backward(self, backward: Callable[..., None], held: _Held) -> None:
        _, flops = self.meter.measure(held.key, lambda: backward(held.loss, **held.options))
        self.ledger.add(accepted=1, flops_backward=flops, tokens_backpropagated=held.tokens)

    def _as_first_rank(self, accept: bool) -> bool:
        """The first process' decision: equal sums should give equal decisions, but one rank must be right."""
        if self.accelerator.num_processes == 1:
            return accept
        own = float(accept) if self.accelerator.is_main_process else 0.0
        return self.total_over_ranks(torch.tensor([own], dtype=torch.float64)).item() > 0

    def _average_gradients(self) -> None:
        """Mean over ranks, in one reduction: what DistributedDataParallel does, which was told not to."""
        if self.accelerator.num_processes == 1:
            return
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        flat = self.accelerator.reduce(torch.cat([g.flatten().float() for g in gradients]), "mean")
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _key(self, kind: str) -> Hashable:
        """What the FLOPs of a pass depend on."""
        return (kind, self._shape, *(controller.signature() for controller in self.controllers))

    def total_over_ranks(self, vector: torch.Tensor) -> torch.Tensor:
        """Sum a float64 vector over all processes."""
        if self.accelerator.num_processes == 1:
            return vector
        return self.accelerator.reduce(vector.to(self.accelerator.device), "sum").cpu()

    # logs and checkpoints ------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's, with the gate's metrics beside the training loss."""
        if "loss" in logs and self.gate.selective and self.ledger.steps:
            logs = logs | self.gate_log.point(self.ledger.steps, self.ledger.accepted_steps)
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            checkpoint.save_weights(self.model, output_dir or self.args.output_dir)


def _shape(inputs: Mapping[str, Any]) -> Hashable:
    return tuple((name, tuple(value.shape)) for name, value in sorted(inputs.items()) if torch.is_tensor(value))
