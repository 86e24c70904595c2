"""What was trained, as tensors: taken out, put back (task switching), counted."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lorakit.adapters.attach import adapter_layers, attachment_of, is_merged
from lorakit.adapters.nf4 import dense_numel
from lorakit.errors import CheckpointError
from lorakit.records import Parameters


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The live tensors an adapter file holds: `<path>.lora_A.weight`, …, then those of modules trained in full.

    A tensor with two names (tied) is listed once. Of a PEFT method: the trained parameters by
    their names in the model, which PEFT's file may hold in another form.
    """
    attachment = attachment_of(model)
    if attachment.method == "peft":
        return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = {
        f"{path}.{name}.weight": parameter
        for path, layer in adapter_layers(model).items()
        for name, parameter in layer.adapter_parameters().items()
    }
    for path in attachment.trained:
        prefix = f"{path}." if path else ""
        found |= model.get_submodule(path).state_dict(prefix=prefix, keep_vars=True)
    once: dict[int, str] = {}
    for name, tensor in found.items():
        once.setdefault(id(tensor), name)
    return {name: found[name] for name in once.values()}


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of everything trained, task head included; it holds weights, not settings.

    Raises:
        LorakitError: nothing is attached.
        CheckpointError: the adapter is merged.
    """
    require_unmerged(model)
    return {name: tensor.detach().clone() for name, tensor in trained_tensors(model).items()}


def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Put `state` in place of what is trained now: all of it or, on an error, nothing.

    Raises:
        CheckpointError: the adapter is merged, tensors are missing or unexpected, or a shape differs.
    """
    require_unmerged(model)
    here = trained_tensors(model)
    check_state(here, state)
    with torch.no_grad():
        for name, tensor in here.items():
            tensor.copy_(state[name])
    return model


def check_state(here: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` naming the tensors of `state` that do not fit `here`."""
    for problem, names in (("missing", here.keys() - state.keys()), ("unexpected", state.keys() - here.keys())):
        if names:
            listed = ", ".join(sorted(names)[:4]) + (", …" if len(names) > 4 else "")
            raise CheckpointError(f"the adapter does not fit this model: {len(names)} {problem} tensors: {listed}")
    for name, tensor in here.items():
        if tensor.shape != state[name].shape:
            given, own = tuple(state[name].shape), tuple(tensor.shape)
            raise CheckpointError(f"the adapter is for another base: {name} is {given}, this model has {own}")


def require_unmerged(model: nn.Module) -> None:
    if is_merged(model):
        raise CheckpointError("the adapter is merged into the base weights; unmerge(model) before saving or loading")


def parameter_stats(model: nn.Module) -> Parameters:
    """Trainable, total (base and adapters) and non-zero trainable parameters; a tied parameter counts once.

    A weight in 4 bits counts as the out_features · in_features values it stands for, not as the bytes they are in.
    """
    total = sum(dense_numel(parameter) for parameter in model.parameters())
    if attachment_is_peft(model):
        from lorakit.adapters.peft_method import idle_numel

        total -= idle_numel(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trainable = sum(parameter.numel() for parameter in trained)
    # a meta tensor has no values to look at
    nonzero = sum(p.numel() if p.is_meta else int(torch.count_nonzero(p)) for p in trained)
    return Parameters(trainable=trainable, total=total, nonzero=nonzero, reduction_factor=total / max(trainable, 1))


def adapter_bytes(model: nn.Module) -> int:
    """Bytes of the tensors `save_adapter` stores (the file's header, a few kilobytes, not counted)."""
    stored = trained_tensors(model)
    if attachment_is_peft(model):
        from lorakit.adapters.peft_files import stored_tensors

        stored = stored_tensors(model)
    return sum(tensor.numel() * tensor.element_size() for tensor in stored.values())


def attachment_is_peft(model: nn.Module) -> bool:
    """Whether PEFT's own code is attached, so that PEFT knows what was added."""
    attachment = getattr(model, "lorakit_attachment", None)
    return attachment is not None and attachment.method == "peft"
