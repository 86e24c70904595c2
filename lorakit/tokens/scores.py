"""What a prediction's backward may be worth: functions of its hidden state h and error e = softmax(logits) − onehot."""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.errors import require
from lorakit.head import Head
from lorakit.modules import blocks
from lorakit.settings import Gating
from lorakit.sketches import TensorSketch
from lorakit.sketches.head_gradient import error_in_place, sparse_error
from lorakit.tokens.head_loss import likelihoods

OF_LAYERS = {"update": slice(-1, None), "updates": slice(None)}  # which blocks; known before the head runs


class TokenScore:
    """Scores by name, on chunks of predictions.

    Of the head's gradient: "sketch" ‖TensorSketch(h ⊗ e)‖ from the most probable words; "gradient_norm" ‖h‖·‖e‖, which
    that estimates; "hidden_gradient" ‖W_Uᵀe‖, the gradient that reaches the last layer. Of the prediction: "loss";
    "entropy"; "excess_loss", the loss with the adapter switched off minus the loss with it (ssToken, 2025: the frozen
    base is the reference model). Of the layers, without the head: "update" ‖h_L − h_{L−1}‖, how much the last block
    still changes the token's state; "updates" Σ_l ‖h_l − h_{l−1}‖ (TokenDrop, 2026).

    Args:
        settings: `score` and the sketch's; all methods but "flora" score nothing.
        head: of the model; seed: of the sketch.

    Attributes:
        seen: whether it needs the head's logits of all predictions; overwrites: whether it works in them.
        excess: whether it needs `base` (N,), the losses with the adapter switched off.
        updates: (B, T) of the forward that has just run, or None.
    """

    def __init__(self, settings: Gating, head: Head, model: nn.Module, seed: int = 0):
        self.name = settings.score if settings.method == "flora" else "none"
        self.head = head
        self.seen, self.excess = self.name not in ("none", *OF_LAYERS), self.name == "excess_loss"
        self.overwrites = self.name in ("entropy", "gradient_norm", "hidden_gradient")
        self.kept = min(settings.topk_logits or head.outputs, head.outputs)
        self.base: Tensor | None = None
        self.updates: Tensor | None = None
        self.sketch = None
        self.watched = blocks(model)[OF_LAYERS[self.name]] if self.name in OF_LAYERS else []
        layers = f"is of the layers: {type(model).__name__} has no list of them"
        require(self.name not in OF_LAYERS or bool(self.watched), "gating.score", self.name, layers)
        if self.name == "sketch":
            device = "cpu" if (at := head.module.weight.device).type == "meta" else at  # a dry run's has no data
            generator, size = torch.Generator().manual_seed(seed), settings.sketch_dim
            self.sketch = TensorSketch(head.d_hidden, head.outputs, size, generator=generator, device=device)

    def watching(self) -> contextlib.ExitStack:
        """While inside, the model's forward adds up what its blocks change."""
        self.updates, hooks = None, contextlib.ExitStack()
        for block in self.watched:
            hooks.enter_context(block.register_forward_hook(self._see, with_kwargs=True))
        return hooks

    @torch.no_grad()
    def _see(self, _: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        before, after = args[0] if args else kwargs["hidden_states"], out if torch.is_tensor(out) else out[0]
        change = torch.linalg.vector_norm(after - before, dim=-1, dtype=torch.float32)
        self.updates = change if self.updates is None else self.updates + change

    @torch.no_grad()
    def __call__(
        self, hidden: Tensor, logits: Tensor, labels: Tensor, losses: Tensor | None = None, first: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Scores (n,) and losses (n,), both float32.

        Args:
            hidden: (n, H); labels: (n,).
            logits: (n, V) float32, capped; overwritten by some, see `overwrites`.
            losses: (n,), where they are known.
            first: which prediction of the batch is the first of these.
        """
        if self.name == "entropy":
            logs = F.log_softmax(logits, dim=1)
            losses = -logs.gather(1, labels[:, None]).squeeze(1)
            return -(logs * torch.exp(logs, out=logits)).sum(1), losses
        if self.name in ("gradient_norm", "hidden_gradient"):
            error, scale, losses = error_in_place(logits, labels, self.head.softcap)
            if self.name == "gradient_norm":
                return hidden.float().norm(dim=1) * error.norm(dim=1) / scale, losses
            weight = self.head.module.weight  # W_U (V, H)
            return (error.to(weight.dtype) @ weight).float().norm(dim=1) / scale, losses
        maxima: list[Tensor] = []
        if losses is None:
            losses, *maxima = likelihoods(logits, labels, grouped=self.name == "sketch")
        if self.name == "sketch":
            normaliser = losses + logits.gather(1, labels[:, None]).squeeze(1)
            error = sparse_error(logits, labels, self.kept, self.head.softcap, normaliser, *maxima)
            return self.sketch.sparse(hidden.float(), *error).norm(dim=1), losses
        if self.excess and self.base is not None:  # a dry run has none
            return self.base[first : first + len(losses)] - losses, losses
        return (losses if self.name == "loss" else torch.zeros_like(losses)), losses

    def flops(self, count: int, seen: bool = True) -> float:
        """Of scoring `count` predictions beyond matrix products, as `HeadGradientGate.flops` counts.

        Args:
            seen: whether their logits were looked at.
        """
        of_layers = 3.0 * self.head.d_hidden * len(self.watched)
        of_head = self.sketch.flops(self.kept + 1) if self.name == "sketch" else 5.0 * self.head.outputs
        return count * (of_layers + of_head * seen * (2 if self.excess else 1))
