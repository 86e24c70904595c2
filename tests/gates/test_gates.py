"""Gates by themselves: rates met, scores right against autograd, decisions calibrated, states bitwise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gate_streams import SMALL, STREAMS, explicit_sketch, filled, pairs, stream
from training_runs import tiny_bert, tiny_gemma

from lorakit.errors import LorakitError
from lorakit.gates import HeadGradientGate, ThresholdController
from lorakit.gates.look import GateLook
from lorakit.gates.threshold import RunningScale
from lorakit.head import Head, HeadInput, find_head
from lorakit.seams import Candidate, Gate


def run_controller(controller, scores, seed=0):
    """Decisions (T,) on a stream of scores."""
    generator = np.random.default_rng(seed)
    decisions = []
    for score in scores:
        accepted = bool(generator.random() < controller.probability(float(score)))
        controller.observe(float(score), accepted)
        decisions.append(accepted)
    return np.array(decisions)


# the controller ------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.1, 0.2, 0.3, 0.5])
@pytest.mark.parametrize("kind", list(STREAMS))
@pytest.mark.parametrize("ema_rate", [0.01, 0.05])  # the description's, and this project's
def test_rate_after_the_burn_in_is_the_target(target, kind, ema_rate):
    controller = ThresholdController(target, ema_rate=ema_rate, burn_in=50)
    decisions = run_controller(controller, stream(kind, 2050, seed=1))
    assert decisions[:50].all()
    assert abs(decisions[50:].mean() - target) < 0.02
    assert abs(controller.acceptance_rate() - target) < 0.25


def test_the_rate_leaves_the_burn_in_out_and_starts_with_the_mean():
    controller = ThresholdController(0.3, ema_rate=0.01, burn_in=40)
    decisions = run_controller(controller, stream("drift", 60, seed=2))
    assert controller.acceptance_rate() == pytest.approx(decisions[40:].mean(), abs=0.02)  # a lifetime mean is > 0.66
    assert ThresholdController(0.3, burn_in=5).acceptance_rate() == 1.0


def test_mean_and_spread_are_plain_until_the_rate_is_reached():
    scale = RunningScale(0.25)
    assert scale.standardised(5.0) == 0
    for value in (1.0, 3.0, 8.0, 4.0):
        scale.add(value)
    assert (scale.mean, scale.variance) == pytest.approx((4.0, 6.5))
    scale.add(0.0)  # of weight 1/4, not 1/5
    assert (scale.mean, scale.variance) == pytest.approx((3.0, 0.75 * (6.5 + 0.25 * 4**2)))
    assert scale.standardised(10.0) == pytest.approx(7 / 7.875**0.5)
    same = RunningScale(0.5)
    for _ in range(9):
        same.add(0.1)
    assert same.standardised(5.0) == 0  # its spread is rounding


def test_the_first_threshold_and_its_steps_by_hand():
    controller, resumed = (ThresholdController(0.3, ema_rate=0.1, burn_in=4) for _ in range(2))
    for score in (10.0, 20.0, 1.0):
        assert controller.probability(score) == controller.acceptance_rate() == 1
        controller.observe(score, True)
    resumed.load_state_dict(controller.state_dict())
    for one in (controller, resumed):
        one.observe(3.0, True)
        # of the burn-in's second half the mean is 2, the spread 1, and 3 the score above which 0.3 of it lies
        assert (one.scale.mean, one.scale.variance, one.threshold) == (2.0, 1.0, 1.0)
        assert one.acceptance_rate() == 1 and one.state_dict()["recent"] == []
        one.observe(3.0, True)
        assert (one.threshold, one.acceptance_rate()) == pytest.approx((1 + 5 * 0.1 * 0.7, 1.0))
        one.observe(1.0, False)
        assert (one.threshold, one.acceptance_rate()) == pytest.approx((1.35 - 5 * 0.1 * 0.3, 0.9 / 1.9))
        assert one.scale.mean == pytest.approx(2.0) and one.scale.variance == pytest.approx(1.0)
        assert one.probability(-1e9) == 0


def test_the_first_threshold_is_of_the_last_256_scores():
    controller, resumed = (ThresholdController(0.5, ema_rate=0.001, burn_in=300) for _ in range(2))
    for score in range(300):
        if score == 290:
            resumed.load_state_dict(controller.state_dict())
        for one in (controller, resumed) if score >= 290 else (controller,):
            one.observe(float(score), True)
    for one in (controller, resumed):  # the middle of 172, …, 299, by mean and spread of 150, …, 299
        assert one.threshold == pytest.approx((236 - 224.5) / ((150**2 - 1) / 12) ** 0.5)


def test_a_score_without_spread_is_accepted_at_the_rate_and_does_not_wind_the_threshold_up():
    for accepted, limit in ((True, 6.0), (False, -6.0)):
        controller = ThresholdController(0.1, ema_rate=0.1)
        assert controller.probability(5.0) == 0.1
        for _ in range(5000):
            controller.observe(1.0, accepted)  # whatever it wants
        assert controller.threshold == limit and controller.probability(1.0) == 0.1
        decisions = run_controller(controller, stream("drift", 300, seed=3))
        assert abs(decisions[100:].mean() - 0.1) < 0.1


def test_decisions_are_calibrated():
    controller = ThresholdController(0.4, steepness=2.0)
    for score in (-1.0, 0.0, 1.0) * 20:
        controller.observe(score, False)
    controller.threshold = 0.2
    spread = math.sqrt(controller.scale.variance)
    for score in (-0.5, 0.3, 1.0):
        exact = 1 / (1 + math.exp(-2 * ((score - controller.scale.mean) / spread - 0.2)))
        assert controller.probability(score) == pytest.approx(exact)
        draws = torch.rand(4000, generator=torch.Generator().manual_seed(0)) < controller.probability(score)
        assert abs(draws.double().mean() - exact) < 4 * math.sqrt(exact * (1 - exact) / 4000)


def test_acceptance_rises_with_the_score_at_the_default_steepness():
    scores = stream("drift", 2000, seed=4)
    level = scores - (0.95 - 0.3 * np.arange(2000) / 2000)
    accepted = run_controller(ThresholdController(0.3, ema_rate=0.05, burn_in=20), scores)[20:]
    ranks = level[20:].argsort().argsort()
    positives = accepted.sum()
    area = (ranks[accepted].sum() - positives * (positives - 1) / 2) / (positives * (len(ranks) - positives))
    assert area > 0.9


# the head gradient ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["causal", "classify", "capped"])
def test_embedding_is_the_sketch_of_autograds_head_gradient(kind):
    generator = torch.Generator().manual_seed(0)
    if kind == "classify":
        model = tiny_bert(num_labels=3).eval()
        batch = {"input_ids": torch.randint(1, 99, (4, 7), generator=generator), "labels": torch.tensor([0, 1, 2, 1])}
    else:
        model = tiny_gemma(final_logit_softcapping=2.0 if kind == "capped" else None, tie_word_embeddings=False).eval()
        ids = torch.randint(1, 99, (3, 9), generator=generator)
        batch = {"input_ids": ids, "labels": ids.clone().index_fill(1, torch.tensor([0, 1, 2]), -100)}
    kind = "classify" if kind == "classify" else "causal"
    head = find_head(model, kind)
    seen = HeadInput(head)
    out = model(**batch)
    places, words = zip(*pairs(batch["labels"], kind), strict=True)
    predicted = torch.stack([out.logits[place] for place in places])
    loss = torch.nn.functional.cross_entropy(predicted, torch.tensor(words), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, head.module.weight)
    gate = HeadGradientGate(head.d_hidden, head.outputs, **SMALL, kind=kind, softcap=head.softcap)
    z = gate.embed(seen.take(out.logits.detach()), out.logits.detach(), batch["labels"])
    assert torch.allclose(z, explicit_sketch(gate.sketch, gradient).float(), atol=1e-4 * gradient.norm())


def test_a_classifier_that_reads_its_last_token_is_found_out(build):
    model = build("gpt2_classifier")
    ids = torch.tensor([[5, 6, 7, 0, 0], [8, 9, 10, 11, 12]])
    head = find_head(model, "classify")
    seen = HeadInput(head)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=(ids != 0).long()).logits
        states = model.transformer(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
    assert torch.equal(seen.take(logits), states[torch.tensor([0, 1]), torch.tensor([2, 4])])


def test_logits_that_are_not_the_heads_are_refused():
    model = tiny_gemma().eval()
    seen = HeadInput(find_head(model, "causal"))
    logits = model(input_ids=torch.tensor([[1, 2, 3]])).logits
    with pytest.raises(LorakitError, match="not the head's linear map"):
        seen.take(logits.detach() * 2)


def test_isotropic_gradients_are_novel_by_one_minus_k_over_m():
    gate = filled(HeadGradientGate(16, 9, **SMALL), 64)
    fresh = torch.randn(2000, gate.m, generator=torch.Generator().manual_seed(1))
    values = torch.tensor([gate.novelty(z) for z in fresh])
    error = values.std() / math.sqrt(len(values))
    assert abs(values.mean() - (1 - gate.k / gate.m)) < 4 * error


def test_what_was_accepted_is_not_novel_and_scale_does_not_matter():
    gate = HeadGradientGate(16, 9, **SMALL)
    z, other = torch.randn(2, gate.m, generator=torch.Generator().manual_seed(0))
    assert gate.novelty(z) == 1.0 and gate.novelty(torch.zeros(gate.m)) == 0.0
    gate.update(1e6 * z)
    gate.update(1e-6 * other)
    assert gate.novelty(z) == pytest.approx(0, abs=1e-5) and gate.novelty(other) == pytest.approx(0, abs=1e-5)
    assert gate.novelty(3 * z + 2 * other) == pytest.approx(gate.novelty(300 * z + 200 * other), abs=1e-6)
    assert gate.novelty(1e30 * z) == pytest.approx(gate.novelty(z), abs=1e-5)  # whose square float32 does not hold


def test_leverage_discounts_weak_directions():
    plain, ridge = (HeadGradientGate(16, 9, **SMALL, leverage=leverage) for leverage in (False, True))
    strong, weak = torch.eye(plain.m)[:2]
    for gate in (plain, ridge):
        for _ in range(20):
            gate.update(strong)
        gate.update(weak)
    assert plain.novelty(weak) == pytest.approx(0, abs=1e-5)
    energies = {"strong": 20.0, "weak": 1.0}
    ridge_term = 21 / ridge.k
    for name, z in (("strong", strong), ("weak", weak)):
        assert ridge.novelty(z) == pytest.approx(ridge_term / (energies[name] + ridge_term), abs=1e-4)


def test_the_descriptions_loop_runs_verbatim():
    model = tiny_gemma()
    rate = {"target_novelty": 0.30, "target_novelty_scaler": 10.0, "novelty_ema_rate": 0.01, "burn_in": 5}
    sizes = {"m": 64, "k": 8, "seed": 0, "device": "cpu", "reorth_every": 4, "k_topk": 16}
    gate = HeadGradientGate(d_hidden=32, vocab_size=99, **rate, **sizes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accepted = []
    for step in range(20):
        ids = torch.randint(1, 99, (2, 8), generator=torch.Generator().manual_seed(step))
        outputs = model(input_ids=ids, labels=ids, output_hidden_states=True)
        z = gate.embed(outputs.hidden_states[-1].detach(), outputs.logits.detach(), ids)
        accept = gate.accept(gate.novelty(z))
        accepted.append(accept)
        if accept:
            outputs.loss.backward()
            optimizer.step()
            gate.update(z)
        optimizer.zero_grad()
        gate.step()
    assert all(accepted[:5]) and not all(accepted)
    assert gate.updates == sum(accepted)
    assert gate.acceptance_rate() == pytest.approx(np.mean(accepted[5:]), abs=0.02)
    with pytest.raises(RuntimeError, match="accept"):
        gate.step()


@pytest.mark.parametrize(("k_topk", "kept"), [(5, 5), (0, 9), (64, 9)])
def test_flops_are_the_sketches_the_projections_and_a_share_of_the_svds(k_topk, kept):
    gate = HeadGradientGate(4, 9, m=64, k=8, k_topk=k_topk)
    assert gate.report()["k_topk"] == kept
    labels = torch.tensor([[-100, 3, 5, -100, 7]])
    svd = 6 * 32 * 32 * 64 / 16  # of 2 x 16 rows, once in 16
    candidate = Candidate(torch.zeros(()), None, labels, kind="causal")
    assert gate.flops(candidate) == 3 * gate.sketch.flops(kept + 1) + 2 * 8 * 64 + svd


def test_the_basis_is_refreshed_at_powers_of_two_and_then_every_so_often():
    gate, refreshed = HeadGradientGate(16, 9, **SMALL | {"reorth_every": 6}), []
    gate.update(torch.zeros(gate.m))  # teaches nothing, and is not counted
    for z in torch.eye(gate.m)[:20]:
        before = gate.basis
        gate.update(z)
        refreshed += [gate.updates] * (gate.basis is not before)
    assert refreshed == [1, 2, 4, 6, 12, 18]


def test_the_bytes_of_a_state_by_hand():
    gate = HeadGradientGate(16, 9, m=64, k=8)
    coin = gate.generator.get_state().numel()
    controller, sketch, directions = 6 * 8, 2 * (2 * 8 + 8 * 8), 3 * 8
    assert gate.state_bytes() == controller + coin + sketch + directions + 8
    gate.update(torch.ones(64))  # a row in float64, a direction in float32, a score of the burn-in
    gate.accept(1.0)
    gate.step()
    assert gate.state_bytes() == controller + coin + sketch + directions + 8 + 64 * 8 + 64 * 4 + 8


def test_a_look_adds_up_what_is_measured_of_chunks():
    class Kept(Gate):
        target_rate = 0.2

        def __init__(self):
            self.seen = []

        def measure(self, candidate):
            self.seen.append(candidate)
            return torch.tensor([candidate.targets, candidate.loss], dtype=torch.float64)

    gate, head = Kept(), Head(torch.nn.Linear(4, 9), 4, 9, 2.0)
    hidden, logits, labels, losses = (
        torch.randn(5, 4),
        torch.randn(5, 9),
        torch.tensor([1, 2, -100, 3, 4]),
        torch.rand(5),
    )
    look = GateLook(gate, 0.5, head)
    assert look.rate == 0.2
    for chunk in zip(*(given.split(3) for given in (hidden, logits, labels, losses)), strict=True):
        look(*chunk)
    torch.testing.assert_close(look.measured(), torch.tensor([4, 0.5 * losses.double().sum()], dtype=torch.float64))
    first = gate.seen[0]
    assert first.hidden.shape == (1, 3, 4) and first.logits.shape == (1, 3, 9) and first.softcap == 2.0
    assert torch.equal(first.token_losses, losses[:3]) and len(gate.seen) == 2
    assert not look.grouped and first.maxima is None
    gate.needs_hidden = True
    assert GateLook(gate, 0.5, head).grouped
    look(hidden, logits, labels, losses, maxima := logits.amax(1, keepdim=True))
    assert gate.seen.pop().maxima is maxima
    empty = GateLook(gate, 0.5, head)
    assert empty.measured().tolist() == [0, 0]
    assert gate.seen[-1].hidden.shape == (1, 0, 4) and gate.seen[-1].logits.shape == (1, 0, 9)
