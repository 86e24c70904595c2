"""The same params files in 1, 2 and 4 processes, of the same batch together: the same losses, and the same weights."""

from __future__ import annotations

import functools
import os
import random

import pytest
import torch
import two_processes

import lorakit
from lorakit import adapters
from lorakit.files import PROJECT
from lorakit.head import IGNORED, shifted
from lorakit.params.files import read_files
from lorakit.tokens.choice import Shares
from lorakit.training import BudgetTrainer

BATCH, STEPS = 8, 6
# an order of rows that does not ask how many a process takes; and steps in which a gradient's size shows, as in Adam's
# it would not
SHARED = {"group_by_length": False, "budget_unit": "steps", "budget": STEPS, "warmup": 0.0, "schedule": "constant"}
SHARED |= {"optimizer": "sgd", "learning_rate": 0.05, "max_grad_norm": 1e3}
SHARED |= {"evaluations": 1, "latency_repeats": 0, "predict_memory": False, "max_test": 8, "max_validation": 8}
SKIPPING = {"skip_warmup": 0.2, "skip_explore": 0.2, "skip_measure_every": 2}
GATED = {"gate_burn_in": 2, "gate_rate": 0.5}
SEQUENCES = {"gating": {"method": "flora", "topk_tokens": 0.3, "mode": "gather", "per": "sequence", "score": "loss"}}
SHARD = {"gating": {"method": "flora", "topk_tokens": 0.3, "mode": "gather", "policy": "pps", "score": "loss"}}
RUNS = {
    "lora": ("toy", "lora", {}),
    "full": ("toy", "full", {}),
    "sparse": ("toy", "sparse", {}),
    "hira": ("toy", "hira", {}),
    "qlora": ("toy", "qlora", {}),
    "skip": ("toy", "skip", SKIPPING),
    "slora": ("toy", "slora", GATED),
    "nll": ("toy-instruct", "lora", {"loss": "nll"}),
    "exact": ("toy-instruct", "lora", {"loss": "exact"}),
    "sequences": ("toy-instruct", "flora", SEQUENCES),
    "fractional": ("toy-instruct", "flora", {"gating": SEQUENCES["gating"] | {"mode": "fractional"}}),
    "shards": ("toy-instruct", "flora", SHARD),
}
ROWS_OF = {2: [*RUNS], 4: ["lora", "skip", "slora", "exact", "shards"]}


def choosing_as(processes: int, stack: pytest.MonkeyPatch) -> None:
    """In this one process a batch's tokens are chosen as `processes` would: each its part's, with its own draws."""
    pick, counts = Shares.pick, None

    def groups(self, labels):
        nonlocal counts
        counts = (shifted(labels, self.kind) != IGNORED).sum(1).tolist()
        part = len(counts) // processes
        return [sum(counts[i : i + part]) for i in range(0, len(counts), part)]

    def picked(self, scores, groups, generator):
        places, weights, first = [], [], 0
        for rank, count in enumerate(groups):
            seed = random.Random(f"{self.seed}/{rank}/{self.draws - 1}").getrandbits(63)
            mine = pick(self, scores[first : first + count], [count], torch.Generator().manual_seed(seed))
            places.append(first + mine[0])
            weights.append(mine[1])
            first += count
        return torch.cat(places), torch.cat(weights)

    stack.setattr(Shares, "groups", groups)
    stack.setattr(Shares, "pick", picked)


def flat(model: torch.nn.Module) -> torch.Tensor:
    """What is trained of `model`, one after the other."""
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def ran(name: str, folder: str, processes: int) -> dict:
    """One row's run in this process, of `processes`: what each step lost, what was trained, and what was decided."""
    setting, row, more = RUNS[name]
    given = read_files([PROJECT / f"params/{setting}/{file}.yaml" for file in ("_setting", row)])
    given |= SHARED | more | {"batch_size": BATCH // processes, "record": f"{folder}/{name}-{processes}.json"}
    losses, trained = [], []
    with pytest.MonkeyPatch.context() as stack:
        gated, train = BudgetTrainer._gated, BudgetTrainer.train

        def seen(self, backward, loss, **options):
            losses.append(loss.item() if self._part.loss is None else self._part.loss)
            gated(self, backward, loss, **options)

        def training(self, **options):
            before = flat(self.model)
            train(self, **options)
            trained.append((self, before, flat(self.model)))

        stack.setattr(BudgetTrainer, "_gated", seen)
        if name == "qlora":  # in bf16, its default, what differs by rounding in fp32 is now and then rounded apart
            stack.setattr(adapters, "quantize_nf4", functools.partial(adapters.quantize_nf4, compute_dtype="fp32"))
        stack.setattr(BudgetTrainer, "train", training)
        record = lorakit.run(given)
    assert record.status == "done", record.message
    [(trainer, before, after)] = trained
    told = {"decisions": trainer.gate_log.decisions, "processes": trainer.accelerator.num_processes}
    return told | {"losses": losses, "before": before, "after": after}


def by_count(folder: str) -> dict:
    processes = int(os.environ["WORLD_SIZE"])
    return {name: ran(name, folder, processes) for name in ROWS_OF[processes]}


@pytest.mark.parametrize("count", ROWS_OF)
def test_several_processes_train_as_one_does(tmp_path, count, monkeypatch):
    ranks = two_processes.run("test_equal_processes", "by_count", tmp_path, timeout=480, count=count)
    ones = {}
    for name in ROWS_OF[count]:
        with monkeypatch.context() as stack:
            if name == "shards":
                choosing_as(count, stack)
            ones[name] = one = ran(name, str(tmp_path), 1)
        first, *others = [rank[name] for rank in ranks]
        assert one["processes"] == 1 and first["processes"] == count
        for other in others:
            assert torch.equal(first["after"], other["after"]), name
            assert first["decisions"] == other["decisions"] == one["decisions"]
        mean = [sum(losses) / count for losses in zip(*(rank[name]["losses"] for rank in ranks), strict=True)]
        assert mean == pytest.approx(one["losses"], rel=1e-5), name
        assert (first["after"] - one["after"]).norm() < 1e-4 * (one["after"] - one["before"]).norm(), name
    assert False in ones["slora"]["decisions"]
    assert ones["skip"]["losses"][:2] == ones["lora"]["losses"][:2] and ones["skip"]["losses"] != ones["lora"]["losses"]
    assert ones["shards"]["losses"] != pytest.approx(ones["exact"]["losses"], rel=1e-3)
