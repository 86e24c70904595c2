"""A PEFT method's own schedule: AdaLoRA's ranks r_t = r_T + (r_0 - r_T)(1 - t/T)³ after step t, and its penalty."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lorakit.seams import Controller


class PeftSchedule(Controller):
    """Calls PEFT's `update_and_allocate(t)` after the t-th optimizer step that had a gradient; for others does nothing.

    AdaLoRA's loss has a term w/n Σ ‖PᵀP − I‖ over its n factors, which PEFT adds where the model computes its own
    loss. The trainer computes it outside, so the term's gradient is added here, after clipping; the loss that is shown
    is the task's alone.

    Args:
        model: what `attach` returned, of any method.
    """

    name = "peft"

    def __init__(self, model: nn.Module):
        tuner = getattr(model, "base_model", None)
        self.tuner: Any = tuner if hasattr(tuner, "update_and_allocate") else None
        self.allocator: Any = getattr(self.tuner, "rankallocator", None)  # AdaLoRA's
        self.step = 0
        self._hook = ExitStack()

    def begin(self) -> None:
        self.end()  # begun again, after a batch that was too large
        if self.allocator is not None:
            self._hook.enter_context(register_optimizer_step_pre_hook(self._add_penalty))

    def end(self) -> None:
        self._hook.close()

    def after_step(self, share: float, optimizer: torch.optim.Optimizer) -> None:
        # else nothing was learned about the importance of a rank
        if self.tuner is not None and all(p.grad is not None for _, p in self._adapters()):
            self.step += 1
            self.tuner.update_and_allocate(self.step)

    def report(self) -> dict[str, Any]:
        """Steps of the schedule, and with AdaLoRA the ranks left, by layer."""
        if self.tuner is None:
            return {}
        values = {name.split(".lora_E")[0]: p for name, p in self._adapters() if ".lora_E" in name}
        return {"steps": self.step, "ranks": {path: int(p.count_nonzero()) for path, p in values.items()}}

    def state_dict(self) -> dict[str, Any]:
        if self.allocator is None:
            return {"step": self.step}
        pattern = self.allocator.peft_config.rank_pattern
        return {"step": self.step, "rank_pattern": pattern} | {name: getattr(self.allocator, name) for name in _SCORES}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        if self.allocator is not None:
            self.allocator.peft_config.rank_pattern = state["rank_pattern"]
            devices = {name: p.device for name, p in self.tuner.model.named_parameters()}
            for score in _SCORES:
                setattr(self.allocator, score, {name: value.to(devices[name]) for name, value in state[score].items()})

    def _adapters(self) -> Iterator[tuple[str, Tensor]]:
        """The tuner's trained tensors by name; those of modules trained in full are not among them."""
        return ((name, p) for name, p in self.tuner.model.named_parameters() if self.tuner.prefix in name)

    def _add_penalty(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        factors = [(name, p) for name, p in self._adapters() if ".lora_A." in name or ".lora_B." in name]
        if not (learning := [(name, p) for name, p in factors if p.grad is not None and id(p) in owned]):
            return
        with torch.enable_grad():
            products = [p @ p.T if ".lora_A." in name else p.T @ p for name, p in learning]
            terms = [torch.linalg.matrix_norm(product - torch.eye(len(product)).to(product)) for product in products]
            penalty = self.allocator.peft_config.orth_reg_weight * torch.stack(terms).mean()
        for (_, p), gradient in zip(learning, torch.autograd.grad(penalty, [p for _, p in learning]), strict=True):
            p.grad.add_(gradient)


_SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
