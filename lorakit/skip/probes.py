"""A probe on every LoRA adapter of a model, lorakit's or PEFT's, and off again."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorakit.adapters.layer import AdapterLayer
from lorakit.adapters.lora import LoRALayer
from lorakit.adapters.probe import Probe
from lorakit.errors import LorakitError, require


def probe_model(model: nn.Module) -> list[Probe]:
    """Give every LoRA adapter of `model`, lorakit's or PEFT's, a probe; in the order of the model's modules.

    Raises:
        ParameterError: there is none, or one whose update is no term of its own (HiRA, DoRA, …).
    """
    probes = []
    for path, module in model.named_modules():
        if isinstance(module, AdapterLayer):
            require(isinstance(module, LoRALayer), "skip", path, f"cannot skip a {type(module).__name__}")
            module.probe = Probe(path, (module.lora_A, module.lora_B))
            probes.append(module.probe)
        elif type(module).__module__.startswith("peft.tuners.lora.") and hasattr(module, "lora_variant"):
            probes.append(_probe_peft(path, module))
    require(probes != [], "skip", type(model).__name__, "the model has no LoRA adapter")
    return probes


def _probe_peft(path: str, layer: nn.Module) -> Probe:
    """Hooks on a PEFT LoRA layer: its base gives h, its A the inner values, its B's output is what is detached."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    require(len(names) == 1, "skip", path, f"needs one active PEFT LoRA adapter per layer, has {len(names)}")
    (name,) = names
    require(name not in layer.lora_variant, "skip", path, "cannot skip a LoRA variant (DoRA, …)")
    A, B, scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
    require(isinstance(A, nn.Linear), "skip", path, "can skip PEFT LoRA on linear layers only")
    probe, seen = Probe(path, (A.weight, B.weight)), {}
    layer.probe = probe  # for who asks what rests

    def base(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if layer.training and torch.is_grad_enabled():
            seen["h"], seen["x"] = out.detach().reshape(-1, out.shape[-1]), args[0]

    def inner(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        if "h" not in seen:
            return None
        probe.see(seen.pop("h"), out.reshape(-1, out.shape[-1]), B.weight, scaling)
        probe.require_cut(seen.pop("x"))
        return None if probe.active else out.detach()

    cut = (B, lambda _, args, out: None if probe.active else out.detach())
    for module, hook in ((layer.base_layer, base), (A, inner), cut):
        probe.handles.append(module.register_forward_hook(hook))
    return probe


def keep_the_cut(model: nn.Module) -> None:
    """Undo what transformers does for gradient checkpointing and what would make a prefix's backward run all the same.

    Enabling checkpointing makes the embeddings' output require a gradient, which only the reentrant kind needs.

    Raises:
        LorakitError: checkpointing is the reentrant kind.
    """
    for module in model.modules():
        options = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
        if getattr(module, "gradient_checkpointing", False) and options.get("use_reentrant"):
            told = "reentrant checkpointing undoes the cut; enable it with use_reentrant=False"
            raise LorakitError(f"skip='prefix': {told}")
    for module in model.modules():
        if getattr(module, "_require_grads_hooks", None):
            module.disable_input_require_grads()


def remove_probes(model: nn.Module, probes: Sequence[Probe]) -> None:
    """Take the probes off: every adapter is trained again, and inference is that of plain LoRA."""
    for module in model.modules():
        if isinstance(module, LoRALayer):
            module.probe = None
        elif getattr(module, "probe", None) in probes:
            del module.probe
    for probe in probes:
        probe.active = True
        while probe.handles:
            probe.handles.pop().remove()
