"""One adapter's switch and meter, M = ‖Δh‖₂ / ‖h‖₂, which the layer calls in its forward while SkipLoRA trains."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError


@dataclass
class Probe:
    """One adapter's switch and meter, called by the layer in its forward.

    Attributes:
        path: of the adapted layer.
        parameters: A and B.
        active: whether A and B get a gradient.
        measuring: whether the coming forwards are measured.
        squares: sums of ‖Δh‖² and ‖h‖² since they were last taken, (2,) on the model's device, or None.
        decide: asked in the forward, where that is how to decide: (this probe) to whether it is active.
        refuse_gradient: an inactive adapter whose input needs a gradient is an error: the cut would be undone.
        valid: (B·T,) weights of the batch's tokens, 1 or 0, or None for all; set for every batch.
    """

    path: str
    parameters: tuple[nn.Parameter, nn.Parameter]
    active: bool = True
    measuring: bool = False
    squares: Tensor | None = None
    decide: Callable[["Probe"], bool] | None = None
    refuse_gradient: bool = False
    valid: Tensor | None = None
    fresh: bool = True  # no forward of this batch yet: a recomputation in the backward is not measured again
    handles: list = field(default_factory=list)

    def see(self, h: Tensor, inner: Tensor, B: Tensor, scaling: float) -> None:
        """Take note of h (N, out) and of Δh = scaling · inner Bᵀ, given as inner (N, r) and B (out, r)."""
        if not self.fresh:
            return
        self.fresh = False
        if self.measuring:
            sums = squared_norms(h, inner, B, scaling, self.valid)
            self.squares = sums if self.squares is None else self.squares + sums
        if self.decide is not None:
            self.active = self.decide(self)

    def require_cut(self, x: Tensor) -> None:
        if self.refuse_gradient and not self.active and x.requires_grad:
            told = f"the input of the skipped {self.path} requires a gradient, so the backward pass would not end there"
            why = "something below is trained (trainable=…), or enable_input_require_grads() was called"
            how = "(with gradient checkpointing; use_reentrant=False does without)"
            raise LorakitError(f"skip='prefix': {told}; {why} {how}")


@torch.no_grad()
def squared_norms(h: Tensor, inner: Tensor, B: Tensor, scaling: float, valid: Tensor | None) -> Tensor:
    """‖Δh‖² and ‖h‖² over the valid rows, (2,) fp32, without forming Δh: ‖inner Bᵀ‖² = ⟨innerᵀ inner, Bᵀ B⟩."""
    with torch.autocast(h.device.type, enabled=False):
        inner, B = inner.float(), B.float()
        rows = torch.linalg.vector_norm(h, dim=1, dtype=torch.float32).square_()  # (N,)
        if valid is not None and valid.shape[0] == rows.shape[0]:
            rows, inner = rows * valid, inner * valid[:, None]
        update = ((inner.T @ inner) * (B.T @ B)).sum() * scaling**2
        return torch.stack([update.clamp_min(0), rows.sum()])
