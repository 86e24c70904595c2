"""LoRA: h = W0 x + s B A x with s = α/r (rsLoRA: α/√r), B = 0 at the start (Hu et al. 2021; Kalajdzievski 2023)."""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from lorakit.adapters.layer import ADAPTERS, AdapterLayer
from lorakit.adapters.probe import Probe
from lorakit.errors import require
from lorakit.settings import AdapterSettings

_INERT_FIELDS = {"loftq_config", "eva_config", "megatron_core", "qalora_group_size"}  # unused without what is refused


class LoRALayer(AdapterLayer):
    """A frozen linear with a low-rank update: `lora_A` is (r, in_features), `lora_B` is (out_features, r)."""

    peft_type = "LORA"
    parameter_names = ("lora_A", "lora_B")
    peft_names = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "rslora": "use_rslora"}
    peft_names["init"] = "init_lora_weights"
    peft_fields = {*peft_names.values()} | _INERT_FIELDS
    peft_defaults = {"rank": 8, "alpha": 8.0}
    peft_inits = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
    no_other_init = (
        "training began by changing the base weights; let PEFT convert it (path_initial_model_for_weight_conversion)"
    )

    def __init__(self, base_layer: nn.Module, settings: AdapterSettings, generator: Generator | None = None):
        require(settings.alpha is not None, "alpha", None, "LoRA needs one: its update's scale is alpha / rank")
        super().__init__(base_layer, settings)
        self.scaling = settings.alpha / (math.sqrt(settings.rank) if settings.rslora else settings.rank)
        self.lora_A = self.new_parameter(initial_A(settings, self.in_features, generator))
        self.lora_B = self.new_parameter(torch.zeros(self.out_features, settings.rank))
        self.probe: Probe | None = None  # SkipLoRA's, while it trains

    def delta_weight(self) -> Tensor:
        return self.scaling * (self.lora_B @ self.lora_A)

    def adapted(self, x: Tensor) -> Tensor:
        given, x = x, x.reshape(-1, self.in_features)
        plain = self.owns_output
        # (N, out)
        out = self.base_layer(x) if plain else self.base_layer(given).reshape(-1, self.out_features)
        inner = F.dropout(x, self.settings.dropout, self.training)
        if not torch.is_autocast_enabled(x.device.type):
            inner = inner.to(self.lora_A.dtype)
        inner, B = F.linear(inner, self.lora_A), self.lora_B  # (N, r), (out, r)
        if self.probe is not None and self.training and torch.is_grad_enabled():
            self.probe.see(out, inner, B, self.scaling)
            if not self.probe.active:
                self.probe.require_cut(x)
                inner, B = inner.detach(), B.detach()
        if inner.dtype != out.dtype:  # low-precision base, fp32 adapter: add in fp32, round once
            total = F.linear(inner, B).mul_(self.scaling).add_(out).to(out.dtype)
        else:  # scale and sum inside the product: no second (N, out) temporary
            total = (out.addmm_ if plain else out.addmm)(inner, B.to(out.dtype).T, alpha=self.scaling)
        return total.view(*given.shape[:-1], self.out_features)


def initial_A(settings: AdapterSettings, in_features: int, generator: Generator | None) -> Tensor:
    """(r, in_features): Kaiming-uniform with a = √5, as loralib and PEFT, or Gaussian with σ = 1/r, as PEFT."""
    A = torch.empty(settings.rank, in_features)
    if settings.init == "gaussian":
        return A.normal_(std=1 / settings.rank, generator=generator)
    return nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)


ADAPTERS["lora"] = LoRALayer
