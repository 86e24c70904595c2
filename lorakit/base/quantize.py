"""QLoRA: h = dequantise(Q(W0)) x + s B A x, W0 stored once in 4-bit NormalFloat (Dettmers et al. 2023)."""

from collections.abc import Sequence

import torch
from torch import nn

from lorakit.base.mending import mend
from lorakit.base.nf4 import BLOCK, bitsandbytes, is_four_bit
from lorakit.base.reads import read_elsewhere
from lorakit.errors import require
from lorakit.head import output_head, task_head
from lorakit.modules import inside, is_conv1d, linear_paths, named, other_towers, replace_modules, unwrapping

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KEPT = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")  # names of modules, of transformers' models
_STORABLE = (torch.float32, torch.bfloat16, torch.float16)


@unwrapping
def quantize_nf4(
    model: nn.Module, *, double_quant: bool = True, compute_dtype: str = "bf16", exclude: str | Sequence[str] = "heads"
) -> nn.Module:
    """Replace linear layers by 4-bit ones (NF4, blocks of 64) in place and return the model; before `attach`.

    GPT-2's Conv1D becomes a linear layer with the transposed weight, as in transformers. Biases of replaced layers are
    rounded to `compute_dtype`, which bitsandbytes would do in the first forward. Weights are quantised where they are,
    CPU or CUDA; the model may move afterwards.

    Args:
        double_quant: store the blocks' scales in 8 bits.
        compute_dtype: of the product with the unpacked weight, "bf16" or "fp32"; inputs and outputs keep their dtype.
        exclude: "heads" (the task head and the output embeddings, which always stay), or names of modules that stay
            as well (the path or its end).

    Raises:
        ParameterError: no bitsandbytes, an adapter is attached, a dtype or name that is not there, or a layer that
            cannot be held in 4 bits (named). The model is then as it was.
    """
    fp16 = "fp16 diverged on 20 % of the QLoRA authors' 7B runs; " if compute_dtype == "fp16" else ""
    require(compute_dtype in COMPUTE_DTYPES, "compute_dtype", compute_dtype, f"{fp16}must be one of bf16, fp32")
    require(isinstance(double_quant, bool), "double_quant", double_quant, "must be true or false")
    adapted = hasattr(model, "lorakit_attachment") or hasattr(model, "peft_config")
    require(not adapted, "quantize", "nf4", "the model already has an adapter; quantise before attaching one")
    paths = quantisable(model, exclude)
    unknown = [path for path in paths if model.get_submodule(path).weight.is_meta]
    require(not unknown, "quantize", "nf4", f"{' '.join(unknown[:1])} has no values: its weight is on the meta device")
    _require_own_weights(model, paths)
    for path in paths:
        linear = model.get_submodule(path)
        packed = four_bit(linear, double_quant, COMPUTE_DTYPES[compute_dtype])
        replace_modules(model, {linear: packed})  # one by one: the dense weight goes before the next is packed
    model.is_loaded_in_4bit = True  # PEFT and the Trainer look for it
    if hasattr(model, "save_pretrained"):  # what is saved is loaded again as it is
        from transformers import BitsAndBytesConfig

        dense = [path for path in linear_paths(model) if not is_four_bit(model.get_submodule(path))]
        model.config.quantization_config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=COMPUTE_DTYPES[compute_dtype], llm_int8_skip_modules=dense or None,
        )  # fmt: skip
    return model


def quantisable(model: nn.Module, exclude: str | Sequence[str] = "heads") -> list[str]:
    """Paths of the layers `quantize_nf4` replaces: every linear one but the heads and what `exclude` names.

    What the model says must stay in fp32 (T5's `wo`) stays, and what it reads past its forward (Mamba's `dt_proj`).

    Raises:
        ParameterError: a name matches no module, nothing is left, or a layer cannot be held in 4 bits (named).
    """
    names = [] if exclude == "heads" else exclude
    every = [path for path, _ in model.named_modules() if path]
    stay = [*task_head(model), *output_head(model), *other_towers(model)]
    stay += named(every, "exclude", names, 'must be "heads" or a list of module names')
    kept = {name for part in model.modules() for told in KEPT for name in getattr(part, told, None) or ()}
    stay += [path for path in every if any(f".{name}." in f".{path}." for name in kept)]
    found = [path for path in linear_paths(model) if not inside(path, stay)]
    elsewhere = read_elsewhere(model, found)
    found = [path for path in found if path not in elsewhere]
    require(bool(found), "quantize", "nf4", f"{type(model).__name__} has no linear layer outside {stay or 'its heads'}")
    for path in found:
        _require_storable(path, model.get_submodule(path))
    return found


def _require_storable(path: str, linear: nn.Module) -> None:
    """Refuse a layer that bitsandbytes cannot hold, naming it."""
    weight, problem = linear.weight, ""
    if is_four_bit(linear):
        problem = "is in 4 bits already"
    elif type(linear) is not nn.Linear and not is_conv1d(linear):  # others may read their weight past `forward`
        problem = f"is a {type(linear).__name__}, not a plain nn.Linear; exclude=[{path!r}] leaves it"
    elif weight.dtype not in _STORABLE:
        problem = f"has {weight.dtype} weights; only fp32, bf16 and fp16 can be quantised"
    elif weight.numel() < 3:
        problem = f"has {weight.numel()} weights: bitsandbytes mistakes so small a layer for its transpose"
    elif not weight.is_meta and not torch.isfinite(weight).all():
        problem = "has weights that are not finite, which would spoil their whole block"
    require(not problem, "quantize", "nf4", f"{path} {problem}")


def _require_own_weights(model: nn.Module, paths: Sequence[str]) -> None:
    """Refuse a weight that a module outside `paths` shares: the copy would be untied without a word."""
    replaced = {id(model.get_submodule(path).weight): path for path in paths}
    for other, module in model.named_modules():  # once each, also where a module has several paths
        for name, parameter in module.named_parameters(recurse=False):
            path = replaced.get(id(parameter))
            told = f"{path} shares its weight with {other}.{name}; exclude=[{path!r}] leaves it"
            require(path is None or other in paths, "quantize", "nf4", told)


def four_bit(linear: nn.Module, double_quant: bool, compute_dtype: torch.dtype) -> nn.Module:
    """The 4-bit layer of a linear one's weight; on the meta device one without values, its scales without them too."""
    weight = (linear.weight.T if is_conv1d(linear) else linear.weight).detach()
    layers, options = bitsandbytes().nn, {"compress_statistics": double_quant, "quant_type": "nf4"}
    functional = bitsandbytes().functional  # its scales' codes, which it would keep where it first needs them: on meta
    if "dynamic" not in functional.name2qmap:
        functional.name2qmap["dynamic"] = functional.create_dynamic_map()
    # on meta: no values are drawn, and no random numbers used
    layer = layers.Linear4bit(*weight.T.shape, linear.bias is not None, compute_dtype, **options, device="meta")
    packed = layers.Params4bit(weight, blocksize=BLOCK, **options, module=layer)
    layer.weight = packed._quantize(weight.device)  # as `to` does, but for the meta device
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.to(compute_dtype), requires_grad=False)
    mend(layer)
    return layer.train(linear.training)
