"""What the tests of 4-bit bases share: layers, dense twins."""

from __future__ import annotations

import copy

from torch import nn

from lorakit.adapters import quantize_nf4
from lorakit.base.nf4 import dequantise, is_four_bit


def nf4_bytes(weights: int, double_quant: bool = True) -> int:
    """Bytes of that many weights, by formula (Dettmers et al. 2023, section 3).

    4 bits a weight, and per weight 32/64 bits of scales, or 8/64 + 32/(64·256) with double quantisation; then the
    layer's own codebook (16 fp32), and with double quantisation the scales' (256 fp32) and mean.
    """
    blocks = -(-weights // 64)
    packed, codebook = -(-weights // 2), 16 * 4
    return packed + codebook + (blocks + 4 * -(-blocks // 256) + 256 * 4 + 4 if double_quant else 4 * blocks)


def four_bit_layers(model):
    return {path: module for path, module in model.named_modules() if is_four_bit(module)}


def dense_twin(model):
    """A copy whose 4-bit layers are plain linear ones holding the very weights they stand for."""
    twin = copy.deepcopy(model)
    for path, layer in four_bit_layers(twin).items():
        dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        dense.weight = nn.Parameter(dequantise(layer))
        if layer.bias is not None:
            dense.bias = nn.Parameter(layer.bias.detach().float())
        twin.set_submodule(path, dense)
    return twin.eval()


def assert_close(mine, oracle, tolerance):
    """The difference is below `tolerance` of the oracle's norm, and the oracle is not nothing."""
    assert oracle.norm() > 1e-4
    assert (mine - oracle).norm() <= tolerance * oracle.norm()


def layer_of(weight, double_quant=False):
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    model[0].weight = nn.Parameter(weight)
    return quantize_nf4(model, double_quant=double_quant, compute_dtype="fp32")[0]
