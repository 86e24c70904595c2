"""`with disabled(model):` the adapters are switched off, wherever in the model they are and whoever's they are."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from lorakit.adapters.layer import AdapterLayer
from lorakit.errors import LorakitError, require
from lorakit.modules import set_until


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """While inside, `model` computes what its frozen base does, bit for bit; afterwards it is as it was.

    What is trained in full stays as trained: the head, `trainable=`, PEFT's `bias` and its `modules_to_save` (whose
    originals PEFT's own `disable_adapter` brings back). What is merged is unmerged inside. A graph made before keeps
    its gradients; only gradient checkpointing computes anew in the backward, which then belongs outside.

    Raises:
        ParameterError: there is no adapter in `model`; "head" and "full" have none.
        LorakitError: PEFT itself merged the adapter, which it does not take back bit for bit.
    """
    theirs = getattr(sys.modules.get("peft"), "PeftModel", ())  # a model that is one has imported it
    layers = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    wrappers = [module for module in model.modules() if isinstance(module, theirs)]
    name = type(getattr(model, "_orig_mod", model)).__name__
    require(layers + wrappers != [], "model", name, "needs an adapter, from attach(…) or PEFT's get_peft_model(…)")
    with ExitStack() as stack:
        for layer in layers:
            if layer.is_merged:
                layer.unmerge()
                stack.callback(layer.merge)
            set_until(stack, layer, is_off=True)
        for wrapper in wrappers:
            _switch_peft_off(stack, wrapper)
        yield model


def _switch_peft_off(stack: ExitStack, wrapper: Any) -> None:
    """PEFT's switches until `stack` ends, by hand: its `disable_adapter` turns heads and `requires_grad` with them."""
    from peft import AdaLoraModel, AdaptionPromptModel, XLoraModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import TrainableTokensWrapper

    attachment, base = vars(wrapper).get("lorakit_attachment"), wrapper.base_model
    if attachment is not None and attachment.is_merged(wrapper):
        attachment.unmerge(wrapper)
        stack.callback(attachment.merge, wrapper)
    parts = [module for module in wrapper.modules() if isinstance(module, (BaseTunerLayer, TrainableTokensWrapper))]
    if any(part.merged_adapters for part in parts):
        raise LorakitError("PEFT merged the adapter into the base weights: model.unmerge_adapter() first")
    for part in parts:
        set_until(stack, part, _disable_adapters=True)
    if wrapper.active_peft_config.is_prompt_learning:
        prepare = getattr(base, "prepare_inputs_for_generation", None)
        set_until(stack, wrapper, forward=base.__call__, prepare_inputs_for_generation=prepare)
    elif isinstance(base, AdaptionPromptModel):
        stack.enter_context(wrapper.disable_adapter())
    elif isinstance(base, XLoraModel):
        set_until(stack, base, disabled=True)
    elif isinstance(base, AdaLoraModel):  # adds the adapters' penalty to the loss
        set_until(stack, base, forward=base.model.__call__)
    set_until(stack, wrapper, _adapters_disabled=True)
