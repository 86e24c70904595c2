"""LoRATransformer: what it sees, what it trains, and its adapters stored, switched and merged."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lorakit.errors import CheckpointError, ParameterError
from lorakit.scratch import LoRALinear, LoRATransformer
from lorakit.scratch.attention import visible_keys

V, D, HEADS, LAYERS, T = 17, 16, 2, 2, 9


def build(**overrides) -> LoRATransformer:
    """A small model in eval mode."""
    arguments = {"vocab_size": V, "d_model": D, "num_heads": HEADS, "num_layers": LAYERS, "lora_r": 2, "lora_alpha": 4}
    return LoRATransformer(**arguments | overrides).eval()


def shake(model: LoRATransformer, seed: int) -> LoRATransformer:
    """Give every B values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.lora_layers():
        layer.lora_B.data.normal_(generator=generator, std=0.3)
    return model


def tokens(rows: int = 3, length: int = T) -> torch.Tensor:
    return torch.randint(0, V, (rows, length))


# what a position sees


@pytest.mark.parametrize("masked", [False, True])
def test_a_causal_model_never_looks_ahead(masked):
    model, ids = shake(build(), 0), tokens()
    mask = torch.ones_like(ids) if masked else None
    before = model(ids, mask)
    for changed in range(T):
        other = ids.clone()
        other[:, changed] = (other[:, changed] + 1) % V
        after = model(other, mask)
        assert torch.equal(after[:, :changed], before[:, :changed])
        assert not torch.allclose(after[:, changed:], before[:, changed:])
        assert not torch.allclose(after[:, -1], before[:, -1])  # and the past is seen


def test_a_bidirectional_model_sees_everything():
    model, ids = build(causal=False), tokens()
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % V
    assert (model(other) - model(ids)).abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize("causal", [True, False])
def test_a_mask_of_ones_changes_nothing(causal):
    model, ids = build(causal=causal), tokens()
    torch.testing.assert_close(model(ids, torch.ones_like(ids)), model(ids), atol=1e-6, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_seen_and_moves_nothing(causal, side):
    model, ids = shake(build(causal=causal), 0), tokens(1)
    padding, there = torch.zeros(1, 4, dtype=torch.long), slice(4, None) if side == "left" else slice(None, T)
    parts, mask = [padding, ids], [padding, torch.ones_like(ids)]
    if side == "right":
        parts.reverse(), mask.reverse()
    padded = model(torch.cat(parts, 1), torch.cat(mask, 1))
    assert padded.isfinite().all()
    torch.testing.assert_close(padded[:, there], model(ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_every_position_sees_something_even_where_all_is_padding(causal):
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    visible = visible_keys(mask, causal)
    expected = mask.bool()[:, None, :].expand(3, 4, 4)
    expected = (expected.tril() if causal else expected) | torch.eye(4).bool()  # no softmax over nothing
    assert torch.equal(visible[:, 0], expected)


def test_attention_is_softmax_of_scaled_products():
    """One head, one layer, by hand in numpy-like steps, positions turned as complex numbers."""
    attention = build(num_heads=1, num_layers=1).blocks[0].attention.double()
    x = torch.randn(1, T, D, dtype=torch.float64)
    turn = torch.polar(
        torch.ones(T, D // 2, dtype=torch.float64),
        torch.arange(T)[:, None] * 10_000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D),
    )
    q, k = (
        torch.complex(p(x)[..., : D // 2], p(x)[..., D // 2 :]) * turn for p in (attention.q_proj, attention.k_proj)
    )
    scores = (q @ k.mH).real / math.sqrt(D)
    scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
    expected = attention.o_proj(scores.softmax(-1) @ attention.v_proj(x))
    angles = torch.real(turn), torch.imag(turn)
    torch.testing.assert_close(attention(x, angles, None), expected, atol=1e-10, rtol=0)


# what is adapted and trained


@pytest.mark.parametrize(
    ("options", "names"),
    [({}, {"q_proj", "k_proj", "v_proj", "o_proj"}), ({"attention_targets": "qv"}, {"q_proj", "v_proj"}),
     ({"attention_targets": "o", "adapt_feedforward": True}, {"o_proj", "up_proj", "down_proj"}),
     ({"adapt_attention": False, "adapt_feedforward": True}, {"up_proj", "down_proj"})],
)  # fmt: skip
def test_adapts_what_it_is_told(options, names):
    model = build(**options)
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    assert {name.split(".")[-1] for name in adapted} == names and len(adapted) == LAYERS * len(names)


def test_parameter_stats_by_hand():
    stats = build(adapt_feedforward=True, attention_targets="qv").configure_lora_training().get_parameter_stats()
    layer = 4 * (D * D + D) + (4 * D * D + 4 * D) + (4 * D * D + D) + 2 * 2 * D  # attention, feed-forward, norms
    base = V * D + LAYERS * layer + 2 * D
    lora = LAYERS * (2 * 2 * (D + D) + 2 * 2 * (D + 4 * D))
    expected = {"total": base + lora, "trainable": lora, "frozen": base, "lora": lora, "base": base}
    assert stats == expected | {"reduction_factor": (base + lora) / lora}


def test_only_lora_gets_gradients_and_pretraining_is_the_opposite():
    model, ids = shake(build(adapt_feedforward=True), 0), tokens()
    for configure, lora in ((model.configure_lora_training, True), (model.configure_pretraining, False)):
        assert configure() is model
        model.zero_grad()
        F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        for name, parameter in model.named_parameters():
            trained = ("lora_" in name) == lora
            assert parameter.requires_grad == trained and (parameter.grad is not None) == trained
    assert model.get_parameter_stats()["trainable"] == model.get_parameter_stats()["base"]


def plain_of(model: LoRATransformer) -> LoRATransformer:
    """The base of one that adapts its feed-forward layers too, with plain linears."""
    plain = build(adapt_feedforward=True)
    for module in plain.modules():
        for name, child in module.named_children():
            if isinstance(child, LoRALinear):
                setattr(module, name, nn.Linear(child.in_features, child.out_features))
    plain.load_state_dict(model.base_state_dict())  # strict: nothing missing, nothing unexpected
    return plain


def test_a_new_model_computes_what_its_base_computes():
    model, ids = build(adapt_feedforward=True), tokens()
    assert torch.equal(plain_of(model)(ids), model(ids))


def test_equals_peft_on_the_whole_model():
    from peft import LoraConfig, inject_adapter_in_model

    ours, ids = shake(build(adapt_feedforward=True), 0).configure_lora_training(), tokens()
    theirs = plain_of(ours)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=4, target_modules=names, init_lora_weights=False), theirs)
    factors = dict(theirs.named_parameters())
    for name, tensor in ours.lora_state_dict().items():
        factors[f"{name}.default.weight"].data.copy_(tensor)
    for model in (ours, theirs):
        F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    torch.testing.assert_close(ours(ids), theirs(ids), atol=1e-6, rtol=0)
    for name, parameter in ours._lora_parameters().items():
        torch.testing.assert_close(parameter.grad, factors[f"{name}.default.weight"].grad, atol=1e-6, rtol=0)


# adapters


def test_two_adapters_take_turns_exactly():
    model, ids = build(adapt_feedforward=True), tokens()
    base = model(ids)
    logits = {}
    for seed, name in enumerate(("reviews", "chats")):
        model.reset_lora()
        assert torch.equal(model(ids), base)
        shake(model, seed).store_adapter(name)
        logits[name] = model(ids)
    with pytest.raises(ParameterError, match="name='absent': stored adapters are reviews, chats"):
        model.switch_adapter("absent")
    assert not torch.allclose(logits["reviews"], logits["chats"])
    for name in ("reviews", "chats", "reviews", "reviews"):
        model.switch_adapter(name)
        assert torch.equal(model(ids), logits[name])


def test_switching_keeps_a_merged_model_merged_with_the_new_adapter():
    model, ids = build(), tokens()
    for seed, name in enumerate(("reviews", "chats")):
        shake(model, seed).store_adapter(name)
    expected = model(ids)
    model.switch_adapter("reviews")
    model.merge()
    merged = model(ids)
    model.switch_adapter("chats")
    assert model.merged
    torch.testing.assert_close(model(ids), expected, atol=1e-5, rtol=0)
    model.switch_adapter("reviews")
    assert torch.equal(model(ids), merged)
    model.unmerge()
    model.switch_adapter("chats")
    assert torch.equal(model(ids), expected)


def test_merging_keeps_the_logits_and_training_unmerges():
    model, ids = shake(build(adapt_feedforward=True), 0), tokens()
    logits, base = model(ids), model.base_state_dict()
    model.merge()
    assert model.merged
    torch.testing.assert_close(model(ids), logits, atol=1e-5, rtol=0)
    with pytest.raises(ParameterError, match="unmerge"):
        model.base_state_dict()
    model.configure_lora_training()
    assert not model.merged and torch.equal(model(ids), logits)
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.base_state_dict().items())


def test_an_adapter_that_does_not_fit_is_refused_and_changes_nothing():
    model = shake(build(), 0)
    before = model.lora_state_dict()
    wrong_rank = build(lora_r=3).lora_state_dict()
    missing = dict(list(before.items())[1:])
    cases = {r"\(3, 16\), not \(2, 16\)": wrong_rank, "lacks": missing, "unknown": before | {"x": 0}}
    for message, state in cases.items():
        with pytest.raises(CheckpointError, match=message):
            model.load_lora_state_dict(state)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.lora_state_dict().items())
    with pytest.raises(ParameterError, match="stored adapters are none"):
        model.switch_adapter("absent")


@pytest.mark.parametrize(
    ("overrides", "name"),
    [({"d_model": 6, "num_heads": 2}, "d_model"),  # heads of odd width
     ({"lora_r": 0}, "r"), ({"lora_alpha": 0.0}, "lora_alpha"), ({"d_model": 15}, "d_model"),
     ({"num_heads": 0}, "num_heads"), ({"num_layers": 0}, "num_layers"), ({"vocab_size": 0}, "vocab_size"),
     ({"attention_targets": "qx"}, "attention_targets"), ({"attention_targets": ""}, "attention_targets"),
     ({"adapt_attention": False}, "adapt_attention")],
)  # fmt: skip
def test_bad_arguments_are_named(overrides, name):
    with pytest.raises(ParameterError) as caught:
        build(**overrides)
    assert caught.value.name == name
