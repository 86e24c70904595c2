"""Every gate by its name: rates, states, preferences, bad settings, and the warnings of a log."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
import training_runs as runs
from gate_streams import SMALL, filled

from lorakit.errors import CheckpointError, LorakitError, ParameterError
from lorakit.gates import GATES, GateWarning, HeadGradientGate, LossFloor, RandomGate, ThresholdController, build_gate
from lorakit.gates.log import GateLog
from lorakit.seams import Candidate

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
    [({"m": 1}, "m=1"), ({"m": 48}, "m=48: must be a power of two"), ({"k": 64}, "k=64"),
     ({"k": 8, "rows": 8}, "rows=8: must be above k=8"), ({"target_novelty": 0.0}, "target rate=0.0"),
     ({"target_novelty": 1.0}, "target rate=1.0"), ({"target_novelty_scaler": 0.0}, "beta=0.0"),
     ({"novelty_ema_rate": 0.0}, "ema rate=0.0"), ({"novelty_ema_rate": 1.5}, "ema rate=1.5"),
     ({"burn_in": -1}, "burn_in=-1"), ({"reorth_every": 0}, "reorth_every=0"), ({"decay": 0.0}, "decay=0.0")],
)  # fmt: skip
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
    for step in range(16):
        falling.decided(True, 1 - step / 32)
    assert falling.warnings == []
    late = GateLog(HeadGradientGate(16, 9, **SMALL | {"burn_in": 32}))
    for step in range(32):  # nothing is said before the burn-in's end
        late.decided(True, 1.0 if step < 24 else 0.1)
    assert late.warnings == []


def test_a_burn_in_longer_than_the_run_and_a_small_sketch_are_noticed():
    log = GateLog(HeadGradientGate(16, 9, m=64, k=40, burn_in=100))
    with pytest.warns(GateWarning) as seen:
        log.begin(100)
    assert [str(one.message)[:25] for one in seen] == ["burn_in=100 is as long as", "the sketch is small for t"]
    quiet = GateLog(LossFloor(ThresholdController(0.3, burn_in=10)))
    quiet.begin(100)
    quiet.begin(None)  # how long is not known
    assert quiet.warnings == []


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


def test_a_basis_that_holds_every_gradient_of_a_narrow_head_is_warned_about():
    narrow = {"d_hidden": 8, "vocab_size": 3, "m": 64, "burn_in": 0, "kind": "classify"}
    with pytest.warns(GateWarning, match=r"every gradient of this head: k=16 directions of a space of 16 \(8 x 2\)"):
        GateLog(HeadGradientGate(**narrow, k=16)).begin(100)
    quiet = GateLog(HeadGradientGate(**narrow, k=15))
    quiet.begin(100)
    quiet.begin(None)  # how long is not known
    assert quiet.warnings == []
