"""How a selection plans a batch, what it says of it, and what it asks of the model first."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from decoders import adapted, batch, chosen_of, of, selection, split

from lorakit.errors import CheckpointError, LorakitError
from lorakit.settings import Gating, TokenSettings
from lorakit.sketches.head_gradient import group_maxima
from lorakit.tokens import build_tokens
from lorakit.tokens.head_loss import HeadLoss, cheapest, likelihoods

FLORA = {"method": "flora", "topk_tokens": 0.3}
RANDOM, DRAWN = FLORA | {"method": "random"}, FLORA | {"policy": "pps"}


@pytest.mark.parametrize(
    ("used", "kept_bytes", "plan"), [(9, 8.0, "keep"), (5, 8.1, "again"), (5.1, 8.1, "now"), (0, 8.1, "again")]
)
def test_what_fits_is_kept_and_half_of_all_are_worth_a_gradient_at_once(used, kept_bytes, plan):
    assert cheapest(used, 10, kept_bytes, room=8.0) == plan


@pytest.mark.parametrize("words", [5, 2**19 + 3])  # of the larger vocabulary one row at a time
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_of_a_few_rows_at_a_time_are_torchs(words, smoothing):
    torch.manual_seed(0)
    logits, targets = 3 * torch.randn(5, words), torch.randint(0, words, (5,))
    losses, maxima = likelihoods(logits, targets, smoothing, grouped=True)
    expected = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(maxima, group_maxima(logits)) and torch.equal(likelihoods(logits, targets, smoothing)[0], losses)


def test_a_word_that_cannot_be_costs_nothing_and_one_alone_is_certain():
    logits = torch.tensor([[1.0, -torch.inf, 1.0], [-torch.inf, 300.0, -torch.inf], [0.0, torch.inf, 0.0]])
    losses = likelihoods(logits, torch.tensor([0, 1, 1]))[0]
    torch.testing.assert_close(losses[:2], torch.tensor([2.0, 1.0]).log())
    assert losses[2].isnan()  # as log_softmax tells it


@pytest.mark.parametrize(
    ("settings", "rate", "looked", "used", "plan"),
    [({}, 1.0, 0, 0, "again"), ({}, 1.0, 5295, 5295, "keep"), ({}, 1.0, 5296, 5296, "now"),
     ({}, 0.5, 5296, 5296, "again"), (FLORA, 1.0, 10**6, 5295, "keep"), (FLORA, 1.0, 10**6, 5296, "again"),
     (FLORA, 1.0, 10**6, 600_000, "now"), (FLORA, 0.5, 10**6, 600_000, "again"), (DRAWN, 1.0, 100, 9, "again"),
     (DRAWN, 1.0, 100, 60, "now"), (RANDOM, 1.0, 100, 9, "again"), (FLORA | {"score": "update"}, 1.0, 100, 9, "again")],
)  # fmt: skip
def test_twice_the_room_is_for_logits_that_are_kept(settings, rate, looked, used, plan):
    """2 MiB are 5295.8 rows of 99 words in float32."""
    tokens = build_tokens(Gating(**settings), adapted(of("llama")), "causal", loss=TokenSettings(logits_mib=1.0))
    assert tokens._plan_of(looked, used, SimpleNamespace(rate=rate)) == plan
    tokens._same = False
    assert tokens._plan_of(looked, used, SimpleNamespace(rate=rate)) == "again"


@pytest.mark.parametrize(
    ("settings", "rate", "sizes"),
    [(RANDOM, None, (0, 0, 0)), (FLORA, None, (34, 0, 0)), (DRAWN, None, (34, 0, 0)),
     (DRAWN | {"topk_tokens": 0.9}, None, (34, 34, 0)), (RANDOM, 0.9, (34, 0, 0)),
     (RANDOM | {"topk_tokens": 0.9}, 0.9, (34, 34, 0)), (RANDOM | {"topk_tokens": 0.9}, 0.3, (34, 0, 0))],
)  # fmt: skip
def test_sizes_are_what_the_head_runs_for(monkeypatch, settings, rate, sizes):
    monkeypatch.setattr(HeadLoss, "chunk", 7)
    model, labels = adapted(of("llama")), batch()["labels"]
    look = None if rate is None else SimpleNamespace(rate=rate)
    assert selection(model, mode="gather", **settings).sizes(labels, look) == sizes
    model.get_output_embeddings().weight.requires_grad_()  # then what it does once a call counts too
    assert selection(model, mode="gather", **settings).sizes(labels, look) == (sizes[0], 0, 5 if sizes[0] else 0)


def test_what_was_chosen_is_counted_reported_and_resumed():
    model, given = adapted(of("llama")), batch()
    model.get_output_embeddings().weight.requires_grad_()
    tokens, again = (selection(model, mode="gather", **FLORA) for _ in range(2))
    made = tokens.select(model, *split(given))
    assert (made.predictions, made.chosen, made.head, made.flops) == (34, 10, (10, 1), tokens.score.flops(34))
    assert (made.backpropagated, made.ran, made.made) == (None, (), "")
    assert selection(model, mode="gather", **RANDOM).select(model, *split(given)).flops == 0  # no logits to score
    assert (tokens.two_pass, tokens.makes_loss, tokens.selective) == (False, True, True)
    tokens.select(model, *split(given))
    again.load_state_dict(tokens.state_dict())
    for one in (tokens, again):
        assert one.report() == {"gating": one.settings.model_dump(), "predictions": 68, "chosen": 20}
        assert one.shares.draws == 2
    with pytest.raises(CheckpointError, match=r"no state of 'tokens \(flora\)'"):
        again.load_state_dict({})


@pytest.mark.parametrize("settings", [RANDOM, FLORA], ids=["random", "flora"])
@pytest.mark.parametrize("mode", ["gather", "fractional"])
def test_a_dry_run_leaves_nothing_behind(mode, settings):
    model, given = adapted(of("gemma")), batch()
    tokens, other = (selection(model, mode=mode, **settings) for _ in range(2))
    for one in (tokens, other):
        one.select(model, *split(given)).finish()
    with tokens.dry(*split(given)) as masks:
        made = tokens.select(model, *split(given))
        assert (made.predictions, made.chosen, made.loss_sum) == (34, 10, None)
        assert made.made == ("keep" if settings is FLORA else "")
        made.finish()
    assert [tuple(mask.shape) for mask in masks] == [(3, 1, 16, 16)] * (2 if mode == "fractional" else 0)
    assert tokens.state_dict() == other.state_dict()
    found = [chosen_of(one) for one in (tokens, other)]
    for one in (tokens, other):
        one.select(model, *split(given))
    assert torch.equal(found[0][0].where, found[1][0].where)


def out_of_memory(**_):
    raise torch.OutOfMemoryError("no room")


def wrong_shape(**_):
    raise ValueError("two\n  lines")


@pytest.mark.parametrize(
    ("forward", "error", "told"),
    [
        (out_of_memory, torch.OutOfMemoryError, "^no room"),
        (wrong_shape, LorakitError, r"^LlamaForCausalLM cannot work .* fewer states \(two lines\); .*loss 'nll'"),
        (lambda **_: None, LorakitError, "did not call its output head: .*; where no tokens are chosen, loss 'nll'"),
    ],
)
def test_a_forward_that_fails_the_trial_is_told_of(forward, error, told):
    model = adapted(of("llama"))
    tokens = selection(model, mode="gather")
    model.forward = forward
    with pytest.raises(error, match=told):
        tokens.verify(model, *split(batch()))
