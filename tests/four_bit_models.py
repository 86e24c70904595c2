"""What the tests of 4-bit bases share: models, batches, dense twins."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lorakit.adapters import quantize_nf4
from lorakit.adapters.attachment import trained_tensors
from lorakit.base.nf4 import dequantise, is_four_bit

KINDS = ["bert", "gpt2", "gemma"]


@pytest.fixture
def build(tiny_bert, tiny_gpt2, tiny_gemma):
    """`build(kind)`: the same small model at every call."""
    builders = {"bert": tiny_bert, "gpt2": tiny_gpt2, "gemma": tiny_gemma}

    def build(kind, **overrides):
        torch.manual_seed(7)
        return builders[kind](**overrides).eval()

    return build


def batch():
    ids = torch.randint(3, 99, (4, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def logits(model):
    with torch.no_grad():
        return model(**batch()).logits


def perturb(model):
    """Weights as after training: the adapters away from where they started."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in trained_tensors(model).values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model


def backward(model):
    """Gradients of a fixed random projection of the logits."""
    out = model(**batch()).logits
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out.float() * weights).sum().backward()
    return out.detach()


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


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


def bits(model):
    """Everything stored, the scales of 4-bit weights too."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def layer_of(weight, double_quant=False):
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    model[0].weight = nn.Parameter(weight)
    return quantize_nf4(model, double_quant=double_quant, compute_dtype="fp32")[0]


TARGETS = {
    "bert": ["query", "key", "value", "dense"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "gemma": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def peft_model(base, kind):
    from peft import LoraConfig, get_peft_model

    task = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"]} if kind == "bert" else {}
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS[kind], **task)).eval()
