"""Zeros while training: after each optimizer step p ← prox(p, lr·λ) or p ← p ⊙ mask, with the mask on ∂p as well."""

import functools
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.layer import ADAPTERS
from lorakit.adapters.lora import LoRALayer
from lorakit.adapters.sparse import FACTORS, best_path, has_path, prox, prunable_layers, prune_smallest
from lorakit.adapters.zeros import sparsity_report
from lorakit.fields import Settings
from lorakit.seams import Controller
from lorakit.settings import SparseSettings

STRIDE = 0.01  # masks are chosen anew when the target has risen by this share of its end value, or has reached it


def due(settings: SparseSettings, share: float) -> float:
    """s(t): the share of zeros due when `share` of the budget is spent (Zhu & Gupta 2017)."""
    passed = min(max((share - settings.prune_start) / (settings.prune_end - settings.prune_start), 0.0), 1.0)
    return settings.sparsity * (1 - (1 - passed) ** 3)


class Sparsifier(Controller):
    """Puts zeros into the LoRA factors of `model`, as `settings` say, and keeps them there.

    What is pruned stays pruned: its gradient is zeroed before clipping and Adam see it, and after each step its weight
    and its moments are zeroed. Moments that cannot be masked (8-bit states are stored in another type) keep what they
    had, which without a gradient decays; the weight is zeroed all the same.

    "magnitude" zeroes the smallest entries of each matrix, "structured" whole ranks, for `compact`.

    "l1" takes one proximal step after each optimizer step between `prune_start` and `prune_end`, with threshold λ times
    the learning rate of that step; zeros may leave again. (Under Adam this is not the exact proximal step of
    loss + λ‖p‖₁, whose threshold would be divided by √v as the step is.) With λ to be found, each matrix gets at each
    step the smallest λ that makes as many entries zero as are due. At `prune_end` zeros are frozen and the penalty
    stops: the rest of the budget trains what is left without shrinkage.

    Every layer keeps one rank with a living entry in both factors: one without has no gradient and is dead for ever.
    A step that trained nothing (a rejected batch, an overflow) prunes nothing; the next one catches up. An adapter
    without a gradient (skipped) is not shrunk, but is pruned when its time has come. After `end()` the gradients are
    free again: who trains on would see zeros come back.

    Raises:
        LorakitError: `model` has no LoRA.
        ParameterError: the sparsity leaves nothing of a matrix.
    """

    name = "sparsity"
    kept = ("share", "due", "penalty", "pruned", "history")

    def __init__(self, model: nn.Module, settings: SparseSettings):
        self.model, self.settings = model, settings
        self.layers = prunable_layers(model, settings)
        self.pruned: dict[str, Tensor] = {}  # masks by parameter, True where pruned; empty before the first pruning
        self.share = self.due = self.penalty = 0.0
        self.history: list[list[float | None]] = []
        self._hooks = ExitStack()

    # between the steps ---------------------------------------------------------------------------------

    def begin(self) -> None:
        self.pruned = {name: self.pruned[name].to(p.device) for name, p in self._factors() if name in self.pruned}
        for name, parameter in self._factors():
            if parameter.requires_grad:
                self._hooks.enter_context(parameter.register_hook(functools.partial(self._masked, name)))

    def end(self) -> None:
        self._hooks.close()

    @torch.no_grad()
    def after_step(self, share: float, optimizer: torch.optim.Optimizer) -> None:
        self.share = share
        # skipped by a gradient scaler
        if getattr(optimizer, "step_was_skipped", False) or all(p.grad is None for _, p in self._factors()):
            return
        if self.settings.sparsify == "l1":
            self._shrink_or_freeze(share, optimizer)
        else:
            target, end = due(self.settings, share), self.settings.sparsity
            if target > self.due and (target == end or target - self.due >= STRIDE * end):
                self.prune_to(target)
        self._hold(optimizer)

    def at_point(self, step: int) -> None:
        target = None if self.settings.l1 > 0 else due(self.settings, self.share)
        self.history.append([step, target, self.reached()])

    def _factors(self) -> Iterator[tuple[str, nn.Parameter]]:
        for path, layer in self.layers.items():
            for factor in FACTORS[self.settings.sparse_factors]:
                yield f"{path}.{factor}", getattr(layer, factor)

    # pruning -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prune_to(self, target: float) -> None:
        """Prune each matrix (structured: the ranks of each layer) to the share `target` of zeros."""
        for path, layer in self.layers.items():
            grown = self._ranks_pruned if self.settings.sparsify == "structured" else self._entries_pruned
            self.pruned |= grown(path, layer, target)
        self.due = target
        for name, parameter in self._factors():
            parameter.masked_fill_(self.pruned[name], 0)

    def _mask(self, path: str, layer: LoRALayer, factor: str) -> Tensor:
        return self.pruned.get(f"{path}.{factor}", torch.zeros_like(getattr(layer, factor), dtype=torch.bool))

    def _entries_pruned(self, path: str, layer: LoRALayer, target: float) -> dict[str, Tensor]:
        masks = {factor: self._mask(path, layer, factor) for factor in FACTORS["both"]}
        last = best_path(layer.lora_A, layer.lora_B, *masks.values())
        grown = {}
        for factor in FACTORS[self.settings.sparse_factors]:
            scores = getattr(layer, factor).abs()
            scores.view(-1).index_fill_(0, last[factor], torch.inf)
            grown[f"{path}.{factor}"] = prune_smallest(scores, masks[factor], round(target * scores.numel()))
        return grown

    def _ranks_pruned(self, path: str, layer: LoRALayer, target: float) -> dict[str, Tensor]:
        A, B = layer.lora_A, layer.lora_B
        known = self._mask(path, layer, "lora_A").all(1)
        # (r,), ‖A_k‖·‖B_k‖: the Frobenius norm of the rank's term B_k A_k of BA
        ranks = prune_smallest(A.norm(dim=1) * B.norm(dim=0), known, round(target * len(known)))
        return {f"{path}.lora_A": ranks[:, None].expand_as(A), f"{path}.lora_B": ranks[None, :].expand_as(B)}

    def _masked(self, name: str, gradient: Tensor) -> Tensor | None:
        return gradient.masked_fill(self.pruned[name], 0) if name in self.pruned else None

    def _hold(self, optimizer: torch.optim.Optimizer) -> None:
        """Zero the weights that are pruned, and every state of theirs that is a plain tensor of the same shape."""
        if not self.pruned:
            return
        for name, parameter in self._factors():
            for tensor in (parameter, *filter(torch.is_tensor, optimizer.state.get(parameter, {}).values())):
                if tensor.shape == parameter.shape and tensor.is_floating_point():
                    tensor.masked_fill_(self.pruned[name], 0)

    # shrinking -----------------------------------------------------------------------------------------

    def _shrink_or_freeze(self, share: float, optimizer: torch.optim.Optimizer) -> None:
        if share < self.settings.prune_start or self.pruned:
            return
        rates = {p: float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        if penalties := [found for layer in self.layers.values() for found in self._shrink(layer, rates, share)]:
            self.penalty = float(torch.stack(penalties).mean())
        if share >= self.settings.prune_end:
            # what is zero now stays so, except in a layer that has no rank alive: its B was never trained
            for path, layer in self.layers.items():
                alive = has_path(layer.lora_A, layer.lora_B)
                for factor in FACTORS[self.settings.sparse_factors]:
                    self.pruned[f"{path}.{factor}"] = (getattr(layer, factor) == 0) & alive

    def _shrink(self, layer: LoRALayer, rates: dict[nn.Parameter, float], share: float) -> list[Tensor]:
        """One proximal step on a layer's factors; the λ of each."""
        A, B = layer.lora_A, layer.lora_B
        alive, last = has_path(A, B), best_path(A, B, A == 0, B == 0)
        factors = {factor: getattr(layer, factor) for factor in FACTORS[self.settings.sparse_factors]}
        kept = {factor: parameter.view(-1)[last[factor]] for factor, parameter in factors.items()}
        found = []
        for parameter in factors.values():
            if parameter.grad is None or (rate := rates.get(parameter, 0.0)) <= 0:
                continue
            if self.settings.l1 > 0:
                threshold = parameter.new_tensor(rate * self.settings.l1)
            else:  # the smallest that leaves as many zeros as are due
                count = round(due(self.settings, share) * parameter.numel())
                threshold = parameter.abs().flatten().kthvalue(count).values if count else parameter.new_zeros(())
            parameter.copy_(prox(parameter, threshold))
            found.append(threshold / rate)
        lost = alive & ~has_path(A, B)
        # a layer that has lost its last rank gets the entries of its best one back
        for factor, parameter in factors.items():
            entry = parameter.view(-1)[last[factor]]
            parameter.view(-1).index_copy_(0, last[factor], torch.where(lost, kept[factor], entry))
        return found

    # what is known -------------------------------------------------------------------------------------

    def reached(self) -> float:
        """The share of zeros now, over all matrices chosen; structured: of ranks zero in both factors."""
        if self.settings.sparsify == "structured":
            zero = [(la.lora_A == 0).all(1) & (la.lora_B == 0).all(0) for la in self.layers.values()]
        else:
            zero = [parameter == 0 for _, parameter in self._factors()]
        return float(torch.stack([mask.sum() for mask in zero]).sum()) / sum(mask.numel() for mask in zero)

    def report(self) -> dict[str, Any]:
        """The model's zeros as they are now (before `compact`, which removes them), and how they came."""
        settings, target = self.settings, None if self.settings.l1 > 0 else self.settings.sparsity
        asked = {"kind": settings.sparsify, "factors": settings.sparse_factors, "target": target}
        came = {"reached": self.reached(), "l1": settings.l1 or self.penalty, "history": self.history}
        return asked | came | sparsity_report(self.model)


class SparseLoRALayer(LoRALayer):
    """LoRA, whose zeros training puts there."""

    @staticmethod
    def controllers(model: nn.Module, run: Settings) -> list[Controller]:
        return [Sparsifier(model, run)]


ADAPTERS["sparse"] = SparseLoRALayer
