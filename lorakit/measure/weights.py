"""Where the weights' bytes are: bits per parameter by kind, and how much smaller than in fp16 the whole model is.

In NF4 a linear weight costs 4 + 8/64 + 32/(64·256) = 4.127 bits (4.5 without double quantisation) and a codebook per
layer; embeddings, norms, biases and heads stay as they were, which is why a small model shrinks less than fourfold.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lorakit.base.nf4 import dense_numel, is_four_bit, stored_bytes
from lorakit.head import output_head, task_head
from lorakit.modules import inside, is_linear

KINDS = ("linear, 4-bit", "linear, other", "embeddings", "norms and biases", "heads", "adapters")
FOUR_BIT, OTHER_LINEAR, EMBEDDINGS, SMALL, HEADS, ADAPTERS = KINDS


def weight_table(model: nn.Module) -> dict[str, Any]:
    """Parameters, bytes and bits per parameter of `model` by kind; a tied parameter counts once, buffers do not.

    Args:
        model: as it stands, real or on the meta device; there `runs.plan.quantize_meta` makes it what `quantize_nf4`
            makes of a real one.

    Returns:
        "rows": a dict per kind that occurs: "kind", "parameters", "bytes", "bits_per_parameter"; "base": the same of
        all but the adapters; "times_smaller_than_fp16", "times_smaller_than_fp32": the bytes of the base in that
        precision throughout, over its bytes now. JSON-able.
    """
    counts = {kind: [0, 0] for kind in KINDS}
    for kind, parameter in _kinds(model):
        counts[kind][0] += dense_numel(parameter)
        counts[kind][1] += stored_bytes(parameter)
    base = [sum(column) for column in zip(*(counts[kind] for kind in KINDS if kind != ADAPTERS), strict=True)]
    return {
        "rows": [{"kind": kind, **_row(*counts[kind])} for kind in KINDS if counts[kind][0]],
        "base": _row(*base),
        "times_smaller_than_fp16": 2 * base[0] / max(base[1], 1),
        "times_smaller_than_fp32": 4 * base[0] / max(base[1], 1),
    }


def _row(parameters: int, size: int) -> dict[str, Any]:
    return {"parameters": parameters, "bytes": size, "bits_per_parameter": 8 * size / max(parameters, 1)}


def _kinds(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Kind and tensor of every parameter; a tied one by the first of its names."""
    modules = dict(model.named_modules())
    heads = [*task_head(model), *output_head(model)]
    wrappers = [path for path, module in modules.items() if hasattr(module, "base_layer")]  # ours and PEFT's alike
    bases = [f"{wrapper}.base_layer" for wrapper in wrappers]
    for name, parameter in model.named_parameters():
        path, _, own = name.rpartition(".")
        if inside(path, wrappers) and not inside(path, bases):
            kind = ADAPTERS
        elif inside(path, heads):
            kind = HEADS
        elif is_linear(modules[path]) and own == "weight":
            kind = FOUR_BIT if is_four_bit(modules[path]) else OTHER_LINEAR
        else:
            kind = EMBEDDINGS if isinstance(modules[path], nn.Embedding) else SMALL
        yield kind, parameter
