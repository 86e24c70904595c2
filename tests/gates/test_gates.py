"""Gates by themselves: rates met, scores right against autograd, decisions calibrated, states bitwise."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
import training_runs as runs
from training_runs import tiny_bert, tiny_gemma

from lorakit.errors import CheckpointError, LorakitError, ParameterError
from lorakit.gates import (
    GATES,
    GateWarning,
    HeadGradientGate,
    LossFloor,
    RandomGate,
    ThresholdController,
    build_gate,
)
from lorakit.gates.log import GateLog
from lorakit.head import HeadInput, find_head
from lorakit.seams import Candidate

SMALL = {"m": 64, "k": 8, "burn_in": 0, "reorth_every": 1, "k_topk": 0}
STREAMS = {
    "drift": lambda t, noise: 0.95 - 0.3 * t + 0.02 * (1 + t) * noise,
    "fall": lambda t, noise: 0.9 * np.exp(-20 * t) + 0.05 * noise**2,
    "jump": lambda t, noise: np.where(t > 0.5, 0.5, 0.9) + 0.02 * noise,
}


def run_controller(controller, scores, seed=0):
    """Decisions (T,) on a stream of scores."""
    generator = np.random.default_rng(seed)
    decisions = []
    for score in scores:
        accepted = bool(generator.random() < controller.probability(float(score)))
        controller.observe(float(score), accepted)
        decisions.append(accepted)
    return np.array(decisions)


def stream(kind, length, seed):
    return STREAMS[kind](np.arange(length) / length, np.random.default_rng(seed).standard_normal(length))


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


def test_the_threshold_moves_against_the_error():
    accepting, rejecting = ThresholdController(0.3), ThresholdController(0.3)
    start = accepting.threshold
    for _ in range(10):
        accepting.observe(0.5, True)
        rejecting.observe(0.5, False)
    assert rejecting.threshold < start < accepting.threshold


def test_a_stuck_score_does_not_wind_the_threshold_up():
    controller = ThresholdController(0.1, ema_rate=0.1)
    for _ in range(5000):
        controller.observe(1.0, True)  # whatever it wants, everything is accepted
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


def explicit(gate, gradient):
    """TensorSketch of a head's gradient (V, H): the CountSketch of all its entries, one by one."""
    (rows_h, sign_h), (rows_v, sign_v) = (
        part.hashed(torch.arange(part.dim)) for part in (gate.sketch.x, gate.sketch.y)
    )
    places = (rows_v[:, None] + rows_h[None, :]) % gate.m
    signed = gradient * sign_v[:, None] * sign_h[None, :]
    return torch.zeros(gate.m).index_add(0, places.flatten(), signed.flatten().float())


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
    loss = torch.nn.functional.cross_entropy(
        out.logits if kind == "classify" else out.logits[:, :-1].flatten(0, 1),
        batch["labels"] if kind == "classify" else batch["labels"][:, 1:].flatten(),
        reduction="sum",
    )
    (gradient,) = torch.autograd.grad(loss, head.module.weight)
    gate = HeadGradientGate(head.d_hidden, head.outputs, **SMALL, kind=kind, softcap=head.softcap)
    z = gate.embed(seen.take(out.logits.detach()), out.logits.detach(), batch["labels"])
    assert torch.allclose(z, explicit(gate, gradient), atol=1e-4 * gradient.norm())


def test_a_classifier_that_reads_its_last_token_is_found_out():
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(
        GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=2, num_labels=2, pad_token_id=0)
    ).eval()
    ids = torch.tensor([[5, 6, 7, 0, 0], [8, 9, 10, 11, 12]])
    head = find_head(model, "classify")
    seen = HeadInput(head)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=(ids != 0).long()).logits
        states = model.transformer(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
    assert torch.equal(seen.take(logits), states[torch.tensor([0, 1]), torch.tensor([2, 4])])


def test_models_without_a_head_are_refused():
    from transformers import BertConfig, BertModel

    bare = BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(LorakitError, match="BertModel has no linear output head"):
        find_head(bare, "causal")


def test_logits_that_are_not_the_heads_are_refused():
    model = tiny_gemma().eval()
    seen = HeadInput(find_head(model, "causal"))
    logits = model(input_ids=torch.tensor([[1, 2, 3]])).logits
    with pytest.raises(LorakitError, match="not the head's linear map"):
        seen.take(logits.detach() * 2)


# novelty -------------------------------------------------------------------------------------------


def filled(gate, count, seed=0):
    for z in torch.randn(count, gate.m, generator=torch.Generator().manual_seed(seed)):
        gate.update(z)
    return gate


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
    gate = HeadGradientGate(
        d_hidden=32,
        vocab_size=99,
        m=64,
        k=8,
        target_novelty=0.30,
        target_novelty_scaler=10.0,
        novelty_ema_rate=0.01,
        burn_in=5,
        seed=0,
        device="cpu",
        reorth_every=4,
        k_topk=16,
    )
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


# every gate ----------------------------------------------------------------------------------------


def candidates(count, seed=0, hidden=16, classes=3):
    """Random forward passes of a classifier; the loss is their cross-entropy."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        h = torch.randn(8, hidden, generator=generator)
        logits = torch.randn(8, classes, generator=generator)
        labels = torch.randint(0, classes, (8,), generator=generator)
        yield Candidate(torch.nn.functional.cross_entropy(logits, labels), logits, labels, h)


def made(name, **options):
    model = torch.nn.Module()
    model.classifier = torch.nn.Linear(16, 3)
    model.config = type("Config", (), {"num_labels": 3})()
    settings = runs.batch_gate(name, **{"rate": 0.3, "burn_in": 10, "m": 64, "k": 8, "topk": 0} | options)
    return build_gate(settings, model, "classify", seed=5)


@pytest.mark.parametrize("name", [name for name in GATES if name != "none"])
def test_every_gate_keeps_its_rate_and_resumes_bitwise(name):
    gate, stream = made(name), list(candidates(400))
    first = [gate.decide(gate.measure(candidate)) for candidate in stream[:200]]
    state = gate.state_dict()
    copied = made(name)
    copied.load_state_dict(torch.load(_saved(state), weights_only=True))
    rest = [[g.decide(g.measure(candidate)) for candidate in stream[200:]] for g in (gate, copied)]
    assert rest[0] == rest[1]
    accepted = [decision.accept for decision in first + rest[0]]
    assert all(accepted[:10])
    assert getattr(gate, "updates", 0) in (0, sum(accepted))  # the basis takes in what was accepted, nothing else
    assert abs(np.mean(accepted[10:]) - 0.3) < (0.09 if name == "random" else 0.02)  # 4 standard errors of a coin


def _saved(state):
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("name", [name for name in GATES if name != "none"])
def test_the_state_of_another_gate_is_refused(name):
    with pytest.raises(CheckpointError, match=f"no state of gate '{name}'"):
        made(name).load_state_dict({})


def decided(name, count=1500, **options):
    """Measurements (count, n), scores and decisions of a gate without burn-in effects, all sketches from one stream."""
    gate = made(name, beta=50.0, **options)
    measured = [gate.measure(candidate) for candidate in candidates(count, seed=2)]
    decisions = [gate.decide(one) for one in measured]
    kept = slice(count // 3, None)
    scores = np.array([np.nan if d.score is None else d.score for d in decisions])[kept]
    return measured[kept], scores, np.array([d.accept for d in decisions])[kept]


def test_each_gate_prefers_what_it_is_called_after():
    losses = np.array([c.loss.item() for c in candidates(1500, seed=2)])[500:]
    _, scores, accepted = decided("loss_floor")
    assert np.allclose(scores, losses) and losses[accepted].mean() > losses[~accepted].mean() + 0.1
    measured, scores, accepted = decided("gradient_norm")
    norms = np.array([m[:64].norm().item() / 8 for m in measured])
    assert np.allclose(scores, norms) and scores[accepted].min() > scores[~accepted].mean()
    _, scores, accepted = decided("novelty")
    assert scores[accepted].mean() > scores[~accepted].mean() + 0.02
    _, scores, accepted = decided("least_novel")
    assert scores[accepted].mean() < scores[~accepted].mean() - 0.02
    measured, scores, accepted = decided("novelty_loss")
    both = np.array([m[64].item() for m in measured])
    assert np.allclose(both, losses)
    assert scores[accepted].mean() > scores[~accepted].mean() + 0.01
    assert losses[accepted].mean() > losses[~accepted].mean() + 0.05


def test_random_gate_is_a_coin():
    gate = RandomGate(0.2, seed=0)
    accepted = [gate.decide(torch.zeros(0)).accept for _ in range(4000)]
    assert abs(np.mean(accepted) - 0.2) < 4 * math.sqrt(0.16 / 4000)
    assert gate.acceptance_rate() == pytest.approx(np.mean(accepted))


def test_state_stays_below_a_megabyte():
    gate = filled(HeadGradientGate(1152, 262_144, m=512, k=64, burn_in=2000), 300)
    assert gate.state_bytes() <= 1_000_000
    assert gate.report()["state_bytes"] == gate.state_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"m": 1}, "m=1"),
        ({"m": 48}, "m=48: must be a power of two"),
        ({"k": 64}, "k=64"),
        ({"k": 8, "rows": 8}, "rows=8: must be above k=8"),
        ({"target_novelty": 0.0}, "target rate=0.0"),
        ({"target_novelty": 1.0}, "target rate=1.0"),
        ({"target_novelty_scaler": 0.0}, "beta=0.0"),
        ({"novelty_ema_rate": 0.0}, "ema rate=0.0"),
        ({"novelty_ema_rate": 1.5}, "ema rate=1.5"),
        ({"burn_in": -1}, "burn_in=-1"),
        ({"reorth_every": 0}, "reorth_every=0"),
        ({"decay": 0.0}, "decay=0.0"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ParameterError, match=message):
        HeadGradientGate(16, 9, **SMALL | options)


def test_bad_batches():
    gate = HeadGradientGate(16, 9, **SMALL, kind="classify")
    labels = torch.tensor([0, 1])
    with pytest.raises(ParameterError, match="d_hidden=16"):
        gate.embed(torch.zeros(2, 15), torch.zeros(2, 9), labels)
    with pytest.raises(ParameterError, match="must be 9 wide"):
        gate.embed(torch.zeros(2, 16), torch.zeros(2, 8), labels)
    with pytest.raises(LorakitError, match="logits"):
        gate.embed(torch.ones(2, 16), torch.full((2, 9), float("nan")), labels)
    assert not gate.embed(torch.ones(2, 16), torch.zeros(2, 9), torch.tensor([-100, -100])).any()
    with pytest.raises(ParameterError, match="gate='sgd': must be one of none, random"):
        made("sgd")


# warnings ------------------------------------------------------------------------------------------


def test_a_stuck_gate_is_noticed_once():
    for accept, share in ((True, "100 %"), (False, "0 %")):
        log = GateLog(RandomGate(0.3, burn_in=5))
        with pytest.warns(GateWarning, match=f"stuck at {share}.*target rate of 0.3") as seen:
            for _ in range(500):
                log.decided(accept, None)
        assert len(seen) == len(log.warnings) == 1


def test_a_basis_that_takes_nothing_in_is_noticed():
    log = GateLog(HeadGradientGate(16, 9, **SMALL | {"burn_in": 16}))
    with pytest.warns(GateWarning, match="novelty is not falling: 1.000"):
        for _ in range(16):
            log.decided(True, 1.0)
    falling = GateLog(HeadGradientGate(16, 9, **SMALL | {"burn_in": 16}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(16):
            falling.decided(True, 1 - step / 32)


def test_a_burn_in_longer_than_the_run_and_a_small_sketch_are_noticed():
    log = GateLog(HeadGradientGate(16, 9, m=64, k=40, burn_in=100))
    with pytest.warns(GateWarning) as seen:
        log.begin(100)
    assert [str(one.message)[:25] for one in seen] == ["burn_in=100 is as long as", "the sketch is small for t"]
    quiet = GateLog(LossFloor(ThresholdController(0.3, burn_in=10)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet.begin(100)


def test_points_sum_up_what_was_decided_since_the_last():
    log = GateLog(RandomGate(0.3, burn_in=2))
    for accept, score in ((True, 1.0), (True, 0.5), (False, 0.25), (True, 0.75)):
        log.decided(accept, score)
    assert log.point(4, 3) | {"gate/acceptance_rate": 0} == {
        "gate/novelty": 0.625,
        "gate/accept": 0.75,
        "gate/acceptance_rate": 0,
        "gate/accepted_steps": 3,
        "gate/total_steps": 4,
    }
    report = log.report()
    assert report["acceptance_rate"] == 0.5 and report["decisions"] == 4 and report["log"][0]["step"] == 4


def test_a_basis_that_holds_every_gradient_of_a_narrow_head_is_warned_about():
    narrow = {"d_hidden": 8, "vocab_size": 3, "m": 64, "burn_in": 0, "kind": "classify"}
    with pytest.warns(GateWarning, match=r"every gradient of this head: k=16 directions of a space of 16 \(8 x 2\)"):
        GateLog(HeadGradientGate(**narrow, k=16)).begin(100)
    quiet = GateLog(HeadGradientGate(**narrow, k=15))
    quiet.begin(100)
    assert quiet.warnings == []
