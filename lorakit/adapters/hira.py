"""HiRA: W' = W0 ⊙ (1 + BA), elementwise, so the update may have full rank; no α, B = 0 at the start (ICLR 2025)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.autograd.function import once_differentiable

from lorakit.adapters.layer import ADAPTERS, AdapterLayer
from lorakit.adapters.lora import initial_A
from lorakit.base.nf4 import is_four_bit
from lorakit.errors import LorakitError, require
from lorakit.settings import AdapterSettings


class HiRALayer(AdapterLayer):
    """A frozen linear whose weight is modulated: `hira_A` is (r, in_features), `hira_B` is (out_features, r).

    As many trainable values as LoRA of the same rank, and rank(ΔW) up to rank(W0)·r. Where W0 is 0, W' stays 0.

    Raises:
        ParameterError: `settings` have an alpha or rsLoRA, as the update is not scaled; W0 is in 8 bits.
    """

    has_alpha = False
    peft_type = "HIRA"
    parameter_names = ("hira_A", "hira_B")
    peft_names = {"rank": "r", "dropout": "hira_dropout", "init": "init_weights"}
    peft_fields = frozenset(peft_names.values())
    peft_defaults = {"rank": 32, "alpha": None}
    peft_inits = (True, False, None, "gaussian")  # none of PEFT's changes the base
    no_other_init = f"must be one of {', '.join(map(repr, peft_inits))}"

    def __init__(self, base_layer: nn.Module, settings: AdapterSettings, generator: Generator | None = None):
        require(settings.alpha is None, "alpha", settings.alpha, "HiRA has no alpha: its update is not scaled")
        require(not settings.rslora, "rslora", settings.rslora, "HiRA has no alpha, so nothing to rescale")
        super().__init__(base_layer, settings)
        readable = is_four_bit(base_layer) or base_layer.weight.is_floating_point()
        require(readable, "method", "hira", f"needs to read W0, which is {base_layer.weight.dtype} here")
        self.hira_A = self.new_parameter(initial_A(settings, self.in_features, generator))
        self.hira_B = self.new_parameter(torch.zeros(self.out_features, settings.rank))

    def delta_weight(self) -> Tensor:
        return self.base_weight() * (self.hira_B @ self.hira_A)

    def adapted(self, x: Tensor) -> Tensor:
        """One product with W'; two, W0 and W0 ⊙ BA apart, under dropout, where W0 is coarser than the adapter, and
        where the base does more than its product.

        A bf16 W0 rounds W0·(1 + ε) back to W0 for |ε| < 2⁻⁹: the update would have no effect until it is larger.

        Raises:
            LorakitError: W0 asks for a gradient, which is not computed.
        """
        weight = self.base_layer.weight
        if weight.requires_grad and torch.is_grad_enabled():
            raise LorakitError("HiRA needs a frozen base weight: call requires_grad_(False) on it")
        dropout = self.settings.dropout if self.training else 0.0
        rows = x.reshape(-1, self.in_features)
        if self.is_plain and not dropout and weight.element_size() >= self.hira_A.element_size():  # W0 + ΔW is exact
            out = _Modulated.apply(rows, self.hira_A, self.hira_B, self.base_layer.bias, self, True)
            return out.view(*x.shape[:-1], self.out_features)
        out, inner = self.base_layer(x), F.dropout(rows, dropout)
        delta = _Modulated.apply(inner, self.hira_A, self.hira_B, None, self, False)
        return delta.to(out.dtype).view_as(out).add_(out)


class _Modulated(torch.autograd.Function):
    """y = x Wᵀ + b, W = W0 ⊙ (1 + BA) if `whole` else W0 ⊙ BA; the backward makes W again instead of keeping it.

    With G = dYᵀX: dX = dY W, dB = (W0 ⊙ G) Aᵀ, dA = Bᵀ (W0 ⊙ G). W0 comes from `layer.base_weight()` both times, so
    that an unpacked 4-bit weight does not live between them; it gets no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, layer: AdapterLayer, whole: bool):
        ctx.save_for_backward(x, A, B)
        ctx.layer, ctx.whole = layer, whole
        with torch.autocast(x.device.type, enabled=False):
            weight = _weight(layer.base_weight(), A, B, whole).to(x.dtype)
            return F.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor):
        x, A, B = ctx.saved_tensors
        for_x, for_A, for_B, for_bias = ctx.needs_input_grad[:4]
        W0 = ctx.layer.base_weight()
        dX = dA = dB = None
        with torch.autocast(x.device.type, enabled=False):
            if for_x:
                dX = dY @ _weight(W0, A, B, ctx.whole).to(dY.dtype)  # W is gone before G, as large, is made
            if for_A or for_B:
                G = _laid_out(W0, dY.T, x).to(A.dtype).mul_(W0)
                dA = B.T @ G if for_A else None
                dB = (A @ G.T).T if for_B else None  # G @ A.T is 2 to 5 times slower on one core
        return dX, dA, dB, dY.sum(0) if for_bias else None, None, None


def _weight(W0: Tensor, A: Tensor, B: Tensor, whole: bool) -> Tensor:
    """W0 ⊙ (1 + BA) or W0 ⊙ BA, (out_features, in_features) in the adapter's precision: BA's memory, filled again."""
    product = _laid_out(W0, B, A).mul_(W0)
    return product.add_(W0) if whole else product


def _laid_out(W0: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """left @ right, in memory as W0 is (Conv1D stores it transposed): what is elementwise then reads in order."""
    return left @ right if W0.is_contiguous() else (right.T @ left.T).T


ADAPTERS["hira"] = HiRALayer
