"""A second pass that starts behind the blocks that rest: gradients, FLOPs, and the model as it was."""

from __future__ import annotations

import pytest
import torch
import training_runs as runs
from decoders import adapted, assert_close, batch, gradients, of, prepared, selection, split
from flora_runs import budgeted, decoder
from torch import nn

from lorakit.adapters import attach
from lorakit.base.quantize import quantize_nf4
from lorakit.errors import ParameterError
from lorakit.measure.flops import FlopCount
from lorakit.modules import blocks
from lorakit.params import Params, check
from lorakit.settings import TokenSettings
from lorakit.skip.controller import SkipLoRA
from lorakit.tokens.positions import Cut, places
from lorakit.training.loss import MeanLoss


class Nowhere(Cut):
    """At the bottom."""

    def __init__(self, *given):
        super().__init__(*given)
        self.count = 0


LAYERS = {"gemma": {"layer_types": ["sliding_attention", "full_attention"] * 2}}


def four(name: str, nf4: bool = False) -> nn.Module:
    """Four blocks, LoRA on all linear layers."""
    sizes = {"n_layer": 4} if name == "gpt2" else {"num_hidden_layers": 4}
    model = of(name, **sizes | LAYERS.get(name, {}))
    if nf4:
        quantize_nf4(model)
    return adapted(model)


def cut_of(model: nn.Module) -> int:
    return Cut(model, blocks(model)).count


def skipping(model: nn.Module, share: float = 0.5, **options) -> SkipLoRA:
    """In a step in which the first `share` of the blocks rests."""
    skip = SkipLoRA(model, settings=runs.skipping("prefix", share=share, warmup=0.0, explore=0.0, **options))
    skip.bind_two_passes()
    skip.begin()
    skip.begin_step(0.5)
    return skip


@pytest.mark.parametrize("kind", ["right", "packed"])
@pytest.mark.parametrize("name", ["gemma", "llama", "gpt2"])
def test_every_token_chosen_is_skiploras_own_gradient(name, kind):
    model, given = four(name), batch(kind)
    skip, (inputs, labels) = skipping(model), split(given)
    assert cut_of(model) == 2
    expected = gradients(model, MeanLoss("causal")(model(**inputs), labels))
    tokens = selection(model, topk_tokens=0.9999)
    found = gradients(model, tokens.select(model, inputs, labels).finish() / tokens.divisor(labels))
    assert_close(found, expected, 1e-5)
    assert expected and not any(f".{block}." in path for path in expected for block in (0, 1))
    skip.end()
    assert cut_of(model) == 0


@pytest.mark.parametrize("name", ["gemma", "gpt2"])
def test_the_chosen_tokens_gradient_is_that_of_the_whole_second_pass(monkeypatch, name):
    model, (inputs, labels) = four(name), split(batch("prompt"))
    skip, made, flops = skipping(model), [], []
    for cuts in (True, False):
        if not cuts:
            monkeypatch.setattr("lorakit.tokens.fractional.Cut", Nowhere)
        tokens = selection(model, method="flora", topk_tokens=0.3, score="loss")
        selected = tokens.select(model, inputs, labels)
        with FlopCount() as count:
            loss = selected.finish()
        made.append(gradients(model, loss))
        flops.append(count.total)
    assert_close(*made, 1e-5)
    assert 0.4 < flops[0] / flops[1] < 0.6  # half of the blocks, and no head: its logits were kept
    skip.end()


def test_the_model_is_as_it_was():
    model, (inputs, labels) = four("gpt2"), split(batch())
    skip = skipping(model)
    own = model.transformer.h[0].forward
    model.transformer.h[1].forward = first = model.transformer.h[1].forward  # one's own, as accelerate sets it
    tokens = selection(model, topk_tokens=0.5)
    layers = tokens._record(model, inputs, labels, None)[1].layers
    assert [layer.keys is None for layer in layers] == [layer.values is None for layer in layers] == [1, 1, 0, 0]
    tokens.select(model, inputs, labels).finish()
    assert model.transformer.h[0].forward == own and "forward" not in vars(model.transformer.h[0])
    assert vars(model.transformer.h[1])["forward"] is first
    assert not any(block._forward_hooks for block in model.transformer.h)
    skip.end()


def test_what_learns_below_moves_the_cut():
    model = four("llama")
    skip = skipping(model)
    model.get_input_embeddings().weight.requires_grad_()
    assert cut_of(model) == 0
    model.get_input_embeddings().weight.requires_grad_(False)
    model.model.norm.weight.requires_grad_()  # above, but not in a block: not known to be
    assert cut_of(model) == 0
    skip.end()
    top = prepared(attach(of("llama", num_hidden_layers=4), "lora", rank=2, seed=0, target_modules=r".*\.3\..*proj"))
    assert cut_of(top) == 3
    for tied, count in ((False, 4), (True, 0)):  # the head alone learns, or the embedding with it
        bare = prepared(of("llama", num_hidden_layers=4, tie_word_embeddings=tied).requires_grad_(False))
        bare.get_output_embeddings().weight.requires_grad_()
        assert cut_of(bare) == count


@pytest.mark.parametrize("tuples", [False, True])
def test_what_a_block_gives_is_given_once_for_the_chosen(tuples):
    model = four("llama")
    skip, states = skipping(model), torch.randn(3, 16, 32)
    first, second, third, _ = blocks(model)
    cut, at = Cut(model, blocks(model)), places(torch.tensor([1, 18, 19]), 16)
    cut._keep(second, (), (states, None) if tuples else states)
    with cut.started(at):
        for block in (first, second):
            given = block.forward("anything", at=all)
            assert isinstance(given, tuple) == tuples
            given = given[0] if tuples else given
            assert torch.equal(given[at.row, at.slot], states.flatten(0, 1)[[1, 18, 19]])
        assert "forward" not in vars(third)
    with cut.started(at):
        assert "forward" not in vars(first)
    skip.end()


def test_pefts_own_adapters_rest_too():
    import peft

    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    model = prepared(peft.get_peft_model(of("llama", num_hidden_layers=4), config))
    skip, (inputs, labels) = skipping(model), split(batch())
    assert cut_of(model) == 2
    expected = gradients(model, MeanLoss("causal")(model(**inputs), labels))
    tokens = selection(model, topk_tokens=0.9999)
    assert_close(
        gradients(model, tokens.select(model, inputs, labels).finish() / tokens.divisor(labels)), expected, 1e-5
    )
    skip.end()
    assert cut_of(model) == 0 and not any(hasattr(module, "probe") for module in model.modules())


def test_everything_combined_is_one_run(tmp_path):
    """fractional + prefix by share + NF4 + exact loss: trained, resting blocks untouched, the rest moved."""
    model = four("gemma", nf4=True)
    skip = SkipLoRA(model, settings=runs.skipping("prefix", share=0.5, warmup=0.0, explore=0.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    run = budgeted(model, tmp_path, {"mode": "fractional", "score": "update", "topk_tokens": 0.2}, controllers=[skip])
    runs.ran(run)
    moved = {name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".2." in name or ".3." in name}
    assert skip.report()["share_skipped"] == 0.5 and skip.metric is None
    assert run.tokens.report()["chosen"] < 0.25 * run.tokens.report()["predictions"]


MEASURED = [{"skip": "adapter"}, {"skip": "prefix"}, {"skip": "prefix", "skip_share": 0.5, "skip_decide": "forward"}]


@pytest.mark.parametrize("given", MEASURED)
def test_a_measured_skip_is_refused_by_name(given, tmp_path):
    chosen = {"method": "flora", "mode": "fractional"}
    with pytest.raises(ParameterError, match="^gating.mode='fractional': measures no layers"):
        check(Params(gating=TokenSettings(gating=chosen).gating, **given))
    named = {name.removeprefix("skip_"): value for name, value in given.items() if name != "skip"}
    skip = SkipLoRA(model := decoder(), settings=runs.skipping(given["skip"], **named))
    with pytest.raises(ParameterError, match="^gating.mode='fractional': measures no layers"):
        budgeted(model, tmp_path, {"mode": "fractional"}, controllers=[skip])


def test_a_prefix_by_share_is_not_refused():
    chosen = TokenSettings(gating={"method": "flora", "mode": "fractional"}).gating
    check(Params(gating=chosen, skip="prefix", skip_share=0.5))
