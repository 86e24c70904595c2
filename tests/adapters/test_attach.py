"""Attach, train, merge, detach: what must hold for every adapter."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import (
    KINDS,
    STILL,
    assert_only_trained,
    backward,
    batch,
    bits,
    conv1d,
    gradients,
    logits,
    perturb,
    same_bits,
    train,
)
from torch import nn

from lorakit.adapters import (
    AdapterSettings,
    LoRALayer,
    adapter_bytes,
    adapter_layers,
    adapter_state,
    attach,
    detach,
    is_merged,
    load_adapter_state,
    merge,
    merged,
    parameter_stats,
    quantize_nf4,
    unmerge,
)
from lorakit.errors import LorakitError

methods = pytest.mark.parametrize("method", ["lora", "hira"])


@pytest.fixture(params=KINDS)
def model(request, build):
    return build(request.param, initializer_range=0.2)  # HiRA's update is as large as W0 lets it be


@methods
def test_training_leaves_frozen_weights_bit_identical(model, method):
    before = logits(model)
    assert attach(model, method, seed=0) is model
    assert torch.equal(logits(model), before)  # nothing changes at the start
    stored = bits(model)
    assert not torch.allclose(logits(train(model)), before, atol=1e-3)
    assert_only_trained(model, stored)


def test_detach_brings_everything_back(model):
    first = next(iter(model.parameters())).requires_grad_(False)  # flags need not be all alike
    modules, flags = list(model.modules()), [p.requires_grad for p in model.parameters()]
    before = logits(model)
    merge(train(attach(model, trainable=(), seed=0)))
    detach(model)
    assert list(model.modules()) == modules
    assert [p.requires_grad for p in model.parameters()] == flags and not first.requires_grad
    assert torch.equal(logits(model), before)
    attach(model, seed=0)  # and it can be attached again


@methods
def test_merge_and_unmerge(model, method):
    perturb(attach(model, method, seed=0))
    unmerged_bits, unmerged_logits = bits(model), logits(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    once = bits(merge(model))
    assert all(a is b for a, b in zip(trained, [p for p in model.parameters() if p.requires_grad], strict=True))
    torch.testing.assert_close(logits(model), unmerged_logits, atol=1e-5, rtol=1e-5)
    assert same_bits(merge(model), once)  # twice is once
    twin = copy.deepcopy(model)
    for side in (model, twin):
        assert same_bits(unmerge(side), unmerged_bits) and same_bits(unmerge(side), unmerged_bits)
        assert torch.equal(logits(side), unmerged_logits)
    assert same_bits(merge(model), once)
    weight = f"{next(iter(adapter_layers(model)))}.base_layer.weight"
    assert not torch.equal(once[weight], unmerged_bits[weight])


def test_merged_context_leaves_the_model_as_it_was(model):
    perturb(attach(model, seed=0))
    with pytest.raises(RuntimeError, match="inside"), merged(model):
        assert is_merged(model)
        raise RuntimeError("inside")
    assert not is_merged(model)
    with merged(merge(model)):
        pass
    assert is_merged(model)


def test_training_while_merged_is_refused(model):
    merge(attach(model, seed=0)).train()
    with pytest.raises(LorakitError, match="unmerge"):
        model(**batch())
    with torch.no_grad():
        model(**batch())
    model.eval()(**batch())


def test_a_model_that_moved_while_merged_unmerges_where_it_is(model):
    expected = logits(perturb(attach(model, seed=0)))
    unmerge(merge(model).double())
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    torch.testing.assert_close(logits(model).float(), expected, atol=1e-4, rtol=1e-4)


def test_merging_a_tied_head_leaves_the_embedding_alone(tiny_gpt2):
    model = tiny_gpt2().eval()
    assert model.lm_head.weight is model.transformer.wte.weight
    embedding = model.transformer.wte.weight
    before = embedding.detach().clone()
    expected = logits(perturb(attach(model, target_modules=["lm_head"], seed=0)))
    merge(model)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.transformer.wte.weight, before)
    detach(model)
    assert model.lm_head.weight is model.transformer.wte.weight is embedding


def test_full_keeps_tied_weights_tied(tiny_gpt2):
    model = train(attach(tiny_gpt2(), "full"))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "lm_head.weight" not in adapter_state(model)  # stored once, under the embedding's name
    stats = parameter_stats(model)
    assert stats.trainable == stats.total == sum(p.numel() for p in model.parameters())


def test_train_and_eval_return_the_model(model):
    attach(model)
    assert not any(module.training for module in model.modules())  # as it was
    assert model.train() is model and model.eval() is model
    layer = next(iter(adapter_layers(model).values()))
    assert layer.train() is layer and layer.eval() is layer


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_the_seed_decides_and_the_global_generator_is_left_alone(tiny_bert, init):
    base = tiny_bert()
    state = torch.get_rng_state()
    first, again, other = (adapter_state(attach(copy.deepcopy(base), seed=seed, init=init)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    name = next(name for name in first if name.endswith("lora_A.weight"))
    assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])
    attach(base)
    assert not torch.equal(torch.get_rng_state(), state)


# --- what is trained -------------------------------------------------------------------------------------------------


def trainable_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_head_trains_the_task_head_only(tiny_bert, tiny_gpt2):
    assert trainable_names(attach(tiny_bert(), "head")) == {"classifier.weight", "classifier.bias"}
    assert trainable_names(attach(tiny_gpt2(), "head")) == {"transformer.wte.weight"}  # tied to the output head
    assert trainable_names(attach(tiny_gpt2(tie_word_embeddings=False), "head")) == {"lm_head.weight"}


def test_heads_are_found_by_structure(build, tiny_gpt2, tiny_gemma):
    from transformers import Gemma3TextForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

    from lorakit.head import task_head

    roberta = RobertaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    assert task_head(build("distilbert")) == ["pre_classifier", "classifier"]
    assert task_head(build("gpt2_classifier")) == ["score"]
    assert task_head(Gemma3TextForSequenceClassification(tiny_gemma().config)) == ["score"]
    assert task_head(RobertaForSequenceClassification(roberta)) == ["classifier"]
    assert task_head(tiny_gpt2()) == task_head(build("masked")) == task_head(nn.Linear(2, 2)) == []


def test_trainable_names_are_trained_in_full_and_get_no_adapter(tiny_bert):
    model = attach(tiny_bert(), trainable=["classifier", "layer.1.output"], target_modules="all-linear")
    assert "bert.encoder.layer.1.output.dense.weight" in trainable_names(model)
    assert "bert.encoder.layer.1.output.dense" not in adapter_layers(model)
    assert "bert.encoder.layer.0.output.dense" in adapter_layers(model)


@methods
def test_parameter_stats_and_bytes_count(tiny_bert, method):
    base = tiny_bert()
    frozen = sum(p.numel() for p in base.parameters())
    bare = parameter_stats(tiny_bert().requires_grad_(False))
    assert (bare.trainable, bare.total, bare.nonzero, bare.reduction_factor) == (0, frozen, 0, frozen)
    model = attach(base, method, rank=4, target_modules=["query"], seed=0)
    adapters, head = 2 * 4 * (32 + 32), 2 * 32 + 2
    stats = parameter_stats(model)
    assert (stats.trainable, stats.total) == (adapters + head, frozen + adapters)
    assert stats.nonzero == adapters // 2 + 2 * 32 and type(stats.nonzero) is int  # B and the head's bias are zero
    assert stats.reduction_factor == stats.total / stats.trainable
    assert adapter_bytes(model) == 4 * (adapters + head)


def test_switching_tasks_by_state(model):
    attach(model, seed=0)
    first = adapter_state(train(model))
    assert not any(tensor.requires_grad for tensor in first.values())
    first_logits = logits(model)
    second = adapter_state(train(model))
    second_logits = logits(model)
    assert not torch.allclose(first_logits, second_logits, atol=1e-4)
    assert torch.equal(logits(load_adapter_state(model, first)), first_logits)
    assert torch.equal(logits(load_adapter_state(model, second)), second_logits)


# --- one layer -------------------------------------------------------------------------------------------------------


def layer_of(base, **settings):
    layer = LoRALayer(base, AdapterSettings(**settings))
    nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(4))
    base.requires_grad_(False)
    return layer


@pytest.mark.parametrize("base", [lambda: nn.Linear(5, 7), lambda: nn.Linear(5, 7, bias=False), conv1d])
def test_the_layer_is_the_formula(base):
    layer = layer_of(base().double(), rank=3, alpha=5.0, dropout=0.5).eval()
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    expected = layer.base_layer(x) + 5.0 / 3 * (x @ layer.lora_A.T @ layer.lora_B.T)
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(layer(x[0, 0]), expected[0, 0], atol=1e-12, rtol=0)
    assert layer(x[:0]).shape == (0, 3, 7)
    assert torch.linalg.matrix_rank(layer.delta_weight()) == 3


@pytest.mark.parametrize("base", [lambda: nn.Linear(5, 7), conv1d])
def test_gradcheck(base):
    layer = layer_of(base().double(), rank=2, rslora=True)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)

    def call(x, A, B):
        return torch.func.functional_call(layer, {"lora_A": A, "lora_B": B}, (x,))

    assert torch.autograd.gradcheck(call, (x, layer.lora_A, layer.lora_B))


def test_gradients_do_not_depend_on_accumulation(build):
    model, whole = perturb(attach(build("bert"), seed=0)), batch(8)
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(**whole).logits.square().sum(), trained)
    for part in range(0, 8, 2):
        model(**{name: rows[part : part + 2] for name, rows in whole.items()}).logits.square().sum().backward()
    for one, parameter in zip(expected, trained, strict=True):
        assert (parameter.grad - one).norm() <= 1e-5 * one.norm() + 1e-7


def test_code_that_reads_weights_past_forward_sees_the_adapter():
    """nn.TransformerEncoderLayer's fused inference path and nn.MultiheadAttention never call the linear's forward."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = perturb(attach(nn.Sequential(encoder), trainable=(), seed=0))
    assert {path.rpartition(".")[2] for path in adapter_layers(model)} == {"out_proj", "linear1", "linear2"}
    x = torch.randn(3, 5, 16)
    by_steps = model.train()(x)
    by_steps.square().sum().backward()
    assert all(layer.lora_A.grad.abs().max() > 0 for layer in adapter_layers(model).values())
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), by_steps, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(merge(model)(x), by_steps, atol=1e-5, rtol=1e-5)


def test_a_module_used_under_two_names_is_adapted_under_both():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    attach(model, trainable=(), seed=0)
    assert isinstance(model["a"][0], LoRALayer) and model["a"][0] is model["b"][0]
    detach(model)
    assert model["a"][0] is model["b"][0] is shared


@pytest.mark.parametrize("four_bits", [False, True])
@methods
def test_gradient_checkpointing_gives_the_same_gradients(build, method, four_bits):
    """On a 4-bit base the adapter adds into the base's output in place; recomputing must not see the sum twice."""
    for kind in KINDS:
        base = build(kind, initializer_range=0.2, **STILL[kind])
        model = perturb(attach(quantize_nf4(base) if four_bits else base, method, seed=0)).train()
        model.config.use_cache = False
        backward(model)
        plain = {name: grad.clone() for name, grad in gradients(model).items()}
        model.zero_grad()
        model.activation_checkpointing_enable({"use_reentrant": False})
        backward(model)
        assert all(torch.equal(grad, plain[name]) for name, grad in gradients(model).items())


def test_it_attaches_on_the_meta_device(tiny_bert):
    with torch.device("meta"):
        base = tiny_bert()
    model = attach(base, seed=0)
    assert all(p.is_meta for p in model.parameters())
    assert parameter_stats(model).trainable == adapter_bytes(model) / 4
