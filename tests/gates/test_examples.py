"""The best rows of a larger batch: which they are, that a step on them is any step, novelty against autograd's."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
import training_runs as runs
from scipy.stats import spearmanr

import lorakit
from lorakit.adapters import attach, disabled
from lorakit.errors import ParameterError
from lorakit.gates import BestRows, build_gate
from lorakit.gates.log import GateLog
from lorakit.head import HeadInput, find_head
from lorakit.measure.flops import FlopCount
from lorakit.params import Params, check
from lorakit.seams import Candidate
from lorakit.settings import Gating, TokenSettings
from lorakit.tokens import build_tokens
from lorakit.training.loss import example_statistics

GATES = ("random", "loss_floor", "gradient_norm", "novelty", "least_novel", "excess_loss")
SMALL = {"m": 64, "k": 4, "topk": 0, "refresh": 1}


def settings(name, candidates=4, **options):
    return runs.batch_gate(name, level="example", candidates=candidates, **SMALL | options)


def lora(build=runs.tiny_bert):
    return attach(build(), "lora", rank=4, seed=0)


def trained(model):
    """As after training: adapters away from zero."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def trainer(folder, name, model=None, language=False, candidates=4, **options):
    """8 rows a step of 32 candidates; one batch a step."""
    model = model or lora(runs.tiny_gemma if language else runs.tiny_bert)
    kind = "causal" if language else "classify"
    given = {"batch_size": 8 * candidates, "gradient_accumulation": 1}
    gate = build_gate(settings(name, candidates), model, kind, seed=3)
    return runs.trainer(
        model, folder, gate=gate, language=language, params=given | options.pop("params", {}), **options
    )


def statistics(model, inputs, labels):
    """As the trainer's, of a classifier."""
    logits = model(**inputs).logits
    return example_statistics(logits, labels, "classify"), logits


def watched(run):
    """The candidate batches that `run` sees, and the rows of each it steps on, as they come."""
    seen, taken, best, step = [], [], run._best_rows, run.training_step

    def chosen(batch):
        seen.append(copy.deepcopy(batch))
        return best(batch)

    def stepped(model, inputs, *more):
        taken.append(copy.deepcopy(inputs))
        return step(model, inputs, *more)

    run._best_rows, run.training_step = chosen, stepped
    return seen, taken


def places(batch, rows):
    """Which rows of `batch` the rows are, by their tokens."""
    whole = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    part = [row[mask.bool()].tolist() for row, mask in zip(rows["input_ids"], rows["attention_mask"], strict=True)]
    return [whole.index(row) for row in part]


# which rows they are --------------------------------------------------------------------------------


@pytest.mark.parametrize("language", [False, True])
@pytest.mark.parametrize("name", ["loss_floor", "excess_loss"])
def test_the_largest_losses_are_chosen_and_excess_is_over_the_base(tmp_path, name, language):
    model = trained(lora(runs.tiny_gemma if language else runs.tiny_bert))
    run = trainer(tmp_path, name, copy.deepcopy(model), language, budget=runs.Budget(1, "steps"))
    seen, taken = watched(run)
    run.train()

    def losses():
        inputs = {key: value for key, value in seen[0].items() if key != "labels"}
        with torch.no_grad():
            found = example_statistics(model(**inputs).logits, seen[0]["labels"], run.kind)
        return found[:, 0] / found[:, 1]

    score = losses()
    if name == "excess_loss":
        with disabled(model):
            base = losses()
        assert spearmanr(score, base).statistic < 0.99  # the adapter changed what the model says
        score = score - base
    assert places(seen[0], taken[0]) == sorted(score.argsort(descending=True)[:8].tolist())
    assert taken[0]["input_ids"].shape[1] == int(taken[0]["attention_mask"].sum(1).max())


@pytest.mark.parametrize("name", GATES)
def test_one_row_of_each_four_in_every_batch_whatever_the_score(tmp_path, name):
    run = trainer(tmp_path, name, budget=runs.Budget(6, "steps"))
    seen, taken = watched(run)
    run.train()
    sizes = [len(batch["labels"]) for batch in seen]
    assert sizes == [32, 32, 32, 4, 32, 32]  # 100 rows: what is left of an epoch is a batch of its own
    assert [len(batch["labels"]) for batch in taken] == [size // 4 for size in sizes]
    looked_at, trained_on = (sum(int(batch["attention_mask"].sum()) for batch in each) for each in (seen, taken))
    assert run.ledger.tokens_backpropagated == trained_on < looked_at
    told = (sum(sizes), looked_at) if name != "random" else (sum(size // 4 for size in sizes), trained_on)
    assert (run.ledger.examples, run.ledger.tokens) == told
    report = json.loads(json.dumps(run.gate_log.report()))
    assert report["acceptance_rate"] == 0.25 and report["decisions"] == sum(sizes)
    assert {"name": name, "level": "example", "candidates": 4, "target_rate": 0.25}.items() <= report.items()
    assert run.curve.points[-1].acceptance_rate == 0.25


def test_random_rows_cost_no_look(tmp_path):
    run = runs.ran(trainer(tmp_path, "random", budget=runs.Budget(3, "steps")))
    assert run.ledger.flops_gate == 0 and run.ledger.flops_forward > 0
    assert run.ledger.examples == 3 * 8 and run.ledger.tokens == run.ledger.tokens_backpropagated


@pytest.mark.parametrize("candidates", [2, 4, 10])
def test_the_rate_is_exact_over_a_drifting_stream(candidates):
    """2,000 candidate batches whose losses fall and rise: no controller has to follow them."""
    gate, generator = (
        BestRows(build_gate(runs.batch_gate("loss_floor"), None, "classify"), candidates),
        torch.Generator(),
    )
    log = GateLog(gate)
    for step in range(2000):
        rows = [Candidate(loss, None, None) for loss in torch.randn(20, generator=generator) - step / 100]
        kept = gate.choose({"input_ids": torch.arange(20)[:, None]}, rows, log, lambda v: v)["input_ids"].flatten()
        best = torch.stack([row.loss for row in rows]).topk(20 // candidates).indices
        assert kept.tolist() == sorted(best.tolist())
    assert log.report()["acceptance_rate"] == 1 / candidates


# a step on them is any step -------------------------------------------------------------------------


@pytest.mark.parametrize("language", [False, True])
def test_weights_are_bitwise_those_of_an_ungated_run_on_the_chosen_rows(tmp_path, language):
    first = lora(runs.tiny_gemma if language else runs.tiny_bert)
    asked = {"language": language, "budget": runs.Budget(4, "steps"), "params": {"gradient_accumulation": 1}}
    plain = runs.trainer(copy.deepcopy(first), tmp_path / "b", **asked)
    run = trainer(tmp_path / "a", "loss_floor", first, **asked)
    _, taken = watched(run)
    run.train()
    batches, count = iter(taken), plain.get_batch_samples
    plain.get_batch_samples = lambda _, *more: count(batches, *more)
    plain.train()
    assert len(taken) == 4 and runs.equal(runs.weights(first), runs.weights(plain.model))
    assert run.ledger.flops_backward == plain.ledger.flops_backward > 0


@pytest.mark.parametrize(("name", "dropout"), [("novelty", 0.0), ("random", 0.3), ("excess_loss", 0.3)])
def test_a_killed_run_resumes_bitwise(tmp_path, name, dropout):
    """Also where the model draws: what a batch is looked at with depends on the step, not on what was drawn before."""

    def made(folder):
        model = lora(lambda: runs.tiny_bert(hidden_dropout_prob=dropout))
        return trainer(tmp_path / folder, name, model, budget=runs.Budget(8, "steps"), save_steps=3)

    whole, resumed = runs.killed_and_resumed(made, after=5)
    assert runs.equal(runs.weights(whole.model), runs.weights(resumed.model))
    assert whole.gate_log.decisions == resumed.gate_log.decisions
    assert whole.ledger.flops == resumed.ledger.flops


@pytest.mark.parametrize("name", ["loss_floor", "excess_loss"])
def test_what_a_look_costs_follows_the_labels(tmp_path, name):
    """Every pass of a run is counted once more; those that are looked at have a length and labels of their own."""

    def cut(row, n):
        return {"labels": [-100] * (n % 5) + row["labels"][n % 5 :]}

    rows = runs.language_rows(64).map(cut, with_indices=True)
    model = lora(runs.tiny_gemma)
    exact = build_tokens(Gating(method="baseline"), model, "causal", loss=TokenSettings(loss="exact"))
    run = trainer(tmp_path, name, model, True, 2, tokens=exact, train_dataset=rows, budget=runs.Budget(6, "steps"))
    measure, counted = run.meter.measure, []

    def again(key, sizes, call):
        with FlopCount() as count:
            made, told = measure(key, sizes, call)
        counted.append((key[0], told, count.total))
        return made, told

    run.meter.measure = again
    run.train()
    looks = [(told, total) for kind, told, total in counted if kind == "candidates"]
    assert len({total for _, total in looks}) > 1 and all(told == total for told, total in looks)


def test_accumulated_batches_choose_each_and_weigh_by_their_labels(tmp_path):
    run = trainer(tmp_path, "loss_floor", language=True, budget=runs.Budget(2, "steps"),
                  params={"gradient_accumulation": 2})  # fmt: skip
    seen, taken = watched(run)
    run.train()
    assert [len(batch["labels"]) for batch in taken] == [8, 8, 8, 1]
    assert len(seen) == 4 and run.ledger.steps == 2


# novelty against autograd's gradients ---------------------------------------------------------------


def test_novelty_and_norm_of_rows_follow_their_true_head_gradients():
    """Of the head's gradient of each row by autograd: its part outside the span of earlier batches', and its norm."""
    torch.manual_seed(1)
    model = trained(lora())
    head = find_head(model, "classify")
    kept = HeadInput(head)
    gates = {
        name: build_gate(settings(name, 2, m=512, k=8), model, "classify") for name in ("novelty", "gradient_norm")
    }

    def gradients(batch):
        found = []
        for row in range(len(batch["labels"])):
            logits = model(**{key: value[row : row + 1] for key, value in batch.items() if key != "labels"}).logits
            loss = F.cross_entropy(logits, batch["labels"][row : row + 1])
            found.append(torch.autograd.grad(loss, head.module.weight)[0].flatten())
        return torch.stack(found).double()

    def seen(name, batch):
        return gates[name].rows(*gates[name].look(model, batch, statistics), batch["labels"], kept)

    data = runs.rows(80)
    earlier = [runs.collate([data[n] for n in range(8 * k, 8 * k + 8)]) for k in range(6)]
    span = torch.stack([F.normalize(gradients(batch).sum(0), dim=0) for batch in earlier])
    basis = torch.linalg.svd(span, full_matrices=False).Vh[:4]
    last = runs.collate([data[n] for n in range(48, 80)])
    true = gradients(last)
    novel = 1 - (F.normalize(true, dim=1) @ basis.T).square().sum(1)
    for name, exact in (("novelty", novel), ("gradient_norm", true.norm(dim=1))):
        gate = gates[name].gate
        gate.k = 4
        for batch in earlier if name == "novelty" else ():
            gate.learn(sum(gate.measure(row) for row in seen(name, batch)))
        rows = seen(name, last)
        found = [gate.score(gate.measure(row)) for row in rows]
        rank = spearmanr(found, exact).statistic
        print(f"{name} of rows against autograd's: rank correlation {rank:.3f}")
        assert rank > 0.9


# bad input ------------------------------------------------------------------------------------------

BAD = [
    ({"gate": "loss_floor", "gate_level": "example", "gate_candidates": 1}, "gate_candidates=1"),
    ({"gate": "loss_floor", "gate_level": "rows"}, "gate_level='rows'"),
    ({"gate_level": "example"}, "gate_level='example'.*says nothing without gate"),
    ({"gate": "loss_floor", "gate_candidates": 3}, "gate_candidates=3.*without gate_level 'example'"),
    ({"gate": "loss_floor", "gate_level": "example", "gate_rate": 0.5}, "gate_rate=0.5.*without gate_level 'batch'"),
    ({"gate": "excess_loss", "gate_level": "example", "method": "full"}, "gate='excess_loss'.*adapter"),
    ({"gate": "loss_floor", "gate_level": "example", "precision": "fp16"}, "precision='fp16'"),
]


@pytest.mark.parametrize(("given", "told"), BAD)
def test_what_does_not_go_together_is_refused_by_name(given, told):
    with pytest.raises(ParameterError, match=told):
        check(Params(**given))


def test_a_gate_that_a_level_or_a_model_does_not_have_is_refused():
    with pytest.raises(ParameterError, match="gate_level='batch'.*'excess_loss' chooses examples"):
        build_gate(runs.batch_gate("excess_loss"), lora(), "classify")
    with pytest.raises(ParameterError, match="gate_level='example'.*'novelty' scores a classifier's examples"):
        build_gate(settings("novelty"), lora(runs.tiny_gemma), "causal")


def test_averages_that_move_from_row_to_row_rank_nothing():
    with pytest.raises(ParameterError, match="gate='novelty_loss'"):
        build_gate(settings("novelty_loss"), lora(), "classify")


@pytest.mark.parametrize("candidates", [1, True, 0, -2, 2.5, "4", None])
def test_a_ratio_that_is_none_is_refused(candidates):
    with pytest.raises(ParameterError, match="candidates="):
        BestRows(build_gate(runs.batch_gate("loss_floor"), lora(), "classify"), candidates)


@pytest.mark.parametrize("name", ["novelty", "least_novel"])
def test_what_is_chosen_does_not_depend_on_the_order_of_rows(name):
    model = trained(lora())
    gate, head = build_gate(settings(name, 4, k=8), model, "classify"), HeadInput(find_head(model, "classify"))
    for z in torch.randn(6, 64, generator=torch.Generator().manual_seed(1)):
        gate.gate.update(z)
    batch = runs.collate([runs.rows()[n] for n in range(32)])

    found = []
    for order in (slice(None), torch.arange(31, -1, -1)):
        one, rows = copy.deepcopy(gate), {key: value[order] for key, value in batch.items()}
        seen = one.rows(*one.look(model, rows, statistics), rows["labels"], head)
        found.append({tuple(ids) for ids in one.choose(rows, seen, GateLog(one), lambda v: v)["input_ids"].tolist()})
        scores = [one.gate.score(one.gate.measure(row)) for row in seen]
    assert len(found[0]) == 8 and {ids[:4] for ids in found[0]} == {ids[:4] for ids in found[1]}
    assert max(scores) - min(scores) > 0.01


def test_a_diverging_run_ends_as_one(tmp_path):
    given = {"gate": "novelty", "gate_level": "example", "gate_k": 4, "learning_rate": 1e30, "budget": 20}
    assert lorakit.run(runs.QUICK | given).status == "diverged"


def test_packed_rows_are_examples():
    given = {"model": "toy-decoder", "task": "toy-instruct", "packing": True, "gate": "loss_floor", "budget": 2}
    told = lorakit.run(runs.QUICK | given | {"gate_level": "example", "gate_candidates": 2}).details["gate"]
    assert told["acceptance_rate"] == 0.5


def test_fewer_rows_than_one_candidate_batch_are_refused():
    given = {"gate": "loss_floor", "gate_level": "example", "gate_candidates": 8, "max_train": 100, "batch_size": 16}
    with pytest.raises(ParameterError, match="gate_candidates=8.*128 rows.*100"):
        lorakit.run(runs.QUICK | given)


def test_redundant_rows_are_counted_as_rows():
    given = {"gate": "loss_floor", "gate_level": "example", "redundancy": 0.5, "max_train": 256, "budget": 4}
    told = lorakit.run(runs.QUICK | given).details["gate"]
    assert told["decisions"] == 4 * 64 and told["redundant_accepted"] + told["fresh_accepted"] == 4 * 16
    assert 0 < told["redundant_seen"] < 4 * 64 and told["redundant_seen"] % 16 == 0


@pytest.mark.parametrize("name", ["loss_floor", "gradient_norm", "random"])
def test_rows_without_classes_are_refused_by_name(tmp_path, name):
    """Of a regression, of several labels at once, of question answering, whose batches have no labels."""
    for labels in (torch.rand(32), torch.rand(32, 3), None):
        run = trainer(tmp_path, name)
        batch = runs.collate([runs.rows()[n] for n in range(32)]) | {"labels": labels}
        batch = {key: value for key, value in batch.items() if value is not None}
        if name == "random" and labels is not None:  # it looks at none of them
            assert len(run._best_rows(batch)["labels"]) == 8
            continue
        with pytest.raises(ParameterError, match="^labels=.*of examples needs classes or words: no regression"):
            run._best_rows(batch)
