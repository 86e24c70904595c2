"""What a model reads past a layer, or keeps in fp32, is not packed; what was packed is saved and loaded again."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import transformers

from lorakit.adapters import quantize_nf4
from lorakit.base.mending import prepare_four_bit
from lorakit.base.nf4 import dequantise, is_four_bit
from lorakit.base.reads import read_elsewhere

T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 99, "pad_token_id": 0}
SIZES = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "pad_token_id": 0}
ATTENTION = {"num_attention_heads": 4, "intermediate_size": 128}
IDS = {"input_ids": torch.arange(1, 9)[None]}
MADE = {  # class, its configuration, inputs, and the layers that stay beside the heads
    "T5ForConditionalGeneration": (T5 | {"decoder_start_token_id": 0}, IDS | {"labels": IDS["input_ids"]}, {"wo"}),
    "T5ForSequenceClassification": (T5 | {"eos_token_id": 8, "decoder_start_token_id": 0}, IDS, {"wo"}),
    "MambaForCausalLM": (SIZES | {"state_size": 8}, IDS, {"dt_proj"}),
    "FalconMambaForCausalLM": (SIZES | {"state_size": 8}, IDS, {"dt_proj"}),
    "LlamaForCausalLM": (SIZES | ATTENTION, IDS, set()),
    "BertForSequenceClassification": (SIZES | ATTENTION, IDS, set()),
}


def made(name):
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    return cls(cls.config_class(**MADE[name][0])).eval()


@pytest.mark.parametrize("name", MADE)
def test_a_packed_model_is_the_dense_one_of_unpacked_weights(name):
    model, (_, inputs, stay) = made(name), MADE[name]
    dense = copy.deepcopy(model)
    quantize_nf4(model, compute_dtype="fp32")
    packed = {path: layer for path, layer in model.named_modules() if is_four_bit(layer)}
    assert packed and not stay & {path.split(".")[-1] for path in packed}
    with torch.no_grad():
        for path, layer in packed.items():
            dense.get_submodule(path).weight.copy_(dequantise(layer))
        torch.testing.assert_close(model(**inputs).logits, dense(**inputs).logits, atol=1e-4, rtol=1e-4)


def test_looking_leaves_every_weight_where_it_is():
    """Also of a module with two names, and of weights that two modules share."""
    model = made("BertForSequenceClassification")
    first, second = model.bert.encoder.layer
    second.attention.self.query = first.attention.self.query
    second.output.dense.weight = first.output.dense.weight
    before = {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    assert (
        read_elsewhere(model, [path for path, layer in model.named_modules() if type(layer) is torch.nn.Linear]) == []
    )
    after = model.state_dict(keep_vars=True)
    assert all(after[name] is value and torch.equal(value, copied) for name, (value, copied) in before.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertForSequenceClassification", "T5ForConditionalGeneration"])
def test_a_packed_model_is_saved_and_loaded_as_it_is(name, double_quant, tmp_path):
    model, inputs = made(name), MADE[name][1]
    quantize_nf4(model, double_quant=double_quant, compute_dtype="fp32").save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    prepare_four_bit(again, ())  # else bitsandbytes evaluates in bf16 on processors that have it
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)
    for path, layer in model.named_modules():
        if is_four_bit(layer):
            assert torch.equal(dequantise(again.get_submodule(path)), dequantise(layer))


class ReadsAgain(torch.nn.Module):
    """Reads a layer's weight, once the layer has run, where it is told to."""

    dummy_inputs = {"x": torch.zeros(1, 4)}

    def __init__(self, reads):
        super().__init__()
        self.reads, self.one, self.two = reads, torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, x):
        x = self.two(self.one(x))
        self.reads(self.one.weight, x)
        return x


READS = [lambda w, x: x @ w, lambda w, x: torch.matmul(x, other=w), lambda w, x: w.dtype]
HARMLESS = [lambda w, x: None, lambda w, x: (w.shape, w.device, w.ndim), lambda w, x: (w.size(), w.numel())]


@pytest.mark.parametrize("reads", [*READS, *HARMLESS])
def test_a_read_after_the_layer_has_run_is_one(reads):
    assert read_elsewhere(ReadsAgain(reads), ["one", "two"]) == ["one"] * (reads in READS)


def test_without_bitsandbytes_no_layer_is_of_4_bits(monkeypatch):
    monkeypatch.delitem(sys.modules, "bitsandbytes.nn", raising=False)
    assert not is_four_bit(torch.nn.Linear(2, 2))
