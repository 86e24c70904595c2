"""Logits kept while scoring: those of the chosen, with the losses and gradients that running the head again gives."""

from __future__ import annotations

import contextlib
import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import training_runs as runs
from decoders import adapted, assert_close, batch, gradients, of, prepared, selection, split
from torch import Tensor, nn

from lorakit.adapters import attach
from lorakit.head import Head
from lorakit.settings import Gating, TokenSettings
from lorakit.tokens import choice as policies
from lorakit.tokens.choice import Shares
from lorakit.tokens.fractional import drops_out
from lorakit.tokens.head_loss import HeadLoss
from lorakit.tokens.kept_logits import BestLogits, with_gradient

WORDS, WIDTH = 37, 12


def filled(scores: Tensor, chunk: int, pick, kept: int) -> BestLogits:
    """Given `scores` in chunks; the logits of prediction i are i, i, …."""
    best = BestLogits(pick, len(scores), kept)
    raw = torch.arange(len(scores), dtype=torch.float)[:, None].expand(-1, 5).contiguous()
    for part, rows in zip(scores.split(chunk), raw.clone().split(chunk), strict=True):
        best.add(part, rows.clone())
    return best


def rows_of(best: BestLogits) -> Tensor:
    """(k,) which prediction's logits are kept, in the order of `places`."""
    assert (best.raw == best.raw[:, :1]).all()
    return best.raw[best.held.argsort(), 0].long()


# what is kept ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["random", "rising", "falling"])
@pytest.mark.parametrize("kept", [1, 7, 20, 49, 50])
@pytest.mark.parametrize("chunk", [1, 3, 4, 20, 50, 64])
def test_kept_are_the_largest_of_all(chunk, kept, order):
    scores = torch.randn(50, generator=torch.Generator().manual_seed(kept))
    scores = scores if order == "random" else scores.sort(descending=order == "falling").values
    best = filled(scores, chunk, functools.partial(policies.largest, k=kept), kept)
    assert torch.equal(best.places, policies.largest(scores, kept))
    assert torch.equal(rows_of(best), best.places)


@pytest.mark.parametrize("chunk", [1, 5, 9, 10, 11, 16, 45])  # 10 are kept
@pytest.mark.parametrize("first", [0, 1])
def test_each_sequence_keeps_its_own_best(first, chunk):
    labels = batch("right")["labels"].roll(first, 0)
    shares = Shares(Gating(method="flora", topk_tokens=0.3, per="sequence"), "causal")
    groups = shares.groups(labels)
    pick = functools.partial(shares.pick, groups=groups, generator=None)
    for seed in range(20):
        scores = torch.rand(sum(groups), generator=torch.Generator().manual_seed(seed))
        best = filled(scores, chunk, lambda given: pick(given)[0], sum(shares.quotas(groups)))
        assert len(set(groups)) == 3 and len(best.places) == 10 and torch.equal(best.places, pick(scores)[0])
        assert torch.equal(rows_of(best), best.places)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 9, 10, 15])
def test_equal_scores_are_not_lost_and_make_no_room_for_another_sequences(chunk, groups):
    """Whichever of the equal ones are picked, at every call others, one that was given up does not come back."""
    generator, size, k = torch.Generator().manual_seed(0), 30 // groups, 9 // groups
    scores = torch.randint(0, 2 if groups > 1 else 3, (30,), generator=generator).float()

    def pick(given: Tensor) -> Tensor:
        orders = [size * group + torch.randperm(size, generator=generator) for group in range(groups)]
        return torch.cat([order[policies.largest(given[order], k)] for order in orders]).sort().values

    for _ in range(20):
        best = filled(scores, chunk, pick, 9)
        assert torch.equal(rows_of(best), best.places) and len(set(best.places.tolist())) == 9
        assert torch.bincount(best.places // size).tolist() == [k] * groups
        for mine, all_of_them in zip(best.places.split(k), scores.split(size), strict=True):
            assert torch.equal(scores[mine].sort(descending=True).values, all_of_them.topk(k).values)


# their losses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_losses_and_gradients_are_autograds(softcap, dtype, tolerance):
    torch.manual_seed(0)
    module = nn.Linear(WIDTH, WORDS).to(dtype).requires_grad_(False)
    head = Head(module, WIDTH, WORDS, softcap)
    hidden = (2 * torch.randn(20, WIDTH)).to(dtype).requires_grad_()
    targets, scores = torch.randint(0, WORDS, (20,)), torch.rand(20)
    best = BestLogits(functools.partial(policies.largest, k=8), 20, 8)
    for part, states in zip(scores.split(6), hidden.detach().split(6), strict=True):
        best.add(part, module(states))
    assert best.held.diff().min() < 0  # the kept ones' rows are in another order than their places
    where = best.places
    total, gradient = best.take(SimpleNamespace(targets=targets[where]), HeadLoss(head, TokenSettings()))
    assert best.raw is None
    expected = F.cross_entropy(head.logits(hidden[where]), targets[where], reduction="none")
    torch.testing.assert_close(total, expected.sum(), rtol=tolerance, atol=0)
    (truth,) = torch.autograd.grad(expected.sum(), hidden)
    assert (gradient - truth[where]).norm() < tolerance * truth.norm()
    loss = with_gradient(total, hidden[where], gradient)
    assert loss == total
    assert torch.equal(torch.autograd.grad(loss, hidden)[0][where], gradient.to(dtype))


class Rows:
    """How many predictions the head was run for."""

    def __init__(self, model: nn.Module):
        self.count = 0
        model.get_output_embeddings().register_forward_hook(self._add)

    def _add(self, _: nn.Module, arguments: tuple, output: Tensor) -> None:
        self.count += output[..., 0].numel()


def taken(model: nn.Module, given: dict[str, Tensor], keeps: bool, autocast: bool = False, **settings):
    """Loss and gradients of one batch; with and without kept logits."""
    tokens = selection(model, **{"method": "flora", "topk_tokens": 0.3} | settings)
    assert tokens._same
    tokens._same = keeps
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        made = tokens.select(model, *split(given))
        loss = made.finish()
    return loss.detach(), gradients(model, loss), made


@pytest.mark.parametrize("mode", ["gather", "fractional"])
@pytest.mark.parametrize("per", ["batch", "sequence"])
@pytest.mark.parametrize("score", ["sketch", "gradient_norm", "hidden_gradient", "loss", "entropy"])
def test_gradients_are_those_of_running_the_head_again(monkeypatch, score, per, mode):
    monkeypatch.setattr(HeadLoss, "chunk", 16)  # three
    model, given = adapted(of("gemma")), batch("right")
    rows = Rows(model)
    loss, found, made = taken(model, given, True, score=score, per=per, mode=mode)
    assert rows.count == made.predictions > 2 * 16
    expected_loss, expected, _ = taken(model, given, False, score=score, per=per, mode=mode)
    assert rows.count == 2 * made.predictions + made.chosen
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("mode", ["gather", "fractional"])
def test_a_gradient_made_at_once_is_that_of_the_drawn_by_their_weights(monkeypatch, mode):
    monkeypatch.setattr(HeadLoss, "chunk", 16)
    model, given, settings = adapted(of("gemma")), batch("right"), {"policy": "pps", "topk_tokens": 0.8}
    loss, found, made = taken(model, given, True, score="loss", mode=mode, **settings)
    expected_loss, expected, again = taken(model, given, False, score="loss", mode=mode, **settings)
    assert (made.made, again.made) == ("now", "")
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("mode", ["gather", "fractional"])
def test_a_chunk_of_as_many_as_are_kept(monkeypatch, mode):
    monkeypatch.setattr(HeadLoss, "chunk", 18)
    model, given = adapted(of("llama")), batch("bare")
    tokens = selection(model, method="flora", topk_tokens=0.4, per="sequence")
    assert tokens.shares.quotas(tokens.shares.groups(given["labels"])) == [6, 6, 6]  # and 18 of all 45
    keys = {"topk_tokens": 0.4, "per": "sequence", "mode": mode}
    assert_close(*(taken(model, given, keeps, **keys)[1] for keeps in (True, False)), 1e-5)


@pytest.mark.parametrize("mode", ["gather", "fractional"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma"])
@pytest.mark.parametrize("kind", ["left", "packed"])
def test_under_autocast_too(name, mode, kind):
    options = {"final_logit_softcapping": 3.0} if name == "gemma" else {}
    model, given = adapted(of(name, **options)), batch(kind)
    for autocast, tolerance in ((False, 1e-5), (True, 3e-2)):
        loss, found, _ = taken(model, given, True, autocast, mode=mode)
        expected_loss, expected, _ = taken(model, given, False, autocast, mode=mode)
        torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=0)
        assert_close(found, expected, tolerance)


def test_a_masked_language_models_head_is_not_run_again():
    model = prepared(attach(runs.tiny_masked(), "lora", rank=4, seed=0)).eval()
    given = batch("right")
    given["labels"][:, ::2] = -100
    rows, made = Rows(model), []
    for keeps in (True, False):
        tokens = selection(model, "masked", method="flora", topk_tokens=0.3, mode="gather")
        tokens._same = keeps
        one = tokens.select(model, *split(given))
        made.append(gradients(model, one.finish()))
    assert rows.count == 2 * one.predictions + one.chosen
    assert_close(*made, 1e-5)


# where they cannot be kept --------------------------------------------------------------------------


def head_trained() -> nn.Module:
    model = adapted(of("llama"))
    model.get_output_embeddings().weight.requires_grad_()
    return model


def head_adapted() -> nn.Module:
    return prepared(attach(of("llama"), "lora", rank=4, seed=0, target_modules=["lm_head", "q_proj"]))


FLORA, DRAWS = {"method": "flora"}, [{"method": "random"}, {"method": "flora", "policy": "pps"}]
AGAIN = [(head_trained, FLORA), (head_adapted, FLORA), *((lambda: adapted(of("llama")), given) for given in DRAWS)]


@pytest.mark.parametrize("mode", ["gather", "fractional"])
@pytest.mark.parametrize(("make", "settings"), AGAIN)
def test_a_head_that_learns_runs_again_for_the_chosen_and_for_draws(make, settings, mode):
    model = make()
    rows = Rows(model)
    made = selection(model, topk_tokens=0.3, mode=mode, **settings).select(model, *split(batch("right")))
    found = gradients(model, made.finish())
    assert rows.count == made.chosen + (made.predictions if settings["method"] == "flora" else 0)
    assert settings is not FLORA or any("lm_head" in name and grad.norm() > 0 for name, grad in found.items())


def peft_model(kind: str, **options) -> nn.Module:
    import peft

    config = getattr(peft, f"{kind}Config")(r=4, target_modules=["q_proj", "v_proj"], **options)
    return prepared(peft.get_peft_model(of("llama"), config))


DROPPING = {
    "in PEFT's layers": lambda: peft_model("LoHa", rank_dropout=0.2),
    "in PEFT's LoRA": lambda: peft_model("Lora", lora_dropout=0.2),
    "in attention": lambda: adapted(of("llama", attention_dropout=0.1)),
    "in layers": lambda: adapted(of("gpt2", resid_pdrop=0.1)),
    "in the adapter": lambda: prepared(attach(of("llama"), "lora", rank=4, seed=0, dropout=0.1)),
}


@pytest.mark.parametrize("make", DROPPING.values(), ids=DROPPING.keys())
def test_where_the_second_pass_drops_out_otherwise_its_own_logits_count(make):
    model = make()
    assert drops_out(model)
    rows = Rows(model)
    tokens = selection(model, method="flora", topk_tokens=0.3)
    assert not tokens._same  # or a prediction of memory and FLOPs would be wrong
    made = tokens.select(model, *split(batch("right")))
    made.finish()
    assert rows.count == made.predictions + made.chosen
    gathered = selection(model, method="flora", topk_tokens=0.3, mode="gather")  # there is one pass only
    gathered.select(model, *split(batch("right"))).finish()
    assert rows.count == 2 * made.predictions + made.chosen


def test_noise_of_another_name_is_noticed_when_it_is_drawn():
    model, given = adapted(of("llama")), batch("right")
    rows = Rows(model)
    noisy = selection(model, method="flora", topk_tokens=0.3)
    assert not drops_out(model) and noisy._same
    layer = model.model.layers[0].mlp
    handle = layer.register_forward_hook(lambda *given: given[-1] + 0.1 * torch.randn_like(given[-1]))
    made = noisy.select(model, *split(given))
    made.finish()
    assert rows.count == made.predictions + made.chosen
    handle.remove()
    noisy.select(model, *split(given)).finish()
    assert rows.count == 2 * made.predictions + made.chosen


@pytest.mark.parametrize("mode", ["gather", "fractional"])
def test_a_batch_that_waits_for_a_gate_keeps_them(mode):
    model, given = adapted(of("llama")), batch("right")
    rows, looked = Rows(model), []
    tokens = selection(model, method="flora", topk_tokens=0.3, mode=mode)
    made = tokens.select(model, *split(given), lambda *seen: looked.append(len(seen[0])))
    assert rows.count == sum(looked) == made.predictions
    found = gradients(model, made.finish())
    assert rows.count == made.predictions
    assert_close(found, taken(model, given, True, mode=mode)[1], 1e-5)


def test_half_precision_does_not_overflow():
    words = 100_000
    head = Head(nn.Linear(4, words, bias=False).half().requires_grad_(False), 4, words, None)
    best = BestLogits(functools.partial(policies.largest, k=2), 2, 2)
    best.add(torch.ones(2), torch.zeros(2, words, dtype=torch.float16))  # s = 1 / p = 100,000
    total, gradient = best.take(SimpleNamespace(targets=torch.tensor([3, 5])), HeadLoss(head, TokenSettings()))
    assert torch.isfinite(gradient).all() and torch.allclose(total, 2 * torch.tensor(words).log())
    assert torch.allclose(gradient, head.module.weight.float().mean(0) - head.module.weight[[3, 5]].float(), atol=1e-3)


@pytest.mark.parametrize("name", ["gemma", "llama", "gpt2", "toy"])
def test_models_without_dropout_have_none(name):
    assert not drops_out(adapted(of(name)))
