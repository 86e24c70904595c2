"""Scores of the layers and of the base model: against hidden states and losses that the model itself gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from decoders import B, T, adapted, assert_close, batch, chosen_of, gradients, of, selection, split
from torch import Tensor, nn

import lorakit
from lorakit.errors import ParameterError
from lorakit.head import rows
from lorakit.modules import blocks
from lorakit.settings import Gating
from lorakit.tokens import build_tokens
from lorakit.tokens.choice import largest, quota
from lorakit.tokens.head_loss import HeadLoss

NAMES = ("gemma", "llama", "gpt2", "qwen2")


def states(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """(B, T, H) before the first block and after each, without the norm behind the last."""
    found: list[Tensor] = []
    handles = [
        block.register_forward_hook(
            lambda _, args, kwargs, out: found.append(
                ((args[0] if args else kwargs["hidden_states"]), out if torch.is_tensor(out) else out[0])
            ),
            with_kwargs=True,
        )
        for block in blocks(model)
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return [found[0][0], *(after for _, after in found)]


@pytest.mark.parametrize("mode", ["gather", "fractional"])
@pytest.mark.parametrize("score", ["update", "updates"])
@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_chosen_by_what_the_blocks_change(name, score, mode):
    model, (inputs, labels) = adapted(of(name, **({"n_layer": 3} if name == "gpt2" else {}))), split(batch("prompt"))
    tokens = selection(model, method="flora", score=score, topk_tokens=0.3, mode=mode)
    heads: list[int] = []
    handle = tokens.head.module.register_forward_hook(lambda _, __, out: heads.append(out[..., 0].numel()))
    chosen = chosen_of(tokens)
    selected = tokens.select(model, inputs, labels)
    assert sum(heads) == 0  # nothing goes through the head to be scored
    loss = selected.finish()
    assert sum(heads) == selected.chosen and selected.loss_sum is None
    handle.remove()
    layers = states(model, inputs)
    steps = [(after - before).norm(dim=-1) for before, after in zip(layers, layers[1:], strict=False)]
    scores = (steps[-1] if score == "update" else sum(steps)).flatten()
    where, _ = rows(labels, "causal")
    expected = where[largest(scores[where], quota(len(where), 0.3))]
    assert torch.equal(chosen[0].where, expected)
    assert gradients(model, loss) and not any(block._forward_hooks for block in blocks(model))
    looked = tokens.select(model, inputs, labels, lambda *_: None)  # a gate's look changes nothing
    assert torch.equal(chosen[1].where, expected) and looked.loss_sum is not None


def test_a_block_may_take_its_states_by_name_and_give_more_than_them():
    score = selection(of("llama"), method="flora", score="updates", mode="gather").score
    before, after = torch.randn(2, 3, 5, 8).bfloat16()
    for args, kwargs, out in (((before,), {}, after), ((), {"hidden_states": before}, (after, None))):
        score._see(nn.Identity(), args, kwargs, out)
    assert score.updates.dtype == torch.float32
    torch.testing.assert_close(score.updates, 2 * (after - before).float().norm(dim=-1))


@pytest.mark.parametrize("mode", ["gather", "fractional"])
def test_excess_is_the_bases_loss_minus_the_adapted_ones(monkeypatch, mode):
    model, (inputs, labels) = adapted(of("llama")), split(batch("prompt"))
    where, targets = rows(labels, "causal")

    def losses() -> Tensor:
        with torch.no_grad():
            logits = model(**inputs).logits.flatten(0, 1)[where]
        return F.cross_entropy(logits, targets, reduction="none")

    with lorakit.disabled(model):
        base = losses()
    scores = base - losses()
    assert scores.abs().min() > 0 and (scores > 0).any() and (scores < 0).any()
    tokens = selection(model, method="flora", score="excess_loss", topk_tokens=0.3, mode=mode)
    chosen = chosen_of(tokens)
    for chunk in (1000, 5):
        monkeypatch.setattr(HeadLoss, "chunk", chunk)
        selected = tokens.select(model, inputs, labels)
        assert torch.equal(chosen[-1].where, where[largest(scores, quota(len(where), 0.3))])
        found = gradients(model, selected.finish())
    random = selection(model, topk_tokens=0.3, mode=mode)
    random.shares.pick = lambda *_, **__: (chosen[-1].index, None)
    assert_close(found, gradients(model, random.select(model, inputs, labels).finish()), 1e-5)


def test_updates_leave_the_gradient_of_drawn_tokens_unbiased_weights():
    model, (inputs, labels) = adapted(of("llama")), split(batch("bare"))
    tokens = selection(model, method="flora", score="update", policy="pps", topk_tokens=0.4, mode="gather")
    chosen = chosen_of(tokens)
    tokens.select(model, inputs, labels).finish()
    weights = chosen[0].weights
    assert weights is not None and (weights >= 1).all() and weights.std() > 0
    assert tokens.divisor(labels) == B * (T - 1)


def test_flops_of_a_score_without_the_head_are_few():
    model = adapted(of("llama"))
    settings = {"method": "flora", "topk_tokens": 0.3}
    update, updates, loss, excess = (
        build_tokens(Gating(score=score, **settings), model, "causal").score
        for score in ("update", "updates", "loss", "excess_loss")
    )
    assert update.flops(7, seen=False) == 7 * 3 * 32 and updates.flops(7, seen=False) == 2 * update.flops(7, seen=False)
    assert loss.flops(7) == 7 * 5 * 99 and excess.flops(7) == 2 * loss.flops(7)


def test_what_has_no_layers_or_no_adapter_is_refused():
    class Bare(nn.Module):
        def __init__(self, head: nn.Module):
            super().__init__()
            self.head, self.config = head, type("Config", (), {})()

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    with pytest.raises(ParameterError, match="^gating.score='update': is of the layers: Bare has no list"):
        build_tokens(Gating(method="flora", score="update"), Bare(nn.Linear(4, 9)), "causal")
    model, (inputs, labels) = of("llama").train(), split(batch())
    tokens = build_tokens(Gating(method="flora", score="excess_loss"), model, "causal")
    with pytest.raises(ParameterError, match="^model='LlamaForCausalLM': needs an adapter"):
        tokens.select(model, inputs, labels)


def test_the_blocks_are_the_largest_list_of_one_class():
    model = of("llama")
    assert blocks(model) == [*model.model.layers]
    model.extra = nn.ModuleList(nn.Linear(1, 1) for _ in range(9))  # longer, as experts are, but smaller
    assert blocks(model) == [*model.model.layers] and blocks(nn.Linear(2, 2)) == []
