"""The numbers behind the figures of chosen tokens are those of the definitions, and the figures draw them."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
import training_runs
from pages import assert_readable, lines
from scipy.stats import spearmanr
from synthetic_records import record
from torch import nn

import lorakit
from lorakit import models
from lorakit.errors import ParameterError
from lorakit.measure.flops import FlopCount
from lorakit.settings import Gating
from lorakit.studies import sketches, token_costs, token_text, tokens
from lorakit.tokens import build_tokens

V, SHARE = 60, 0.3


@pytest.fixture(scope="module")
def model() -> nn.Module:
    base = training_runs.tiny_gemma(hidden_size=16, intermediate_size=24, head_dim=8, vocab_size=V)
    made = lorakit.attach(base, "lora", rank=2, seed=0).eval()
    for name, parameter in made.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return made


def batch(prompt: int = 0, rows: int = 2, length: int = 10, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, V, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :prompt] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.fixture(scope="module")
def gradients(model) -> torch.Tensor:
    return tokens.token_gradients(model, batch())


@pytest.fixture(scope="module")
def toy():
    return models.load("toy-decoder", "causal")


def row(toy, padding: int = 3, text: str = "The cat\nsat.") -> dict[str, torch.Tensor]:
    ids = torch.tensor([toy.tokenizer(text)["input_ids"] + [0] * padding])
    mask = (ids != 0).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def by_hand(model, given) -> list[tuple[float, float]]:
    """‖h‖·‖e‖ and the loss of every prediction, in order."""
    seen = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        logits = model(given["input_ids"], attention_mask=given["attention_mask"]).logits
    handle.remove()
    found = []
    for b, t in itertools.product(*map(range, given["labels"].shape)):
        if t + 1 < given["labels"].shape[1] and (y := int(given["labels"][b, t + 1])) != -100:
            error = logits[b, t].softmax(0)
            loss = -float(error[y].log())
            error[y] -= 1
            found.append((float(seen[0][b, t].norm() * error.norm()), loss))
    return found


# scores


def test_scores_are_those_of_the_definition_batch_after_batch(model):
    batches = [batch(), batch(prompt=4, seed=1)]
    expected = np.array([pair for given in batches for pair in by_hand(model, given)])
    scores = tokens.token_scores(model, batches, score="gradient_norm")
    np.testing.assert_allclose(scores, expected[:, 0], rtol=1e-4)
    np.testing.assert_allclose(tokens.token_scores(model, batches, score="loss"), expected[:, 1], rtol=1e-4)
    assert len(scores) == 2 * 9 + 2 * 6


def test_sketched_scores_come_nearer_with_their_size_and_differ_by_seed(model):
    scores = tokens.sketched_scores(model, [batch()], (16, 1024), seeds=4)
    exact, sketched = scores
    assert {m: found.shape for m, found in sketched.items()} == {16: (4, 18), 1024: (4, 18)}
    near, far = (np.abs(sketched[m] / exact - 1).mean() for m in (1024, 16))
    assert near < 0.1 < far and not np.allclose(sketched[16][0], sketched[16][1])
    ranks = scores.ranks()
    of_16 = ranks.loc[ranks["m"] == 16, "Spearman"].tolist()
    assert of_16[2] == pytest.approx(spearmanr(sketched[16][2], exact).statistic)
    left, right = sketches.agreement(scores, 16, "score ‖h‖·‖e‖", "a prediction").axes
    np.testing.assert_allclose(left.collections[0].get_offsets(), np.stack([exact, sketched[16][0]], axis=1))
    means = ranks.groupby("m")["Spearman"].mean()
    np.testing.assert_allclose(right.lines[0].get_xydata(), [*means.items()])


def test_a_dropped_label_is_seen_in_what_is_chosen(model):
    topks = (1, V)
    table = tokens.label_table(model, [batch()], topks, SHARE)
    whole, dropped, _ = (values for _, values in table.items())
    assert (table.loc[V] == 1).all() and dropped[1] < whole[1]
    drawn = lines(tokens.label_overlap(table).axes[0])
    for name, values in table.items():
        np.testing.assert_allclose(drawn[name], [*values.items()])


def test_overlap_by_hand(model):
    given, k = batch(), 5  # 0.3 of 18
    hidden, logits, labels = tokens.head_outputs(model, given)
    h, z, y = hidden[:, :-1].flatten(0, 1), logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    error = z.softmax(1)
    error[torch.arange(18), y] -= 1
    best = z.argmax(1, keepdim=True)
    top = torch.zeros_like(error).scatter_(1, best, error.gather(1, best))
    chosen = [set((h.norm(dim=1) * e.norm(dim=1)).topk(k).indices.tolist()) for e in (error, top)]
    table = tokens.label_table(model, [given], (1,), SHARE)
    assert table["without the label"].tolist() == [len(chosen[0] & chosen[1]) / k]


# gradients


def test_gradients_of_all_tokens_and_of_the_chosen_are_means_of_their_own(model, gradients):
    torch.testing.assert_close(tokens.gradient(model, batch()), gradients.mean(0), rtol=1e-3, atol=1e-6)
    scores = np.array(by_hand(model, batch()))[:, 0]
    top = np.argsort(-scores)[:5].copy()
    found = tokens.gradient(model, batch(), method="flora", score="gradient_norm", topk_tokens=SHARE, mode="gather")
    torch.testing.assert_close(found, gradients[top].mean(0), rtol=1e-3, atol=1e-6)
    proxies = tokens.proxy_table(model, batch(), gradients, ("gradient_norm",))
    assert proxies["gradient_norm"] == pytest.approx(spearmanr(scores, gradients.norm(dim=1).numpy()).statistic)


def test_estimates_are_those_of_the_vectors_themselves(gradients):
    drawn = torch.rand(7, len(gradients), generator=torch.Generator().manual_seed(0)).double()
    g = gradients.double()
    found = tokens.estimate(drawn, g @ g.T)
    vectors, full = drawn @ g, g.mean(0)
    mean = vectors.mean(0)
    assert found["cosine"] == pytest.approx(float(torch.cosine_similarity(mean, full, dim=0)))
    assert found["length"] == pytest.approx(float(mean.norm() / full.norm()))
    assert found["bias"] == pytest.approx(float((mean - full).norm() / full.norm()))
    spread = float((vectors - mean).square().sum(1).mean().sqrt() / full.norm())
    assert (found["spread"], found["error"]) == pytest.approx((spread, spread / 7**0.5))


def test_top_k_is_biased_and_sampling_is_not(model, gradients):
    scores = tokens.token_scores(model, [batch()], score="gradient_norm")
    table = tokens.policy_table(gradients, scores, (SHARE, 1.0), 2000, 0)
    some = table[table["share"] == SHARE].set_index("policy")
    top = gradients[np.argsort(-scores)[:5].copy()].mean(0)
    off = float((top - gradients.mean(0)).norm() / gradients.mean(0).norm())
    assert some["bias"]["top-k"] == pytest.approx(off, rel=1e-3) and some["spread"]["top-k"] < 1e-6
    for name in ("random", "PPS"):
        assert some["bias"][name] < 3 * some["error"][name] < 0.5 * off
    every = table[table["share"] == 1]
    for columns, value in ((["cosine", "length"], 1), (["bias", "spread"], 0)):
        assert every[columns].to_numpy() == pytest.approx(np.full((3, 2), value), abs=1e-6)
    left, right = tokens.policy_errors(table).axes
    pps = table[table["policy"] == "PPS"]
    np.testing.assert_allclose(lines(left)["PPS"], pps[["share", "cosine"]])
    assert lines(right)["top-k"][0, 1] == pytest.approx(off, rel=1e-3)


def test_wrong_labels_are_what_top_k_takes_first(toy):
    sure = row(toy, padding=0, text="Ada and Ruth found a shell in the tower. Ada kept the white shell.")
    with torch.no_grad():
        guess = toy.model(sure["input_ids"]).logits[:, :-1].argmax(-1)
    sure["labels"][:, 1:] = guess  # the model's own words: little to learn, but from what is put wrong
    found = tokens.noise_table(toy.model, sure, noise=0.1, share=0.1, draws=50, seed=0)
    k = round(0.1 * guess.numel())
    assert found["all labels"] == pytest.approx(k / guess.numel())
    assert found["top-k"] > found["PPS"] > 2 * found["all labels"]
    assert bool((sure["labels"][:, 1:] == guess).all())  # the batch is left alone


def test_truncation_is_none_where_all_are_chosen_and_seen(model):
    fractions = (0.2, 1.0)
    told, masked = (tokens.truncation_table(model, [batch(prompt=p)], fractions) for p in (0, 5))
    assert told.loc[1.0].tolist() == pytest.approx([1, 1, 1], abs=1e-4)
    same, gather, fractional = masked.loc[1.0]
    assert gather == pytest.approx(1, abs=1e-4)
    assert same < 0.999 and same == pytest.approx(fractional, abs=1e-4)
    keys = {"method": "flora", "topk_tokens": 0.2}
    pair = [tokens.gradient(model, batch(), mode=mode, **keys) for mode in ("gather", "fractional")]
    assert told["same"][0.2] == pytest.approx(float(torch.cosine_similarity(*pair, dim=0)), abs=1e-4)
    assert told["same"][0.2] < 1
    figure = tokens.truncation({"told": told, "masked": masked})
    drawn = lines(figure.axes[1])["fractional with all tokens"]
    np.testing.assert_allclose(drawn, [*masked["fractional"].items()])
    low, high = figure.axes[1].get_ylim()
    assert low < min(drawn[:, 1]) and max(drawn[:, 1]) < high


# one text


def test_a_text_is_coloured_at_the_token_that_is_predicted(toy):
    given = row(toy)
    given["labels"][0, :3] = -100
    pieces = token_text.text_table(toy.model, toy.tokenizer, given, SHARE)
    words = "".join(piece.text for piece in pieces)
    assert words.endswith("The·cat↵sat.") and len(pieces) == int(given["attention_mask"].sum())
    scores = [piece.score for piece in pieces]
    assert scores[:3] == [None] * 3
    np.testing.assert_allclose(scores[3:], [score for score, _ in by_hand(toy.model, given)], rtol=1e-3)
    k = round(SHARE * (len(pieces) - 3))
    assert [p.chosen for p in pieces] == [score is not None and score >= sorted(scores[3:])[-k] for score in scores]
    drawn = token_text.text({"top-k": pieces})
    assert "".join(text.get_text() for text in drawn.axes[0].texts) == words
    framed = [patch for patch in drawn.axes[0].patches if patch.get_edgecolor()[3] > 0]
    assert len(framed) == k


def test_a_long_text_is_wrapped(toy):
    pieces = [token_text.Piece("x", 1.0, False)] * 150
    (ax,) = token_text.text({"long": pieces}).axes
    assert sorted({text.get_position()[1] for text in ax.texts}) == [0, 1, 2]
    assert max(text.get_position()[0] for text in ax.texts) < token_text.LINE


def test_share_of_the_chosen(model):
    pairs = np.array(by_hand(model, batch()))
    top = np.argsort(-pairs[:, 0])[:5]
    found = token_text.share_of_chosen(model, [batch()], SHARE)
    assert list(found.values()) == pytest.approx((pairs[top].sum(0) / pairs.sum(0)).tolist(), rel=1e-4)


# costs


def test_step_flops_are_those_of_a_real_step(model):
    given = batch()
    with FlopCount() as count:
        model(**given).loss.backward()
    assert token_costs.step_flops(model, given) == count.total
    for mode, rows in (("gather", 2), ("fractional", 1)):  # one row: it has as many chosen tokens whichever they are
        tokens = build_tokens(Gating(method="random", mode=mode, topk_tokens=SHARE), model, "causal")
        given = batch(rows=rows)
        inputs = dict(given)
        labels = inputs.pop("labels")
        with FlopCount() as count:
            tokens.select(model, inputs, labels).finish().backward()
        assert token_costs.step_flops(model, given, tokens) == count.total
    scored = build_tokens(Gating(method="flora", topk_tokens=SHARE), model, "causal")
    assert token_costs.step_flops(model, batch(), scored) > scored.score.flops(18) > 0
    model.zero_grad()


def test_the_ledger_is_over_the_exact_loss_of_all_and_fractional_saves():
    model, given = lorakit.attach(models.load("toy-decoder", "causal").model, "lora", rank=2), batch(rows=4, length=64)
    ledger = token_costs.ledger_table(model, given, (0.1, 1.0))
    keys = [[mode, fraction] for mode in ("gather", "fractional") for fraction in (0.1, 1)]
    assert ledger[["mode", "fraction"]].to_numpy().tolist() == keys
    chosen = token_costs.build_tokens(token_costs.Gating(method="flora", topk_tokens=0.1), model, "causal")
    exact = token_costs.build_tokens(token_costs.Gating(), model, "causal", loss=token_costs.TokenSettings())
    whole, gather = (token_costs.step_flops(model, given, t) for t in (exact, chosen))
    assert ledger["FLOPs"][0] == pytest.approx(gather / whole)
    part, whole = ledger.loc[2], ledger.loc[3]
    assert part["FLOPs"] < 0.8 < 1 < whole["FLOPs"] and part["peak"] < whole["peak"]
    assert part["activations and logits"] < 0.6
    figure = token_costs.ledger({"a": ledger, "b": ledger})
    drawn = lines(figure.axes[0])["fractional"]
    np.testing.assert_allclose(drawn, [(0.1, part["FLOPs"]), (1.0, whole["FLOPs"])])
    assert figure.axes[0].get_ylim()[1] > whole["FLOPs"]


def test_the_picture_of_the_modes_counts_as_they_do():
    table = token_costs.mode_table(6, (1, 4), layers=3)
    plain, gather, first, second = table.values()
    assert (plain == 2).all() and (first[:3] == 1).all() and plain.shape == (4, 6)
    assert (gather[:3] == 2).all() and gather[3].tolist() == first[3].tolist() == [1, 2, 1, 1, 2, 1]
    assert (second[:3] == [0, 2, 0, 0, 2, 0]).all() and (second[3] == 0).all()
    figure = token_costs.modes(6, (1, 4), 3)
    for ax, done in zip(figure.axes, table.values(), strict=True):
        assert ax.collections[0].get_array().reshape(4, 6).tolist() == done.tolist()


# records


def test_where_a_loss_is_first_reached():
    run = record(floor=0.4)
    losses = [point.validation["loss"] for point in run.curve]
    target = (losses[1] + losses[2]) / 2
    assert token_costs.first_at(run, "seconds", target) == pytest.approx(1.5)
    assert token_costs.first_at(run, "accepted_steps", losses[3]) == pytest.approx(30)
    assert token_costs.first_at(run, "seconds", losses[0] + 1) == 0
    assert token_costs.first_at(run, "seconds", losses[-1] - 0.01) is None
    up = run.model_copy(update={"curve": [run.curve[2], run.curve[0].model_copy(update={"seconds": 9.0})]})
    assert token_costs.first_at(up, "seconds", losses[0]) == pytest.approx(2)


def test_the_table_of_costs_and_the_verdict_say_what_the_records_do():
    runs = [record("lora"), record("flora20", floor=0.35), record("random20", floor=0.5)]
    target = token_costs.ended(runs, "lora")
    assert target == runs[0].final["validation"]["loss"] and token_costs.ended(runs, "pps20") is None
    (table,) = token_costs.cost_table(runs, target).parts
    until = table.set_index("method")[f"until {target:.3f}"]
    assert until["LoRA"] == "6" and until["random tokens (20 %)"] == "-" and int(until["FLoRA (20 %)"]) < 6
    assert "seconds" not in token_costs.cost_table(runs).parts[0]
    told = token_costs.verdict(runs)
    assert f"LoRA ended at a validation loss of {target:.3f}" in told
    assert '"FLoRA (20 %)" -0.050 (1 seed: too few seeds)' in told and '"random tokens (20 %)" +0.100' in told
    assert token_costs.verdict(runs[:1]).endswith(f"{target:.3f}.")
    assert token_costs.verdict(runs[1:]) == "On made-up, no run of LoRA has finished."
    with pytest.raises(ParameterError):
        token_costs.verdict([])
    rows = [(name, seed) for name in ("lora", "flora20") for seed in range(3)]
    runs = [record(name, seed, floor=0.4 - 0.1 * (name == "flora20")) for name, seed in rows]
    assert "-0.100 [-0.100, -0.100] (3 seeds: below)" in token_costs.verdict(runs)


def test_rows_by_mode_and_those_without_a_choice_in_both():
    gatings = {"lora": ("baseline", "gather"), "pps20": ("flora", "fractional"), "targets_only": ("random", "gather")}
    runs = [
        record(name, resolved={"gating": {"method": m, "topk_tokens": 0.2, "mode": mode}})
        for name, (m, mode) in gatings.items()
    ]
    found = {mode: [run.method for run in part] for mode, part in token_costs.by_mode(runs).items()}
    assert found == {"gather": ["lora", "targets_only"], "fractional": ["lora", "pps20"]}
    assert token_costs.by_mode([]) == {"gather": [], "fractional": []}


def test_figures_keep_to_the_page(model, gradients, toy):
    scores = tokens.token_scores(model, [batch()], score="gradient_norm")
    estimates = tokens.policy_table(gradients, scores, (0.1, 0.2, 0.4), 20, 0)
    costs = {"FLOPs": 0.6, "activations and logits": 0.3, "peak": 0.4}
    ledger = pd.DataFrame([{"mode": m, "fraction": f, **costs} for m in tokens.MODES for f in (0.1, 0.2, 0.4)])
    fractions = pd.Index((0.1, 0.2, 0.4, 0.7, 1.0), name="fraction")
    cut = pd.DataFrame({"same": 0.9, "gather": 0.8, "fractional": 0.7}, index=fractions)
    pieces = token_text.text_table(toy.model, toy.tokenizer, row(toy), SHARE)
    for drawn in (
        token_costs.modes(),
        tokens.policy_errors(estimates),
        tokens.truncation({"stories": cut, "conversations": cut}),
        token_costs.ledger({"toy": ledger, "Gemma": ledger}),
        token_text.text({"a": pieces, "b": pieces}),
    ):
        assert_readable(drawn)
