"""FLOPs that are computed against FLOPs that are counted: every pass of short runs, to the last one."""

from __future__ import annotations

import json

import decoders
import pytest
import torch
import training_runs as runs

from lorakit.adapters import attach
from lorakit.measure.flops import FlopCount
from lorakit.skip.controller import SkipLoRA
from lorakit.training import FLoRATrainer
from lorakit.training.costs import FlopMeter
from lorakit.training.gated import GatedTrainer

GATE = {"m": 64, "k": 8, "target_novelty": 0.5, "burn_in": 4, "k_topk": 16}
STEPS = 26


def collate(rows):
    """Padded to the longest row, a multiple of 4; some have few targets, and some rows none."""
    width = -(-max(len(row["input_ids"]) for row in rows) // 4) * 4
    batch = {name: torch.zeros(len(rows), width, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    batch["labels"] = torch.full((len(rows), width), -100)
    for place, row in enumerate(rows):
        count = len(row["input_ids"])
        for name, tensor in batch.items():
            tensor[place, :count] = torch.tensor(row[name])
    return batch


def data(count: int = 300):
    generator = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(count):
        length, prompt = (int(torch.randint(low, 33, (), generator=generator)) for low in (4, 0))
        ids = torch.randint(1, 90, (length,), generator=generator).tolist()
        labels = ([-100] * prompt + ids[prompt:])[:length]
        rows.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels})
    return rows


class Recounted(FlopMeter):
    """Counts what the meter computes; passes: (what it was told, what was counted, whether it had to count)."""

    def __init__(self):
        super().__init__()
        self.passes = []

    def measure(self, key, sizes, function):
        seen, counts = len(self.known), []

        def counted():
            with FlopCount() as count:
                result = function()
            counts.append(int(count.total))
            return result

        result, flops = super().measure(key, sizes, counted)
        fresh = len(self.known) > seen
        self.passes.append((key[0], flops, flops if fresh else counts[0], fresh))
        return result, flops


def trained(model, folder, gating, gate=None, steps=STEPS):
    from transformers import TrainingArguments

    options = {"output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": steps, "report_to": []}
    args = TrainingArguments(**options, save_strategy="no", logging_strategy="no", use_cpu=True, disable_tqdm=True)
    run = FLoRATrainer(model, args, data(), data_collator=collate, gating=gating, gate_config=gate)
    run.meter = run.run.meter = Recounted()
    run.train()
    return run.meter


KINDS = {
    "random": {"method": "random"}, "weighted": {"policy": "pps"}, "sequence": {"per": "sequence"},
    "scored": {"score": "hidden_gradient"}, "gated": {}, "hira": {}, "eager": {},
}  # fmt: skip
CASES = {
    **{f"{name}-fractional": (name, {"mode": "fractional"}) for name in ("gemma", "llama", "qwen2", "gpt2", "toy")},
    **{f"{name}-gather": (name, {"mode": "gather"}) for name in ("gemma", "gpt2", "llama")},
    **{f"{name}-plain": (name, {"method": "baseline"}) for name in ("gemma", "gpt2", "llama")},
    **{
        f"gemma-{mode}-{n}": ("gemma", {"mode": mode} | v)
        for mode in ("gather", "fractional")
        for n, v in KINDS.items()
    },
}


@pytest.mark.parametrize("name", CASES)
def test_computed_flops_are_those_of_the_passes_that_ran(tmp_path, name):
    model, gating = CASES[name]
    adapter = "hira" if name.endswith("hira") else "lora"
    model = decoders.adapted(decoders.of(model, "eager" if name.endswith("eager") else "sdpa"), adapter)
    gating = {"method": "flora", "topk_tokens": 0.3} | gating
    meter = trained(model, tmp_path, gating, GATE if name.endswith("gated") else None)
    for kind, flops, counted, _ in meter.passes:
        assert flops == counted, kind
    assert all(equations.holds is not False for equations in meter._equations.values())
    computed = sum(not fresh for *_, fresh in meter.passes)
    assert computed > 0.4 * len(meter.passes) and {kind for kind, *_, fresh in meter.passes if not fresh} >= {"forward"}


@pytest.mark.parametrize("mode", ["gather", "fractional"])
def test_chunks_count_where_the_head_does_something_once_a_call(tmp_path, monkeypatch, mode):
    monkeypatch.setattr("lorakit.tokens.head_loss.HeadLoss.chunk", 8)
    model = decoders.of("llama", tie_word_embeddings=False)
    model = decoders.prepared(attach(model, "hira", target_modules=["lm_head", "q_proj"], rank=4, seed=0))
    meter = trained(model, tmp_path, {"method": "flora", "topk_tokens": 0.1, "mode": mode}, steps=40)
    assert all(flops == counted for _, flops, counted, _ in meter.passes)
    assert all(equations.holds is not False for equations in meter._equations.values())


def test_classifiers_and_controllers_signatures(tmp_path):
    model = attach(runs.tiny_bert(), "lora", rank=4, seed=0)
    skip = SkipLoRA(model, settings=runs.skipping(share=0.5, warmup=0.1, measure_every=3))
    run = runs.trainer(model, tmp_path, controllers=[skip])
    run.meter = run.run.meter = Recounted()
    run.train()
    assert isinstance(run, GatedTrainer) and all(flops == counted for _, flops, counted, _ in run.meter.passes)


# the meter by itself ---------------------------------------------------------------------------------


def measured(meter, sizes, flops_of):
    """FLOPs by the meter of a pass that costs `flops_of(*sizes)`, even."""
    return meter.measure("pass", sizes, lambda: torch.ones(1, 1) @ torch.ones(1, flops_of(*sizes) // 2))[1]


def test_as_many_counts_as_coefficients_and_one_to_check():
    meter, cost = FlopMeter(), lambda n, k: 40 + 6 * n + 10 * k
    for n, k in [(1, 1), (2, 1), (2, 1), (5, 4), (7, 2), (9, 9), (8, 1)]:
        assert measured(meter, (n, k), cost) == cost(n, k)
    assert list(meter.known) == [("pass", sizes) for sizes in [(1, 1), (2, 1), (5, 4), (7, 2)]]


def test_a_pass_that_is_no_such_sum_is_counted_at_every_size():
    meter, cost = FlopMeter(), lambda n: 2 * n**3
    assert [measured(meter, (n,), cost) for n in range(1, 8)] == [cost(n) for n in range(1, 8)]
    assert len(meter.known) == 7


def test_a_saved_meter_goes_on_as_it_would_have():
    for cost in (lambda n: 40 + 6 * n, lambda n: 2 * n**3):
        meter, again = FlopMeter(), FlopMeter()
        for n in (1, 2, 3):
            measured(meter, (n,), cost)
        again.load_state_dict(json.loads(json.dumps(meter.state_dict())))
        assert again.known == meter.known
        assert [measured(again, (n,), cost) for n in (7, 9)] == [measured(meter, (n,), cost) for n in (7, 9)]
        assert again.known == meter.known


def test_counts_of_an_older_checkpoint_are_made_anew():
    meter = FlopMeter()
    measured(meter, (1,), lambda n: 2 * n)  # of before, forgotten
    older = [["forward", [["input_ids", [16, 24]]]], 1000], [["forward", [16], "more"], 1000]
    meter.load_state_dict([*older, [[["forward", ["input_ids", 16]], [24]], 40]])
    assert meter.known == {(("forward", ("input_ids", 16)), (24,)): 40}
