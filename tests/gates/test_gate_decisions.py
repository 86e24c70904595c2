"""Every gate by its name: rates, states, preferences, bad settings, and the warnings of a log."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
import torch
import training_runs as runs
from gate_streams import SMALL, filled

from lorakit.errors import CheckpointError, LorakitError, ParameterError
from lorakit.gates import GATES, GateWarning, HeadGradientGate, LossFloor, RandomGate, ThresholdController, build_gate
from lorakit.gates.log import GateLog
from lorakit.gates.variants import GradientNorm, NoveltyAndLoss
from lorakit.seams import Candidate
from lorakit.sketches import TensorSketch

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


@pytest.mark.parametrize("name", [name for name, gate in GATES.items() if name != "none" and not gate.of_examples])
def test_every_gate_keeps_its_rate_and_resumes_bitwise(name):
    gate, stream = made(name), list(candidates(400))
    first = [gate.decide(gate.measure(candidate)) for candidate in stream[:200]]
    copied, file = made(name), io.BytesIO()
    torch.save(gate.state_dict(), file)
    file.seek(0)
    copied.load_state_dict(torch.load(file, weights_only=True))
    rest = [[g.decide(g.measure(candidate)) for candidate in stream[200:]] for g in (gate, copied)]
    assert rest[0] == rest[1]
    accepted = [decision.accept for decision in first + rest[0]]
    assert all(accepted[:10])
    assert getattr(gate, "updates", 0) in (0, sum(accepted))  # the basis takes in what was accepted, nothing else
    assert abs(np.mean(accepted[10:]) - 0.3) < (0.09 if name == "random" else 0.02)  # 4 standard errors of a coin


@pytest.mark.parametrize("name", [name for name, gate in GATES.items() if name != "none" and not gate.of_examples])
def test_the_state_of_another_gate_is_refused(name):
    with pytest.raises(CheckpointError, match=f"no state of '{name}'"):
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


@pytest.mark.parametrize(("labels", "score"), [(0, 5.0), (1, 5.0), (2, 2.5)])
def test_the_gradient_norm_is_per_label(labels, score):
    measured = torch.zeros(65, dtype=torch.float64)
    measured[0], measured[1], measured[64] = 3, 4, labels
    assert GradientNorm(16, 9, **SMALL).score(measured) == score


@pytest.mark.parametrize(("novelty", "loss", "lower"), [(0.9, 2.5, 0.5), (0.5, 5.0, -1.0)])
def test_the_lower_of_novelty_and_loss_counts_in_spreads_of_those_before(novelty, loss, lower):
    gate, measured = NoveltyAndLoss(16, 9, **SMALL), torch.zeros(65, dtype=torch.float64)
    for values, wanted in (((0.5, 1.0), 0), ((0.7, 3.0), 0), ((novelty, loss), lower)):  # means 0.6, 2; spreads 0.1, 1
        measured[64] = values[1]
        assert gate.preference(values[0], measured) == pytest.approx(wanted)


def test_a_batch_may_be_of_another_kind_than_the_gates():
    causal, masked = (HeadGradientGate(16, 9, **SMALL, kind=kind) for kind in ("causal", "masked"))
    given = torch.randn(2, 3, 16), torch.randn(2, 3, 9), torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert torch.equal(causal.embed(*given, kind="masked"), masked.embed(*given))
    assert not torch.equal(causal.embed(*given), masked.embed(*given))


def test_random_gate_is_a_coin():
    gate = RandomGate(0.2, burn_in=10, seed=4)
    assert all(gate.decide(torch.zeros(0)).accept for _ in range(10)) and gate.acceptance_rate() == 1
    accepted = [gate.decide(torch.zeros(0)).accept for _ in range(4000)]
    coin = torch.rand(4000, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    assert accepted == (coin < 0.2).tolist() and gate.acceptance_rate() == np.mean(accepted)


def test_a_gate_is_made_of_its_settings():
    options = {"rate": 0.4, "burn_in": 3, "beta": 7.0, "ema": 0.2}
    sketched = {"m": 32, "k": 4, "rows": 9, "topk": 2, "refresh": 6, "decay": 0.9, "leverage": True}
    for name in ("loss_floor", "novelty"):
        gate = made(name, **options | sketched)
        kept = gate.controller
        assert [kept.target_rate, kept.burn_in, kept.steepness, kept.ema_rate] == [*options.values()]
        assert (gate.target_rate, gate.burn_in, gate.generator.initial_seed()) == (0.4, 3, 5)
    found = [gate.m, gate.k, gate.directions.rows, gate.k_topk, gate.reorth_every, gate.directions.decay, gate.leverage]
    assert found == [*sketched.values()] and (gate.d_hidden, gate.vocab_size, gate.kind) == (16, 3, "classify")
    sketch = TensorSketch(16, 3, 32, generator=torch.Generator().manual_seed(5))
    assert torch.equal(gate.sketch.x.buckets, sketch.x.buckets)
    assert made("novelty").directions.rows == 16  # twice the rank
    coin = made("random", **options)
    assert (coin.target_rate, coin.burn_in, coin.generator.initial_seed()) == (0.4, 3, 5)


def test_state_stays_below_a_megabyte():
    gate = filled(HeadGradientGate(1152, 262_144, m=512, k=64, burn_in=2000), 300)
    assert gate.state_bytes() <= 1_000_000
    assert gate.report()["state_bytes"] == gate.state_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"m": 1}, "m=1"), ({"m": 48}, "m=48: must be a power of two"), ({"k": 64}, "k=64"),
     ({"k": 0}, "k=0"), ({"k_topk": -1}, "k_topk=-1"), ({"rows": 65}, "rows=65: must be above k=8 and at most m=64"),
     ({"k": 8, "rows": 8}, "rows=8: must be above k=8"), ({"target_novelty": 0.0}, "target rate=0.0"),
     ({"target_novelty": 1.0}, "target rate=1.0"), ({"target_novelty_scaler": 0.0}, "beta=0.0"),
     ({"novelty_ema_rate": 0.0}, "ema rate=0.0"), ({"novelty_ema_rate": 1.5}, "ema rate=1.5"),
     ({"burn_in": -1}, "burn_in=-1"), ({"reorth_every": 0}, "reorth_every=0"), ({"decay": 0.0}, "decay=0.0")],
)  # fmt: skip
def test_bad_settings(options, message):
    with pytest.raises(ParameterError, match=message):
        HeadGradientGate(16, 9, **SMALL | options)
    assert HeadGradientGate(16, 9, m=2, k=1).directions.rows == 2  # the smallest


@pytest.mark.parametrize(("rate", "burn_in"), [(0.0, 0), (1.0, 0), (0.3, -1)])
def test_bad_settings_of_a_coin(rate, burn_in):
    with pytest.raises(ParameterError, match="^burn_in=-1" if burn_in else f"^target rate={rate}"):
        RandomGate(rate, burn_in=burn_in)


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
    with pytest.raises(ParameterError, match="^z=nan"):
        gate.novelty(torch.full((64,), float("nan")))
    with pytest.raises(ParameterError, match="gate='sgd': must be one of none, random"):
        made("sgd")


# warnings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("accept", "share", "row"), [(True, "100 %", 64), (False, "0 %", 83)])  # 50 + 10 / 0.7, 0.3
def test_a_stuck_gate_is_noticed_once(accept, share, row):
    log = GateLog(RandomGate(0.3, burn_in=5))
    for decision in [accept] * (5 + row - 1) + [not accept] + [accept] * (row - 1):
        log.decided(decision, None)
    assert log.warnings == []
    with pytest.warns(GateWarning, match=f"stuck at {share}: {row} batches in a row.*target rate of 0.3") as seen:
        for _ in range(500):
            log.decided(accept, None)
    assert len(seen) == len(log.warnings) == 1


@pytest.mark.parametrize(
    ("k", "burn_in", "scores", "told"),
    [(8, 8, [1.0], "1.000"), (8, 7, [1.0], ""),  # too few to say
     (8, 8, [0.97, 0.981], "0.981"), (8, 8, [0.979], ""),
     (4, 16, [0.983], ""), (4, 16, [0.985], "0.985"),  # unrelated gradients are novel by 1 − 4/64
     (8, 32, [0.1] * 24 + [0.92, 1.0], "0.990"), (8, 32, [1.0] * 24 + [0.1], "")],  # the last quarter
)  # fmt: skip
def test_a_basis_that_takes_nothing_in_is_noticed(k, burn_in, scores, told):
    log = GateLog(HeadGradientGate(16, 9, **SMALL | {"burn_in": burn_in, "k": k}))
    scores = [*scores, *scores[-1:] * (burn_in - len(scores))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for score in scores:
            assert log.warnings == []  # nothing is said before the burn-in's end
            log.decided(True, score)
    assert [text[:35] for text in log.warnings] == ([f"novelty is not falling: {told} after"] if told else [])


def test_a_burn_in_longer_than_the_run_and_a_small_sketch_are_noticed():
    log = GateLog(HeadGradientGate(16, 9, m=64, k=33, burn_in=100))
    with pytest.warns(GateWarning) as seen:
        log.begin(100)
    burn_in, small = (str(one.message) for one in seen)
    assert burn_in.startswith("burn_in=100 is as long as the run (100 steps)")
    assert "k=33 directions takes up 52% of a sketch of m=64" in small and small.endswith("at least 66")
    for gate in (HeadGradientGate(16, 9, m=64, k=32, burn_in=99), LossFloor(ThresholdController(0.3, burn_in=10))):
        quiet = GateLog(gate)
        quiet.begin(100)
        quiet.begin(None)  # how long is not known
        assert quiet.warnings == []


@pytest.mark.parametrize("named", [{}, {"m": 0.9}, {"m": None, "k": 3}, {"k": 8}])
def test_a_gate_of_ones_own_may_score_now_and_then_and_name_its_numbers_as_it_likes(named):
    class Own(RandomGate):
        scores_novelty = False

    gate = Own(0.5, burn_in=16)
    vars(gate).update(named)
    log = GateLog(gate)
    log.begin(100)
    for number in range(20):
        log.decided(True, 0.5 if number % 2 else None)
    assert log.warnings == []
    novel = GateLog(HeadGradientGate(16, 9, **SMALL | {"burn_in": 16, "k": 8}))
    with pytest.warns(GateWarning, match="novelty is not falling: 1.000"):
        for number in range(16):
            novel.decided(True, 1.0 if number % 2 else None)


def test_points_sum_up_what_was_decided_since_the_last():
    log = GateLog(RandomGate(0.3, burn_in=2))
    for accept, score in ((True, 1.0), (True, 0.5), (False, 0.25), (True, 0.75)):
        log.decided(accept, score)
    point = log.point(4, 3)
    assert 0 <= point.pop("gate/acceptance_rate") <= 1
    counted = {"gate/accepted_steps": 3, "gate/total_steps": 4}
    assert point == {"gate/novelty": 0.625, "gate/accept": 0.75} | counted
    report = log.report()
    assert report["acceptance_rate"] == 0.5 and report["decisions"] == 4 and report["log"][0]["step"] == 4
    resumed = GateLog(log.gate)
    resumed.load_state_dict(log.state_dict())
    assert resumed.report() == report and resumed.decisions == log.decisions


def test_a_basis_that_holds_every_gradient_of_a_narrow_head_is_warned_about():
    narrow = {"d_hidden": 8, "vocab_size": 3, "m": 64, "burn_in": 0, "kind": "classify"}
    with pytest.warns(GateWarning, match=r"every gradient of this head: k=16 directions of a space of 16 \(8 x 2\)"):
        GateLog(HeadGradientGate(**narrow, k=16)).begin(100)
    quiet = GateLog(HeadGradientGate(**narrow, k=15))
    quiet.begin(100)
    quiet.begin(None)  # how long is not known
    assert quiet.warnings == []
