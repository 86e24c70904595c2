"""LoRA's layer: h = W0 x + b + (alpha/r) B A x, with W0 and b frozen, A (r, d_in) and B (d_out, r) trained."""

import doctest
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.errors import require

SIGMA = 0.02  # of A's start, as GPT-2's and BERT's own weights start


class LoRALinear(nn.Linear):
    """A drop-in for `nn.Linear` whose frozen weight learns a rank-`r` update (Hu et al. 2021, arXiv:2106.09685).

    A starts as N(0, σ²), as the paper says, and B at zero, so a new layer computes what `nn.Linear` computes. (The
    authors' loralib and PEFT start A Kaiming-uniform.) Parameters `weight` (out, in) and `bias` (out) keep their names.

    Args:
        in_features, out_features: as `nn.Linear`'s, and so `linear`: bias, device, dtype.
        r: rank of the update, at least 1.
        lora_alpha: the update is scaled by lora_alpha / r.
        lora_dropout: chance that an input of the update (not of W0) is dropped while training.
        lora_sigma: σ of A's start; None: Kaiming-uniform instead.

    Raises:
        ParameterError: r < 1, lora_alpha <= 0, lora_dropout outside [0, 1) or lora_sigma <= 0.

    >>> _ = torch.manual_seed(0)
    >>> layer, x = LoRALinear(256, 64, r=16), torch.randn(5, 256)
    >>> torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))  # a new layer computes what nn.Linear computes
    True
    >>> abs(layer.lora_A.std().item() / SIGMA - 1) < 0.05, layer.lora_B.any().item()  # A as N(0, σ²), B at zero
    (True, False)
    >>> LoRALinear(256, 64, lora_sigma=None).lora_A.abs().max().item() <= 256**-0.5  # Kaiming-uniform instead
    True
    >>> _ = nn.init.normal_(layer.lora_B)
    >>> trained, weight = layer(x), layer.weight.clone()
    >>> torch.allclose(trained, x @ (weight + 16.0 / 16 * layer.lora_B @ layer.lora_A).T + layer.bias, atol=1e-4)
    True
    >>> trained.sum().backward()
    >>> [name for name, p in layer.named_parameters() if p.grad is not None]  # what is trained
    ['lora_A', 'lora_B']
    >>> torch.linalg.matrix_rank(layer.delta_weight()).item()  # of the update, r at most
    16
    >>> layer.merge()
    >>> torch.allclose(F.linear(x, layer.weight, layer.bias), trained, atol=1e-4)  # merged: one product, the same
    True
    >>> layer.unmerge()
    >>> torch.equal(layer.weight, weight)  # W0 is back, bit for bit
    True
    """

    base_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        lora_alpha: float = 16.0,
        lora_dropout: float = 0.0,
        lora_sigma: float | None = SIGMA,
        **linear: Any,
    ):
        require(isinstance(r, int) and not isinstance(r, bool) and r >= 1, "r", r, "must be an integer >= 1")
        require(0 < lora_alpha < math.inf, "lora_alpha", lora_alpha, "must be a number > 0")
        require(0 <= lora_dropout < 1, "lora_dropout", lora_dropout, "must be in [0, 1)")
        drawn = lora_sigma is None or 0 < lora_sigma < math.inf
        require(drawn, "lora_sigma", lora_sigma, "must be a number > 0 or None")
        super().__init__(in_features, out_features, **linear)
        self.r, self.lora_alpha, self.scaling = r, lora_alpha, lora_alpha / r
        self.lora_A = nn.Parameter(self.weight.new_empty(r, in_features))
        self.lora_B = nn.Parameter(self.weight.new_empty(out_features, r))
        self.lora_dropout, self.lora_sigma = nn.Dropout(lora_dropout), lora_sigma
        # W0 as it was while the update is merged into `weight`: subtracting B A again would not give its bits back
        self.register_buffer("base_weight", None, persistent=False)
        self.reset_lora()
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith("lora_"))

    @property
    def merged(self) -> bool:
        """Whether `weight` holds W0 + delta (inference at `nn.Linear`'s cost) or W0."""
        return self.base_weight is not None

    def reset_lora(self) -> None:
        """Start the update afresh at zero."""
        self._refuse_if_merged("resetting")
        if self.lora_sigma is None:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        else:
            nn.init.normal_(self.lora_A, std=self.lora_sigma)
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        h = F.linear(x, self.weight, self.bias)
        if self.merged:
            return h
        return h + F.linear(F.linear(self.lora_dropout(x), self.lora_A), self.lora_B) * self.scaling

    def delta_weight(self) -> Tensor:
        """The update (alpha/r) B A, (out_features, in_features), of rank r at most."""
        return (self.lora_B @ self.lora_A) * self.scaling

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to `weight`, keeping a copy of W0; merging twice is merging once."""
        if not self.merged:
            self.base_weight = self.weight.clone()
            self.weight += self.delta_weight()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give W0 back, bit for bit."""
        if self.merged:
            self.weight.copy_(self.base_weight)
            self.base_weight = None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha}, merged={self.merged}"

    def _refuse_if_merged(self, doing: str) -> None:
        require(not self.merged, "merged", True, f"unmerge() before {doing}: `weight` holds the update already")

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._refuse_if_merged("saving")  # a reader would add B A a second time
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._refuse_if_merged("loading")
        super()._load_from_state_dict(*args, **kwargs)


if __name__ == "__main__":  # tries the examples above, and says so
    raise SystemExit(min(doctest.testmod(verbose=True).failed, 1))
