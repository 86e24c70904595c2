"""What a prediction's backward may be worth: functions of its hidden state h and error e = softmax(logits) − onehot."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.head import Head
from lorakit.sketches import TensorSketch
from lorakit.sketches.head_gradient import error_in_place, sparse_error


class TokenScore:
    """Scores by name, on chunks of predictions; see `Gating.score` for what each is.

    Args:
        name: of the score; "none" only finds the losses.
        head: of the model.
        sketch_dim, topk_logits, seed: of the sketch; topk_logits 0 for all.

    Attributes:
        overwrites: whether it works in the logits it is given.
    """

    def __init__(self, name: str, head: Head, *, sketch_dim: int = 512, topk_logits: int = 64, seed: int = 0):
        self.name, self.head, self.softcap = name, head, head.softcap
        self.overwrites = name in ("entropy", "gradient_norm", "hidden_gradient")
        self.words, self.width = head.outputs, head.d_hidden
        self.kept = min(topk_logits or self.words, self.words)
        self.sketch = None
        if name == "sketch":
            device = head.module.weight.device
            device = "cpu" if device.type == "meta" else device  # a dry run's model has no data
            generator = torch.Generator().manual_seed(seed)
            self.sketch = TensorSketch(self.width, self.words, sketch_dim, generator=generator, device=device)

    @torch.no_grad()
    def __call__(self, hidden: Tensor, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (n,) and losses (n,), both float32.

        Args:
            hidden: (n, H); labels: (n,).
            logits: (n, V) float32, capped; overwritten by some, see `overwrites`.
        """
        if self.name == "entropy":
            logs = F.log_softmax(logits, dim=1)
            losses = -logs.gather(1, labels[:, None]).squeeze(1)
            return -(logs * torch.exp(logs, out=logits)).sum(1), losses
        if self.name in ("gradient_norm", "hidden_gradient"):
            error, scale, losses = error_in_place(logits, labels, self.softcap)
            if self.name == "gradient_norm":
                return hidden.float().norm(dim=1) * error.norm(dim=1) / scale, losses
            weight = self.head.module.weight  # W_U (V, H)
            return (error.to(weight.dtype) @ weight).float().norm(dim=1) / scale, losses
        losses = F.cross_entropy(logits, labels, reduction="none")
        if self.name == "sketch":
            normaliser = losses + logits.gather(1, labels[:, None]).squeeze(1)
            error = sparse_error(logits, labels, self.kept, self.softcap, normaliser)
            return self.sketch.sparse(hidden.float(), *error).norm(dim=1), losses
        return (losses if self.name == "loss" else torch.zeros_like(losses)), losses

    def flops(self, count: int) -> float:
        """Of scoring `count` predictions beyond matrix products, as `HeadGradientGate.flops` counts."""
        return count * (self.sketch.flops(self.kept + 1) if self.name == "sketch" else 5.0 * self.words)
