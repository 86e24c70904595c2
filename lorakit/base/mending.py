"""What bitsandbytes 0.50 gets wrong on a CPU, mended in the layers of a model, whoever loaded them."""

from collections.abc import Iterable

from torch import nn

from lorakit.base.nf4 import is_four_bit
from lorakit.errors import LorakitError, ParameterError
from lorakit.modules import inside


def prepare_four_bit(model: nn.Module, trained: Iterable[str]) -> None:
    """Make the 4-bit layers of `model` ones through which the right gradient flows, whoever loaded them.

    Args:
        trained: paths of the modules to be trained in full.

    Raises:
        ParameterError: a module to be trained in full holds a 4-bit weight.
        LorakitError: a layer was packed anew already; the scales it had are lost.
    """
    layers = {path: module for path, module in model.named_modules() if is_four_bit(module)}
    for path, layer in layers.items():
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            told = "an evaluation before attach packed its 4-bit weight anew, through which no gradient flows"
            raise LorakitError(f"{path}: {told}; load the model again and attach before its first forward")
        for root in trained:
            if inside(path, [root]):
                raise ParameterError("trainable", root or "the whole model", f"{path} is in 4 bits, which cannot train")
    for layer in layers.values():
        mend(layer)


def mend(layer: nn.Module) -> None:
    """Keep a 4-bit layer from what bitsandbytes 0.50 gets wrong on the CPU.

    With AVX512-BF16 it packs a weight anew, in place and with coarser scales, in its first forward in evaluation; from
    then on no gradient flows through it. (It fails there unless 32 divides out_features and 64 in_features.) So the
    layer is told that the CPU cannot do that. And rows that are not whole blocks: see `linear4bit`.
    """
    layer.support_avx512bf16_for_cpu = False
    if layer.in_features % layer.weight.quant_state.blocksize:
        from lorakit.base.linear4bit import Linear4bit

        layer.__class__ = Linear4bit  # it adds no state, and PEFT and transformers know it by its base
