"""Which tokens are kept, by whom of a batch, and the gradient of mode "gather" against masked labels."""

from __future__ import annotations

import decoders
import pytest
import torch
import training_runs as runs
from decoders import adapted, assert_close, batch, chosen_of, gradients, of, split
from torch import Tensor, nn

from lorakit.errors import LorakitError, ParameterError
from lorakit.seams import AllTokens
from lorakit.settings import Gating, TokenSettings
from lorakit.tokens import build_tokens
from lorakit.tokens import choice as policies
from lorakit.tokens.selection import Chosen, TokenGate
from lorakit.training.loss import MeanLoss


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# policies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "share", "k"),
    [(0, 0.5, 0), (1, 0.01, 1), (3, 0.1, 1), (10, 0.2, 2), (10, 0.25, 3), (10, 0.24, 2), (7, 0.999, 7), (5, 1.0, 5)],
)
def test_quota_is_the_share_rounded_and_at_least_one_of_any(count, share, k):
    assert policies.quota(count, share) == k


def test_largest_are_the_k_largest_in_their_order():
    scores = torch.rand(50, generator=generator())
    found = policies.largest(scores, 7)
    assert found.tolist() == sorted(sorted(range(50), key=lambda place: -scores[place])[:7])


def test_uniform_draws_every_place_equally_often():
    drawn, count, k = generator(), 10, 3
    often = torch.zeros(count)
    for _ in range(3000):
        found = policies.uniform(count, k, drawn)
        assert len(found) == k and (found.diff() > 0).all()
        often[found] += 1
    p = k / count
    assert ((often / 3000 - p).abs() < 4 * (p * (1 - p) / 3000) ** 0.5).all()


def sizes(count: int = 12) -> Tensor:
    """From nearly nothing to one that is certain to be drawn."""
    return torch.rand(count, generator=generator()).pow(4) * torch.tensor([1.0] * (count - 1) + [50.0])


@pytest.mark.parametrize("k", [1, 2, 5, 11, 12])
def test_inclusion_probabilities_add_up_to_k_and_are_proportional_below_one(k):
    given = sizes().double()
    found = policies.inclusion_probabilities(given.float(), k)
    assert found.sum().item() == pytest.approx(k, abs=1e-9)
    assert (found > 0).all() and (found <= 1).all()
    below = found < 1
    ratio = found[below] / (given + policies.FLOOR * given.mean())[below]
    assert below.sum() <= 1 or torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-6)
    assert not below.any() or below.all() or given[~below].min() >= given[below].max()


def test_equal_and_zero_sizes_are_equally_probable():
    for given in (torch.zeros(8), torch.full((8,), 3.0)):
        assert torch.allclose(policies.inclusion_probabilities(given, 2), torch.full((8,), 0.25, dtype=torch.float64))


def test_a_size_of_nothing_has_a_twentieth_of_the_mean():
    found = policies.inclusion_probabilities(torch.tensor([0.0, 2.0]), 1)
    torch.testing.assert_close(found, torch.tensor([0.05, 2.05], dtype=torch.float64) / 2.1)


def test_picks_by_hand():
    scores, groups = torch.tensor([0.1, 0.5, 0.3, 0.9, 0.2]), [2, 0, 3]
    shares = policies.Shares(Gating(method="flora", topk_tokens=0.5, per="sequence"), "causal")
    index, weights = shares.pick(scores, groups, generator())
    assert index.tolist() == [1, 2, 3] and weights is None
    drawn = policies.Shares(Gating(method="flora", topk_tokens=0.9999, policy="pps"), "causal")
    index, weights = drawn.pick(scores, [5], generator())
    assert index.tolist() == [0, 1, 2, 3, 4] and weights.tolist() == [1] * 5 and weights.dtype == torch.float32
    for one in (shares, drawn):
        index, weights = one.pick(scores[:0], [0], generator())
        assert (index.tolist(), index.dtype, weights) == ([], torch.long, None)


@pytest.mark.parametrize("k", [1, 4, 9])
def test_systematic_sampling_draws_exactly_k_as_often_as_it_says(k):
    drawn, often, draws = generator(), torch.zeros(12, dtype=torch.float64), 2500
    expected = policies.inclusion_probabilities(sizes(), k)
    for _ in range(draws):
        found, probabilities = policies.proportional(sizes(), k, drawn)
        assert len(found) == k and (found.diff() > 0).all()
        assert torch.equal(probabilities, expected[found])
        often[found] += 1
    error = (expected * (1 - expected) / draws).sqrt()
    assert ((often / draws - expected).abs() <= 4 * error + 1e-12).all()


# whose share ----------------------------------------------------------------------------------------


def causal() -> nn.Module:
    """A small decoder with adapters that are no longer zero."""
    return adapted(of("gemma"))


def selection(model: nn.Module, kind: str = "causal", **settings) -> TokenGate:
    return decoders.selection(model, kind, **{"method": "flora", "topk_tokens": 0.3, "mode": "gather"} | settings)


def selected(tokens: TokenGate, model: nn.Module, given: dict[str, Tensor]):
    return tokens.select(model, *split(given))


@pytest.mark.parametrize("method", ["flora", "random"])
@pytest.mark.parametrize("kind", ["right", "left", "prompt", "packed"])
def test_only_predictions_are_chosen(kind, method):
    model, given = causal(), batch(kind)
    tokens = selection(model, method=method, topk_tokens=0.9)
    found = chosen_of(tokens)
    selected(tokens, model, given)
    for place, word in zip(found[0].where.tolist(), found[0].targets.tolist(), strict=True):
        row, position = divmod(place, 16)
        assert position < 15 and given["labels"][row, position + 1] == word != -100
        if kind == "packed":
            assert given["position_ids"][row, position + 1] > 0  # nothing predicts another document's beginning
        else:
            assert given["attention_mask"][row, position + 1] == given["attention_mask"][row, position] == 1
    assert found[0].predictions == (given["labels"][:, 1:] != -100).sum()
    assert len(set(found[0].where.tolist())) == len(found[0].where)


@pytest.mark.parametrize("policy", ["topk", "pps"])
def test_the_share_is_of_the_batch_or_of_each_sequence(policy):
    model, given = causal(), batch("right")  # 15, 11 and 6 predictions
    settings = {"policy": policy, "score": "loss"}
    for per, quotas in (("batch", [10]), ("sequence", [5, 3, 2])):
        tokens = selection(model, per=per, **settings)
        assert tokens.shares.quotas(tokens.shares.groups(given["labels"])) == quotas
        found = chosen_of(tokens)
        assert selected(tokens, model, given).chosen == 10 == len(found[0].where)
        rows = torch.bincount(found[0].where // 16, minlength=3).tolist()
        assert rows == quotas or per == "batch"


@pytest.mark.parametrize("per", ["batch", "sequence"])
def test_top_k_keeps_those_with_the_largest_loss(per):
    model, given = causal(), batch("right")
    tokens = selection(model, score="loss", per=per)
    found = chosen_of(tokens)
    selected(tokens, model, given)
    losses = token_losses(model, given)
    valid = torch.nn.functional.pad(given["labels"][:, 1:] != -100, (0, 1))
    ranked = losses.masked_fill(~valid, -1)
    if per == "batch":
        wanted = ranked.flatten().topk(10).indices
    else:
        wanted = torch.cat([16 * row + ranked[row].topk(k).indices for row, k in enumerate((5, 3, 2))])
    assert sorted(wanted.tolist()) == found[0].where.tolist()


def token_losses(model: nn.Module, given: dict[str, Tensor], kind: str = "causal") -> Tensor:
    """(B, T) of the model's own logits, at the place of the prediction."""
    mean = MeanLoss(kind)
    with torch.no_grad():
        mean(model(**split(given)[0]), given["labels"])
    return mean.token_losses.view(given["labels"].shape)


def test_one_prediction_is_kept_of_few_and_none_of_none():
    model, given = causal(), batch("right")
    tokens = selection(model, topk_tokens=0.001, per="sequence")
    given["labels"][1] = -100
    assert tokens.shares.quotas(tokens.shares.groups(given["labels"])) == [1, 0, 1]
    assert selected(tokens, model, given).chosen == 2
    tokens = selection(model, topk_tokens=0.001)
    assert selected(tokens, model, given).chosen == 1
    given["labels"][:] = -100
    empty = selected(tokens, model, given)
    assert (empty.chosen, empty.predictions, tokens.divisor(given["labels"])) == (0, 0, 0)
    empty.finish().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_ranks_and_batches_draw_their_own_and_a_seed_draws_again():
    model, given = causal(), batch()

    def draw(rank: int, times: int = 3) -> list[list[int]]:
        tokens = build_tokens(Gating(method="random", topk_tokens=0.3), model, "causal", seed=5, rank=rank)
        found = chosen_of(tokens)
        for _ in range(times):
            selected(tokens, model, given)
        return [chosen.where.tolist() for chosen in found]

    assert draw(0) == draw(0) != draw(1)
    assert len({tuple(where) for where in draw(0) + draw(1)}) == 6


# the gradient of mode "gather" ----------------------------------------------------------------------


def only(labels: Tensor, chosen: Chosen, kind: str) -> Tensor:
    """Labels of all that was not chosen set to -100."""
    kept = torch.full_like(labels, -100).flatten()
    kept[chosen.where + (kind == "causal")] = chosen.targets
    return kept.view_as(labels)


@pytest.mark.parametrize("method", ["flora", "random"])
@pytest.mark.parametrize("kind", ["right", "left", "prompt", "packed"])
def test_gathering_is_masking_the_labels_of_the_others(kind, method):
    model, given = causal(), batch(kind)
    tokens = selection(model, method=method)
    found, labels = chosen_of(tokens), given["labels"]
    loss = selected(tokens, model, given).finish() / tokens.divisor(labels)
    kept = only(labels, found[0], "causal")
    assert (kept != -100).sum() == tokens.divisor(labels) < (labels[:, 1:] != -100).sum()
    assert_close(gradients(model, loss), gradients(model, MeanLoss("causal")(model(**split(given)[0]), kept)), 1e-5)


@pytest.mark.parametrize("method", ["flora", "random"])
def test_gathering_in_an_encoder_is_masking_the_labels_of_the_others(method):
    model, given = adapted(runs.tiny_masked()), batch("right")
    given["labels"][:, ::3] = -100
    tokens = selection(model, "masked", method=method)
    found = chosen_of(tokens)
    loss = selected(tokens, model, given).finish() / tokens.divisor(given["labels"])
    kept = only(given["labels"], found[0], "masked")
    assert (kept != -100).sum() == tokens.divisor(given["labels"])
    assert_close(gradients(model, loss), gradients(model, MeanLoss("masked")(model(**split(given)[0]), kept)), 1e-5)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kind", ["right", "left", "packed"])
def test_gathering_everything_is_the_baseline(kind, softcap):
    model, given = causal(), batch(kind)
    model.config.final_logit_softcapping = softcap
    tokens = selection(model, topk_tokens=0.999)
    made = selected(tokens, model, given)
    assert made.chosen == made.predictions == tokens.divisor(given["labels"])
    plain = gradients(model, MeanLoss("causal")(model(**split(given)[0]), given["labels"]))
    assert_close(gradients(model, made.finish() / made.chosen), plain, 1e-5)


@pytest.mark.parametrize("per", ["batch", "sequence"])
def test_sampled_gradients_average_to_the_full_one_and_top_ks_do_not(per):
    model, given = adapted(runs.tiny_gemma(num_hidden_layers=1)), batch("right")
    given["labels"][:, ::2] = -100
    parameter = next(p for name, p in model.named_parameters() if "lora_A" in name and "q_proj" in name)
    inputs, _ = split(given)
    # a spread of losses, so that choosing by it matters
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(10)

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, parameter)[0].flatten().double()

    predictions = int((given["labels"][:, 1:] != -100).sum())
    full = gradient(MeanLoss("causal")(model(**inputs), given["labels"], predictions))

    def estimate(tokens: TokenGate) -> Tensor:
        return gradient(selected(tokens, model, given).finish() / tokens.divisor(given["labels"]))

    tokens = selection(model, policy="pps", score="gradient_norm", per=per)
    drawn = torch.stack([estimate(tokens) for _ in range(400)])
    error = drawn.std(0) / len(drawn) ** 0.5
    assert ((drawn.mean(0) - full).abs() < 4.5 * error).all()  # 128 coordinates
    assert error.norm() < 0.1 * full.norm()
    biased = estimate(selection(model, policy="topk", score="gradient_norm", per=per))
    assert (biased - full).norm() > 5 * error.norm()


# bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [({"method": "best"}, "^gating.method='best': .*'baseline', 'random' or 'flora'"),
     ({"topk_tokens": 0.0}, "^gating.topk_tokens=0.0: .*greater than 0"),
     ({"topk_tokens": -0.2}, "^gating.topk_tokens=-0.2: .*greater than 0"),
     ({"topk_tokens": 1.01}, "^gating.topk_tokens=1.01: .*less than or equal to 1"),
     ({"topk_tokens": float("nan")}, "^gating.topk_tokens=nan: "),
     ({"topk_tokens": "0.2"}, "^gating.topk_tokens='0.2': .*valid number"),
     ({"sketch_dim": 1}, "^gating.sketch_dim=1: .*greater than or equal to 2"),
     ({"topk_logits": -1}, "^gating.topk_logits=-1: .*greater than or equal to 0"),
     ({"score": "norm"}, "^gating.score='norm': .*'sketch', 'gradient_norm'"),
     ({"policy": "best"}, "^gating.policy='best': .*'topk' or 'pps'"),
     ({"per": "row"}, "^gating.per='row': .*'batch' or 'sequence'"),
     ({"mode": "skip"}, "^gating.mode='skip': .*'gather' or 'fractional'"),
     ({"fraction": 0.2}, "^gating.fraction=0.2: unknown .*; known are method, topk_tokens, score")],
)  # fmt: skip
def test_settings_out_of_range_are_refused_alike_everywhere(given, message):
    from lorakit.params import resolve

    with pytest.raises(ParameterError, match=message):
        TokenSettings(gating=given)
    with pytest.raises(ParameterError, match=message):
        resolve({"gating": given})


@pytest.mark.parametrize("method", ["flora", "random"])
@pytest.mark.parametrize("fraction", [0.2, 1.0])
def test_a_classifier_has_nothing_to_choose_among(method, fraction):
    with pytest.raises(ParameterError, match=f"^gating.method='{method}': needs a language model.*'classify'"):
        build_tokens(Gating(method=method, topk_tokens=fraction), runs.tiny_bert(), "classify")


def test_baseline_and_everything_are_the_plain_model():
    model = causal()
    for settings in (Gating(), Gating(method="flora", topk_tokens=1.0), Gating(method="random", topk_tokens=1)):
        tokens = build_tokens(settings, model, "causal")
        assert isinstance(tokens, AllTokens) and not tokens.selective
    assert isinstance(build_tokens(Gating(), runs.tiny_bert(), "classify"), AllTokens)
    exact = build_tokens(Gating(method="flora", topk_tokens=1.0), model, "causal", loss=TokenSettings())
    assert isinstance(exact, TokenGate) and not exact.selective and not exact.score.seen and exact.report() == {}


def test_a_model_whose_logits_are_not_its_heads_map_is_refused():
    model, given = causal(), batch()
    head = model.get_output_embeddings()
    tokens = selection(model)
    head.register_forward_hook(lambda _, args, out: out * 2)
    labels = given.pop("labels")
    with pytest.raises(LorakitError, match="not the head's linear map"):
        tokens.verify(model, given, labels)


def test_a_model_without_a_head_is_refused():
    from transformers import BertConfig, BertModel

    bare = BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(LorakitError, match="BertModel has no linear output head"):
        build_tokens(Gating(method="flora"), bare, "masked")
