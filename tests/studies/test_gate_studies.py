"""What the notebooks on gates say: probes are what dense computations give, tables what the records hold."""

from __future__ import annotations

import pandas as pd
import pytest
import synthetic_records as synthetic
import torch
import training_runs as runs

import lorakit
from lorakit.adapters import attach
from lorakit.errors import ParameterError
from lorakit.gates import ThresholdController, build_gate
from lorakit.studies import gates

PLAIN = {"batch_size": 4, "max_length": 16, "budget": 4}
TINY = PLAIN | {"gate_burn_in": 2, "gate_m": 64, "gate_k": 4}


# probes --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    adapted = attach(runs.tiny_bert(), "lora", rank=4, seed=0).eval()
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted


def batches(count):
    rows = list(runs.rows(4 * count))
    return [runs.collate(rows[4 * i : 4 * i + 4]) for i in range(count)]


def gate(model, k=8):
    return build_gate(runs.batch_gate("novelty", m=64, k=k, topk=0, refresh=1), model, "classify", seed=0)


def gradient(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return torch.cat([p.grad.flatten() for name, p in model.named_parameters() if "lora_" in name]).double()


def test_true_novelty_is_what_least_squares_leaves_of_the_gradient(model):
    given = batches(10)
    found = gates.novelty_table(model, given, gate(model), remembered=6)
    assert all(p.grad is None for p in model.parameters())
    remembered = torch.stack([gradient(model, batch) for batch in given[:6]], dim=1)
    for batch, novelty in zip(given[6:], found["truth"], strict=True):
        unit = torch.nn.functional.normalize(gradient(model, batch), dim=0)
        left = unit - remembered @ torch.linalg.lstsq(remembered, unit[:, None]).solution[:, 0]
        assert novelty == pytest.approx(float(left.square().sum()), abs=1e-4)


def test_the_proxy_is_the_gates_own_novelty(model):
    given = batches(10)
    found = gates.novelty_table(model, [*given[:6], given[2], given[9]], gate(model), remembered=6)
    assert found.loc[0].tolist() == pytest.approx([0, 0], abs=1e-4)
    own, seen = gate(model), []
    hook = model.classifier.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    for batch in (*given[:6], given[9]):
        logits = model(**batch).logits.detach()
        z = own.embed(seen.pop(), logits, batch["labels"])
        if batch is given[9]:
            assert own.novelty(z) == pytest.approx(found["proxy"][1], abs=1e-5)
        own.update(z)
    hook.remove()


def test_probes_refuse_what_leaves_nothing_to_measure(model):
    given, used = batches(3), gate(model)
    for remembered in (0, 3):
        with pytest.raises(ParameterError, match="remembered"):
            gates.novelty_table(model, given, used, remembered)
    used.update(torch.ones(64))
    with pytest.raises(ParameterError, match="must not have learned"):
        gates.novelty_table(model, given, used, 1)


def test_agreement_draws_a_point_per_batch():
    found = pd.DataFrame({"proxy": [0.1, 0.2, 0.4], "truth": [0.3, 0.5, 0.9]})
    (ax,) = gates.agreement({"made up": found}).axes
    assert ax.get_title(loc="left") == "made up: Spearman 1.00"
    assert ax.collections[0].get_offsets().tolist() == found[["truth", "proxy"]].to_numpy().tolist()


def test_only_accepted_batches_move_weights_and_moments():
    given = lorakit.params_of("toy", "random") | gates.QUICK | TINY
    steps = gates.watched(given)
    assert sum(step.accepted for step in steps) == 4 < len(steps)
    assert all(step.accepted == step.weights_moved == step.moments_moved for step in steps)


def test_thresholded_meets_the_target():
    scores = torch.randn(2000, generator=torch.Generator().manual_seed(0)).tolist()
    kept = gates.thresholded(ThresholdController(0.2, ema_rate=0.05, burn_in=10), scores, seed=0)
    assert all(kept[:10]) and sum(kept[10:]) / 1990 == pytest.approx(0.2, abs=0.01)
    assert kept == gates.thresholded(ThresholdController(0.2, ema_rate=0.05, burn_in=10), scores, seed=0)


# studies -------------------------------------------------------------------------------------------


def test_ablate_runs_every_variant_with_every_seed_from_the_same_start():
    ready = gates.trained(lorakit.params_of("toy", "lora") | gates.QUICK | PLAIN | {"budget": 1})
    sizes = [len(batch["labels"]) for batch in gates.batches(ready.task, 7, 3, seed=0)]
    assert sizes == [7, 7, 7] and not ready.model.training
    base = lorakit.params_of("toy", "lora") | TINY
    records = gates.ablate(base, {"random": {"gate": "random"}, "open": {}}, (1,))
    assert [(r.method, r.seed, r.resolved["gate"]) for r in records] == [("random", 1, "random"), ("open", 1, "none")]
    assert all(r.status == "done" and r.costs.accepted_steps == 4 for r in records)


def made(*methods, seeds=3):
    places = [(place, method, seed) for place, method in enumerate(methods) for seed in range(seeds)]
    return [synthetic.gated(method, s, floor=0.4 + 0.1 * n + 0.001 * s * n) for n, method, s in places]


def test_gap_table_says_the_loss_the_rate_and_the_paired_difference():
    records = [*made("random", "slora"), *made("baseline", seeds=1)]
    pairs = {"random": "", "slora": "random", "loss_floor": "random", "baseline": "random"}
    (table,) = gates.gap_table(records, pairs).parts
    first, second, third = (line for _, line in table.iterrows())
    assert (first["row"], first["accepted"], first["against"]) == ("random batches", "30 %", "-")
    assert (second["row"], second["against"], second["difference"]) == ("SLoRA", "random batches", "+0.101")
    assert (second["pairs"], second["verdict"]) == ("3", "above")
    assert (third["difference"], third["95 % interval"], third["verdict"]) == ("+0.000", "-", "too few seeds")
    assert third["pairs"].startswith("1")


def test_the_verdict_is_the_records_own():
    worse, better = made("random", "slora"), made("slora", "random")
    text = gates.verdict(worse, "slora", ("random", "baseline"))
    assert text.startswith("On made-up-gates, SLoRA, accepting 30 % of the batches, ended at a validation loss of 0.")
    assert 'which differs from "random batches" by +0.101 [' in text and "3 seeds: above" in text
    assert text.endswith('; it is not shown to be better than "random batches".')
    assert gates.verdict(better, "slora", ("random",)).endswith("(3 seeds: below).")
    assert gates.verdict(made("random"), "slora", ("random",)).endswith("no run of SLoRA has finished.")
    assert gates.verdict(made("slora"), "slora", ("random",)).endswith("ended at a validation loss of 0.425.")
    best = made("slora")
    for record in best:
        record.details["gate"] |= {"level": "example", "candidates": 4}
    assert ", accepting 30 % of the examples, ended" in gates.verdict(best, "slora", ())


def test_redundant_shares_are_of_seen_and_of_accepted():
    counts = {"redundant_seen": 80, "decisions": 100, "redundant_accepted": 15, "fresh_accepted": 15}
    records = made("random", "slora", seeds=1)
    records[1].details["gate"] |= counts
    lost = synthetic.gated("slora", 1, status="interrupted")
    lost.details["gate"] |= dict.fromkeys(counts, 0)
    records.append(lost)
    assert gates.redundant_shares(records).T.to_dict("list") == {"slora": [0.8, 0.5]}

    assert gates.recorded("no-such-setting") == []
