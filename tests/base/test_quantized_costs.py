"""What a 4-bit base costs, its optimizers, what it refuses, and CUDA."""

from __future__ import annotations

import json
import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from four_bit_models import assert_close, dense_twin, four_bit_layers, nf4_bytes
from small_models import KINDS, backward, batch, bits, gradients, logits, peft_model, perturb, same_bits
from torch import nn
from transformers import AutoConfig

from lorakit.adapters import adapter_layers, attach, merge, parameter_stats, quantize_nf4, unmerge
from lorakit.adapters.state import adapter_state
from lorakit.base.nf4 import dense_numel, is_four_bit, stored_bytes
from lorakit.errors import ParameterError
from lorakit.measure.flops import FlopCount
from lorakit.measure.live import LiveBytes
from lorakit.measure.memory import predict_step_memory
from lorakit.measure.weights import weight_table
from lorakit.params import Params
from lorakit.runs import plan
from lorakit.runs.assembly import Assembled

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")


# --- accounting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_and_the_real_table_agree(build, kind, double_quant):
    shape = build(kind).to("meta")
    shape.tie_weights()
    plan.quantize_meta(shape)
    model = quantize_nf4(build(kind), double_quant=double_quant)
    planned = weight_table(model)
    assert (weight_table(shape) == planned) == double_quant
    by_formula = sum(nf4_bytes(dense_numel(m.weight), double_quant) for m in four_bit_layers(model).values())
    assert {row["kind"]: row["bytes"] for row in planned["rows"]}["linear, 4-bit"] == by_formula
    tensors = {id(p): p for p in model.parameters()}.values()
    assert planned["base"]["bytes"] == sum(map(stored_bytes, tensors))
    attached = weight_table(attach(model, trainable=(), rank=4))
    assert attached["base"] == planned["base"]
    assert attached["rows"][:-1] == planned["rows"]
    adapters = sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in adapter_layers(model).values())
    row = {"kind": "adapters", "parameters": adapters, "bytes": 4 * adapters, "bits_per_parameter": 32}
    assert attached["rows"][-1] == row
    json.dumps(attached)


def test_the_table_of_a_dense_model(build):
    table = weight_table(build("gpt2").bfloat16())
    assert [row["kind"] for row in table["rows"]] == ["linear, other", "embeddings", "norms and biases"]
    assert table["base"]["bits_per_parameter"] == 16 and table["times_smaller_than_fp16"] == 1


def test_pefts_adapters_are_told_from_the_base(build):
    base = quantize_nf4(build("gemma"))
    before = weight_table(base)
    after = weight_table(peft_model(base, "gemma"))
    assert after["base"] == before["base"] and after["rows"][-1]["kind"] == "adapters"


REAL = [("distilbert-base-uncased", "classify", 1.888), ("all-MiniLM-L6-v2", "classify", 1.540)]
REAL += [("gemma-3-270m", "causal", 1.384)]


@pytest.mark.parametrize(("name", "kind", "ratio"), REAL)
def test_the_honest_ratio_of_real_models(name, kind, ratio):
    """Against fp16 throughout, with what is not quantised in fp16 too: embeddings keep it far from fourfold."""
    from lorakit.models import configs

    config = AutoConfig.for_model(**json.loads(configs.PACKAGED.read_text())[name])
    model = plan.build(config, kind, "bf16")
    plan.quantize_meta(model)
    table = weight_table(model)
    counts = {row["kind"]: row["parameters"] for row in table["rows"]}
    rest = sum(counts.values()) - counts["linear, 4-bit"]
    assert table["times_smaller_than_fp16"] == pytest.approx(ratio, abs=0.005)
    by_hand = 16 * sum(counts.values()) / (4.127 * counts["linear, 4-bit"] + 16 * rest)
    assert table["times_smaller_than_fp16"] == pytest.approx(by_hand, rel=0.01)
    assert table["rows"][0]["bits_per_parameter"] <= 4.2


def test_parameters_and_flops_are_those_of_the_dense_model(build):
    for kind in KINDS:
        stats = [parameter_stats(attach(base, seed=0)) for base in (quantize_nf4(build(kind)), build(kind))]
        assert stats[0] == stats[1]
        counts = []
        quantised = quantize_nf4(build(kind))
        for model in (dense_twin(quantised), quantised):
            attach(model, seed=0)
            with FlopCount() as training:
                backward(model.train())
            with FlopCount() as evaluation, torch.inference_mode():
                model.eval()(**batch())
            counts.append((training.total, evaluation.total))
        assert counts[0] == counts[1] and min(counts[0]) > 0


def test_predicted_weights_are_the_bytes_there_are(build):
    model = attach(quantize_nf4(build("gemma")), rank=4, seed=0)
    rows = weight_table(model)["rows"]
    buffers = {b.untyped_storage().data_ptr(): b.numel() * b.element_size() for b in model.buffers()}
    weights, before = sum(row["bytes"] for row in rows), bits(model)
    predicted = predict_step_memory(model, {**batch(), "labels": batch()["input_ids"]})
    assert predicted["parameters"] == weights + sum(buffers.values())
    assert same_bits(model, before)
    assert all(is_four_bit(layer.base_layer) for layer in adapter_layers(model).values())


def test_the_unpacked_weight_is_seen_while_it_lives():
    model = quantize_nf4(nn.Sequential(nn.Linear(256, 1024, bias=False)))
    x = torch.randn(2, 256, dtype=torch.bfloat16)
    with LiveBytes() as live, torch.no_grad():
        live.claim(model[0].weight, "parameters")
        model(x)
    activations = live.peak()["activations"]
    unpacked, scale, out = 2 * 256 * 1024, 4 * 256 * 1024 // 64, 2 * 2 * 1024  # bf16, fp32, bf16
    assert unpacked + scale + out <= activations <= unpacked + 2 * scale + out  # scales before and after adding m


# --- optimizers ------------------------------------------------------------------------------------------------------

OPTIMIZERS = ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_named_optimizers_step_and_their_state_is_as_predicted(build, tmp_path, name):
    from transformers import Trainer

    from lorakit.measure.memory import PREDICTABLE
    from lorakit.training.arguments import training_arguments

    arguments = training_arguments(Params(optimizer=name), str(tmp_path))
    assert arguments.optim == name
    model = attach(quantize_nf4(build("bert", hidden_size=64, intermediate_size=1024)), rank=8, seed=0)
    optimizer = Trainer(model=model, args=arguments).create_optimizer()
    assert type(optimizer).__module__.startswith("bitsandbytes")
    before = adapter_state(model)
    backward(model)
    optimizer.step()
    assert all(not torch.equal(tensor, before[key]) for key, tensor in adapter_state(model).items() if "lora_B" in key)
    trained = [p for p in model.parameters() if p.requires_grad]
    predicted = PREDICTABLE[name](trained, False)
    predicted.step()
    sizes = [
        {k: v.numel() * v.element_size() for k, v in side.state[p].items() if torch.is_tensor(v) and "qmap" not in k}
        for side in (optimizer, predicted)
        for p in trained
    ]
    assert sizes[: len(trained)] == sizes[len(trained) :]
    assert any("absmax1" in size for size in sizes) == ("8bit" in name)


def test_the_note_says_that_nothing_pages():
    def notes(optimizer, device):
        params, model = Params(optimizer=optimizer), SimpleNamespace(device=torch.device(device))
        return Assembled(params, model, None, SimpleNamespace(notes=["task"]), SimpleNamespace(notes=["model"])).notes

    paged = "optimizer 'paged_adamw_8bit': nothing pages on cpu; its state stays in memory, unpaged"
    assert notes("paged_adamw_8bit", "cpu") == ["model", "task", paged]
    assert notes("paged_adamw_8bit", "cuda") == notes("adamw_8bit", "cpu") == ["model", "task"]


# --- bad input -------------------------------------------------------------------------------------------------------


def untouched(model):
    return not four_bit_layers(model) and not hasattr(model, "is_loaded_in_4bit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_dtype": "fp16"}, "compute_dtype='fp16': fp16 diverged on 20 % .* must be one of bf16, fp32"),
        ({"compute_dtype": "int8"}, "compute_dtype='int8': must be one of"),
        ({"double_quant": "yes"}, "double_quant='yes'"),
        ({"exclude": ["no_such"]}, "'no_such' matches no module"),
        ({"exclude": "query"}, "exclude='query': must be"),
        ({"exclude": [1]}, r"exclude=\[1\]: must be"),
        ({"exclude": ["bert"]}, "quantize='nf4': BertForSequenceClassification has no linear layer outside"),
    ],
)
def test_bad_options(build, options, message):
    model = build("bert")
    with pytest.raises(ParameterError, match=message):
        quantize_nf4(model, **options)
    assert untouched(model)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda weight: weight.double(), "has torch.float64 weights"),
        (lambda weight: torch.ones_like(weight, dtype=torch.int8), "has torch.int8 weights"),
        (lambda weight: weight.to("meta"), "meta device"),
        (lambda weight: weight.index_fill(0, torch.tensor([3]), float("nan")), "not finite"),
    ],
)
def test_a_layer_that_cannot_be_held_is_named(build, spoil, message):
    model = build("bert")
    query = model.bert.encoder.layer[1].attention.self.query
    query.weight = nn.Parameter(spoil(query.weight.detach()), requires_grad=False)
    with pytest.raises(ParameterError, match=rf"quantize='nf4': bert.encoder.layer.1.attention.self.query .*{message}"):
        quantize_nf4(model)
    assert untouched(model)


@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (1, 1)])
def test_layers_of_one_or_two_weights_are_refused(shape):
    with pytest.raises(ParameterError, match="0 has [12] weights"):
        quantize_nf4(nn.Sequential(nn.Linear(*shape)))


def test_a_layer_read_past_its_forward_is_refused():
    model = nn.TransformerEncoderLayer(16, 2, 32)
    with pytest.raises(ParameterError, match="self_attn.out_proj is a NonDynamicallyQuantizableLinear"):
        quantize_nf4(model)
    assert list(four_bit_layers(quantize_nf4(model, exclude=["out_proj"]))) == ["linear1", "linear2"]


def test_a_weight_tied_to_what_stays_is_refused():
    model = nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 8, bias=False))
    model[1].weight = model[0].weight
    with pytest.raises(ParameterError, match=r"1 shares its weight with 0.weight; exclude=\['1'\]"):
        quantize_nf4(model)


def test_after_an_adapter_or_itself_is_refused(build):
    for model in (attach(build("bert")), peft_model(build("bert"), "bert")):
        with pytest.raises(ParameterError, match="quantize='nf4': the model already has an adapter"):
            quantize_nf4(model)
        assert untouched(model)
    with pytest.raises(ParameterError, match="query is in 4 bits already"):
        quantize_nf4(quantize_nf4(build("bert")))


def test_without_bitsandbytes(build, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = build("bert")
    with pytest.raises(ParameterError, match="quantize='nf4': needs bitsandbytes"):
        quantize_nf4(model)
    assert untouched(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "full"}, "the whole model.*is in 4 bits, which cannot train"),
        ({"trainable": ["layer.1.output.dense"]}, "trainable='bert.encoder.layer.1.output.dense'.*is in 4 bits"),
        (
            {
                "trainable": ["layer.1"],
                "method": "peft",
                "peft_type": "LORA",
                "target_modules": ["layer.0.output.dense"],
            },
            "trainable='bert.encoder.layer.1': bert.*is in 4 bits",
        ),
    ],
)
def test_packed_weights_are_not_trained_in_full(build, options, message):
    model = quantize_nf4(build("bert"))
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ParameterError, match=message):
        attach(model, **options)
    assert not adapter_layers(model) and [p.requires_grad for p in model.parameters()] == flags


def test_bitsandbytes_says_nothing_when_imported():
    """It would say on stderr, at its import by transformers or PEFT, that a kernel it could download is missing."""
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)


# --- elsewhere -------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
def test_on_cuda_as_on_the_cpu(build):
    here = perturb(attach(quantize_nf4(build("gemma"), compute_dtype="fp32"), seed=0))
    there = perturb(attach(quantize_nf4(build("gemma").cuda(), compute_dtype="fp32"), seed=0))
    moved = perturb(attach(quantize_nf4(build("gemma"), compute_dtype="fp32"), seed=0)).cuda()
    expected = logits(here)
    for model in (there, moved):
        inputs = {name: value.cuda() for name, value in batch().items()}
        out = model(**inputs).logits
        assert_close(out.detach().cpu(), expected, 1e-3)
        out.square().mean().backward()
        assert all(grad.norm() > 0 for grad in gradients(model).values())
        merge(model)
        assert_close(model(**inputs).logits.detach().cpu(), expected, 1e-3)
        unmerge(model)


@pytest.mark.assets("gemma-3-270m")
def test_gemma_from_its_dequantised_file():
    from lorakit import models

    loaded = models.load("gemma-3-270m", "causal", dtype="bf16")
    embeddings = loaded.model.get_input_embeddings().weight.clone()
    model = attach(quantize_nf4(loaded.model), rank=4, seed=0)
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    ids = loaded.tokenizer("The capital of France is Paris.", return_tensors="pt")
    loss = model(**ids, labels=ids["input_ids"]).loss
    assert loss < 5  # a model that knows nothing: log 262144 = 12.5
    loss.backward()
    assert all(layer.lora_B.grad.norm() > 0 for layer in adapter_layers(model).values())
    assert weight_table(model)["times_smaller_than_fp16"] == pytest.approx(1.38, abs=0.01)
