"""The Hugging Face Trainer with one forward per batch, a gate before the backward, and a ledger of what both cost."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from transformers.integrations import integration_utils

from lorakit.errors import NotFinite, ParameterError, require
from lorakit.gates.log import GateLog
from lorakit.gates.look import GateLook
from lorakit.head import HeadInput, find_head
from lorakit.modules import set_until
from lorakit.seams import AllTokens, AlwaysOpen, Candidate, Controller, Gate, Selected, TokenSelection
from lorakit.training import checkpoint
from lorakit.training.callback import named
from lorakit.training.costs import SPENT, count_tokens, described
from lorakit.training.loss import LossTrainer, example_statistics
from lorakit.training.state import RunState
from lorakit.training.window import Diverged, Part, Watch, average_gradients, blank


class GatedTrainer(checkpoint.Resuming, LossTrainer):
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
        everything else: goes to `transformers.Trainer`.

    Raises:
        Diverged: the training loss became NaN or infinite, or `window.STALLED` batches in a row got no backward.
        ParameterError: FSDP or DeepSpeed, a controller among the callbacks.
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
        astray = [type(one).__name__ for one in trainer_arguments.get("callbacks") or () if isinstance(one, Controller)]
        require(not astray, "callbacks", astray, "is a controller here: controllers=[…], or its FLOPs go uncounted")
        super().__init__(kind, **trainer_arguments)
        sharded = [name for name in ("fsdp", "deepspeed") if getattr(self, f"is_{name}_enabled")]
        told = "weights in shards are neither counted nor saved here; see params/accelerate/multi_gpu.yaml"
        require(not sharded, "distributed_type", sharded, told)
        self.gate, self.tokens = gate or AlwaysOpen(), tokens or AllTokens()
        if self.tokens.makes_loss:
            why = "chosen tokens, and a loss that is not 'nll', have their own"
            self.require_no_other_loss(why, self.tokens.smoothing)
        for controller in controllers:
            controller.bind(self.total_over_ranks)
            if self.tokens.two_pass:
                controller.bind_two_passes()
        self.run = run = RunState(self.gate, self.tokens, tuple(controllers), GateLog(self.gate), self.total_over_ranks)
        self.ledger, self.meter, self.gate_log, self.controllers = run.ledger, run.meter, run.gate_log, run.controllers
        # where the token selection makes the loss, the gate looks while it does
        self._looks_at = find_head(self.model, kind) if self.gate.needs_hidden and not self.tokens.makes_loss else None
        self._head: HeadInput | None = None  # while it trains
        self._verified = False
        self._mean_loss: float | None = None  # over all labels of the last micro-batch, where only some were trained on
        self.watch = Watch(self.model, self.gate_log)

    def _inner_training_loop(self, *arguments: Any, resume_from_checkpoint: str | None = None, **options: Any) -> Any:
        """As the Trainer's, which calls it anew, with smaller batches, where memory ran out: nothing is left over."""
        self._part, self._window, self._measured = None, [], None
        if resume_from_checkpoint:  # else the next try would go on from where this one ended
            self._load_from_checkpoint(resume_from_checkpoint)
        self.run.begin(resumed=resume_from_checkpoint is not None)
        self._head = HeadInput(self._looks_at) if self._looks_at else None
        try:
            return super()._inner_training_loop(*arguments, resume_from_checkpoint=resume_from_checkpoint, **options)
        except NotFinite as error:  # what looks at logits sees it before there is a loss
            raise Diverged(f"{error} at step {self.ledger.steps + 1}") from None
        finally:
            self.run.end()
            if self._head:
                self._head.remove()

    # one micro-batch -----------------------------------------------------------------------------------

    def _candidate_loss(self, compute_loss, model, inputs, num_items_in_batch=None):
        """The loss of one forward pass in training: its FLOPs are counted and the gate will see its outputs."""
        tokens = count_tokens(inputs, self.model.config)
        main = self._see(inputs)
        self.ledger.add(examples=len(main), tokens=tokens)
        if self.tokens.makes_loss:
            return self._chosen(model, inputs, num_items_in_batch, tokens)
        labels = inputs.get("labels")
        self._find_loss(inputs)
        run = functools.partial(compute_loss, model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        (loss, outputs), flops = self.meter.measure(self._key("forward"), self._whole, run)
        self.ledger.add(flops_forward=flops)
        logits = None if (found := getattr(outputs, "logits", None)) is None else found.detach()
        if self.gate.needs_hidden:
            classes = not labels.is_floating_point() and logits.shape[-1] > 1
            require(classes, "labels", labels.dtype, f"gate {self.gate.name!r} needs classes: no regression, no sets")
        seen = {"kind": self.kind, "token_losses": getattr(self.compute_loss_func, "token_losses", None)}
        if self._head:
            seen |= {"hidden": self._head.take(logits), "softcap": self._head.head.softcap}
        candidate = Candidate(loss.detach(), logits, labels, **seen)
        targets = len(main) if labels is None else candidate.targets
        self._part = Part((self._key("backward"), self._whole), tokens, targets, candidate)
        return loss

    def _see(self, inputs) -> torch.Tensor:
        """Take note of what the FLOPs of the coming passes depend on; the main input."""
        # the shape of its tensors, "T" where they are as long as the batch; T and T², of which FLOPs are made
        main, self._shape, self._whole = described(inputs)
        for controller in self.controllers:
            controller.begin_batch(inputs)
        return main

    def _chosen(self, model, inputs, num_items_in_batch, tokens: int) -> torch.Tensor:
        """The loss that the token selection makes; nothing yet where a gate may still reject the batch."""
        batch = dict(inputs)
        labels = batch.pop("labels")
        if not self._verified and self.tokens.divisor(labels):
            self.tokens.verify(self.model, batch, labels)
            self._verified = True
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        per_chosen = processes / max(int(num_items_in_batch), 1)
        per_label = processes / max(int(self._labels_in_window), 1)
        seen = GateLook(self.gate, per_label, self.tokens.head) if self.gate.selective else None
        sizes = (*self._whole, *self.tokens.sizes(labels, seen))
        try:
            select = functools.partial(self.tokens.select, model, batch, labels, seen)
            selected, flops = self.meter.measure(self._key("forward"), sizes, select)
        except ParameterError as error:
            if error.name != "logits":
                raise
            seen = GateLook(self.gate, per_label, self.tokens.head) if seen else None  # what a batch without labels is
            self._part = Part(("", ()), tokens, 0, measured=seen and seen.measured(), loss=math.nan)
            return labels.new_zeros((), dtype=torch.float32)
        self.ledger.add(flops_forward=flops, flops_gate=selected.flops)
        whole = selected.backpropagated is None
        cost = (self._key("backward", selected.chosen > 0), self._whole if whole else selected.ran)
        self._part = part = Part(cost, tokens if whole else selected.backpropagated, selected.predictions)
        if selected.loss_sum is not None:
            part.loss = selected.loss_sum.item() * per_label
        part.finish = lambda: self._finished(selected, per_chosen)
        if seen is None:
            loss, part.finish = part.finish(), None
            return loss
        labelled = Candidate(torch.zeros(()), None, labels, kind=self.kind)  # its FLOPs depend on the labels only
        part.measured, part.gate_flops = seen.measured(), self.gate.flops(labelled)
        return labels.new_zeros((), dtype=torch.float32)  # stands for what `finish` gives where the gate accepts

    def _finished(self, selected: Selected, per_chosen: float) -> torch.Tensor:
        key = self._key("finish", selected.made, selected.chosen > 0)
        loss, flops = self.meter.measure(key, (*selected.ran, *selected.head), selected.finish)
        self.ledger.add(flops_forward=flops)
        return loss * per_chosen

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """A window, and its labels on all ranks; where tokens are chosen, what *their* losses are divided by."""
        if self.gate.candidates > 1:
            epoch_iterator = map(self._best_rows, epoch_iterator)
        samples, labels = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._labels_in_window = labels
        if not self.tokens.selective or labels is None:
            return samples, labels
        divisor = torch.tensor(sum(self.tokens.divisor(batch["labels"]) for batch in samples), device=device)
        several = self.args.average_tokens_across_devices and self.args.world_size > 1
        return samples, self.accelerator.gather(divisor).sum() if several else divisor

    def _best_rows(self, batch):
        """Of a candidate batch the rows that the gate chooses, after one forward of all of them without a graph."""
        self.model.train()  # as `training_step` does: after an evaluation it is not
        inputs = self._prepare_inputs(batch)
        look = functools.partial(self.gate.look, self.model, inputs, self._statistics)
        with torch.random.fork_rng([d for d in (self.model.device,) if d.type == "cuda"]):  # a resumed one's is late
            torch.manual_seed(self.args.seed + self.ledger.steps)
            self._see(inputs)
            sizes = (*self._whole, *(self.tokens.sizes(inputs["labels"], look) if self.tokens.makes_loss else ()))
            seen, flops = self.meter.measure(self._key("candidates"), sizes, look)
        rows = self.gate.rows(*seen, inputs["labels"], self._head)
        best = self.gate.choose(inputs, rows, self.gate_log, self.total_over_ranks)
        tokens = count_tokens(inputs, self.model.config) - count_tokens(best, self.model.config)
        looked = {"examples": len(rows) - len(best["labels"]), "tokens": tokens} if flops else {}  # others: seen, too
        self.ledger.add(flops_gate=flops + sum(map(self.gate.flops, rows)), **looked)
        return best

    def _statistics(self, model, inputs, labels) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Per example (B, 4), see `example_statistics`, and the logits where they are held."""
        with self.compute_loss_context_manager():
            if self.tokens.makes_loss:
                return self.tokens.statistics(model, inputs, labels), None
            logits = model(**inputs).logits
            return example_statistics(logits, labels, self.kind), logits

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As the Trainer's, but `compute_loss` is counted, and `accelerator.backward` first passes the gate."""
        with contextlib.ExitStack() as stack, self.accelerator.no_sync(model):  # DDP expects one forward a backward
            stack.callback(setattr, self, "compute_loss", self.compute_loss)
            stack.callback(setattr, self.accelerator, "backward", self.accelerator.backward)
            self.compute_loss = functools.partial(self._candidate_loss, self.compute_loss)
            self.accelerator.backward = functools.partial(self._gated, self.accelerator.backward)
            loss = super().training_step(model, inputs, num_items_in_batch)
        return loss if self._mean_loss is None else torch.full_like(loss, self._mean_loss)

    def _gated(self, backward: Callable[..., None], loss: torch.Tensor, **options: Any) -> None:
        part, self._part = self._part, None
        self._mean_loss = part.loss
        value = loss.item() if part.loss is None else part.loss
        finite = math.isfinite(value)
        if self.accelerator.num_processes == 1:
            self.watch.finite(not finite, self.ledger.steps + 1, value)
        self.ledger.add(loss=value)
        part.finish, part.options = part.finish or (lambda: loss), options
        targets = torch.tensor([float(part.targets), float(not finite)], dtype=torch.float64)
        if not self.gate.selective:
            part.candidate = None  # frees the logits' storage as early as the plain Trainer would
        if part.candidate is not None:
            candidate = dataclasses.replace(part.candidate, loss=loss.detach())  # divided, where the Trainer does that
            candidate = candidate if finite else blank(candidate)
            part.measured, part.gate_flops = self.gate.measure(candidate), self.gate.flops(candidate)
            part.candidate = None
        self.ledger.add(flops_gate=part.gate_flops)
        measured = torch.cat([targets, part.measured]) if self.gate.selective else targets
        self._measured = measured if self._measured is None else self._measured + measured
        self._window.append(part)
        if self.accelerator.sync_gradients or not self.gate.selective:  # without a gate the backward comes at once
            self._close_window(backward)

    # one window ----------------------------------------------------------------------------------------

    def _close_window(self, backward: Callable[..., None]) -> None:
        """Decide about the window, on every rank the same, and run its backwards or drop its graphs."""
        window, self._window = self._window, []
        targets, broken, *_ = total = self.total_over_ranks(self._measured) / self.accelerator.num_processes
        self._measured = None
        self.watch.finite(broken, self.ledger.steps + 1)
        if not (learns := targets.item() > 0):  # from no rank's; the gate does not count it
            self.ledger.add(without_labels=1)
        if accept := learns and (not self.gate.selective or self._accepts(total[2:])):
            for part in window:
                self._backward(backward, part)
        if self.accelerator.sync_gradients:
            if accept or not self.gate.selective:  # of a window's batches one may have been without labels
                average_gradients(self.model, self.accelerator)
            if accept:
                self.watch.gradients()
        self.watch.window(accept)

    def _accepts(self, measured: torch.Tensor) -> bool:
        accept = (decision := self.gate.decide(measured)).accept
        if self.accelerator.num_processes > 1:  # equal sums should decide alike, but one rank must be right: the first
            own = float(accept and self.accelerator.is_main_process)
            accept = self.total_over_ranks(torch.tensor([own], dtype=torch.float64)).item() > 0
        self.gate_log.decided(accept, decision.score)
        if decision.score is not None:
            self.ledger.add(score=decision.score, scored=1)
        return accept

    def _backward(self, backward: Callable[..., None], part: Part) -> None:
        loss, flops = part.finish(), 0
        if loss.requires_grad:
            _, flops = self.meter.measure(*part.cost, lambda: backward(loss, **part.options))
        self.ledger.add(accepted=1, flops_backward=flops, tokens_backpropagated=part.tokens)

    def _key(self, kind: str, *more: Hashable) -> Hashable:
        """What the FLOPs of a pass depend on, beside its sizes."""
        return (kind, self._shape, *more, *(controller.signature() for controller in self.controllers))

    def total_over_ranks(self, vector: torch.Tensor) -> torch.Tensor:
        """Sum a float64 vector over all processes."""
        if self.accelerator.num_processes == 1:
            return vector
        return self.accelerator.reduce(vector.to(self.accelerator.device), "sum").cpu()

    # logs and checkpoints ------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's, with what was spent and, beside the training loss, the gate's metrics; no `total_flos`."""
        logs.pop("total_flos", None)  # an estimate, and not what the ledger counts: not in what `train` returns either
        told = logs | {name: getattr(self.ledger, name) for name in SPENT}
        if "loss" in logs and (self.gate.selective or self.gate.candidates > 1):
            told |= self.gate_log.point(self.ledger.steps, self.ledger.accepted_steps)
        with contextlib.ExitStack() as stack:
            set_until(stack, integration_utils, rewrite_logs=named)  # which trackers ask for names
            super().log(told, start_time)
