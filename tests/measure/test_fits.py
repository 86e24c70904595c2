"""`lorakit plan`: a deep model from two shallow ones against the whole one; what fits a card, and what is larger."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lorakit import models
from lorakit.errors import ParameterError
from lorakit.measure.flops import FlopCount
from lorakit.measure.live import KINDS
from lorakit.runs import fits, plan


@pytest.fixture
def deep(tmp_path):
    """A function that writes a Gemma of so many blocks, of two kinds, and gives its folder."""

    def written(blocks: int, **changes) -> str:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
        sizes |= {"head_dim": 16, "vocab_size": 200, "sliding_window": 8, "max_position_embeddings": 4096}
        config = AutoConfig.for_model("gemma3_text", num_hidden_layers=blocks, **sizes | changes)
        config.save_pretrained(tmp_path / str(blocks))
        return str(tmp_path / str(blocks))

    return written


def whole(asked: plan.Plan, monkeypatch) -> plan.Prediction:
    """The prediction of all blocks."""
    with monkeypatch.context() as patch:
        patch.setattr(plan, "DEPTHS", (1000, 1001))
        return plan.predict(asked)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("gpt2", {}),
        ("gpt2", {"method": "head", "kind": "classify"}),
        ("bert-base-uncased", {"precision": "bf16"}),
        ("gemma-3-270m", {"loss": "nll"}),
        *(("", options) for options in (
            {}, {"gradient_checkpointing": True}, {"quantize": "nf4"},
            {"tokens": 0.2, "mode": "fractional"}, {"targets": ["q_proj", "v_proj"], "batch": 1},
        )),
    ],
)  # fmt: skip
def test_a_deep_model_from_two_shallow_ones_is_within_a_percent(model, options, deep, monkeypatch):
    asked = plan.Plan(model=model or deep(14), **{"batch": 2, "seq": 64} | options)
    line, all_of_it = plan.predict(asked), whole(asked, monkeypatch)
    assert line.memory["peak"] == pytest.approx(all_of_it.memory["peak"], rel=0.01)
    assert line.flops == pytest.approx(all_of_it.flops, rel=0.01)
    assert (line.trainable, line.total) == (all_of_it.trainable, all_of_it.total)


@pytest.mark.parametrize("options", [
    {"method": "full"}, {"targets": r".*layers\.\d\..*q_proj"}, {"targets": ["layers.7.self_attn.q_proj"]}
])  # fmt: skip
def test_what_depth_decides_is_run_whole(deep, options, monkeypatch):
    asked = plan.Plan(model=deep(14), seq=16, **options)
    line = plan.predict(asked)
    assert line == whole(asked, monkeypatch)
    sites = {"full": 0}.get(options.get("method"), 10 if isinstance(options.get("targets"), str) else 1)
    assert line.total == plan.build(models.config(deep(14)), "causal", "bf16").num_parameters() + sites * 8 * (32 + 32)


def test_blocks_that_differ_are_run_whole(deep, monkeypatch):
    folder = deep(14)
    asked = plan.Plan(model=folder, seq=16)
    assert plan.predict(asked).total == whole(asked, monkeypatch).total
    real = plan.build

    def uneven(config, *rest):  # the last of all blocks is wider, which no shallow model shows
        model = real(config, *rest)
        if len(model.model.layers) == 14:
            model.model.layers[-1].mlp.up_proj = torch.nn.Linear(32, 640, bias=False, device="meta")
            model.model.layers[-1].mlp.gate_proj = torch.nn.Linear(32, 640, bias=False, device="meta")
            model.model.layers[-1].mlp.down_proj = torch.nn.Linear(640, 32, bias=False, device="meta")
        return model.bfloat16()

    monkeypatch.setattr(plan, "build", uneven)
    assert plan.predict(asked) == whole(asked, monkeypatch)


def test_a_plans_flops_are_those_of_a_real_step(deep):
    folder = deep(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).train()
    batch = plan.make_batch(2, 16, "causal")
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with FlopCount() as count:
        model(**batch).loss.backward()
    asked = plan.Plan(model=folder, method="full", batch=2, seq=16, dtype="fp32", loss="nll")
    assert plan.predict(asked).flops == count.total > 0


@pytest.mark.parametrize("slope", [1.0, 7.3, 0.4])
@pytest.mark.parametrize("reached", [1, 2, 3, 50, 63, 64, 65, 999, 1000])
def test_the_largest_is_found_in_few_steps(slope, reached):
    asked = []

    def room(n):
        asked.append(n)
        return slope * (reached + 0.5 - n) * (1 + 0.02 * (n % 3))  # nearly a line

    assert fits.largest(room, 1, 1000) == reached
    assert len(asked) <= 10 and max(asked) <= 1000


def formula(asked: plan.Plan) -> plan.Prediction:
    """A step that takes less in 4 bits, and still less where activations are made again."""
    kept = 3e6 if asked.gradient_checkpointing else 2e7
    peak = (1e9 if asked.quantize == "nf4" else 4e9) + kept * asked.batch * (asked.seq or 512) / 64 + 5e8
    return plan.Prediction(dict.fromkeys(KINDS, 0) | {"peak": int(peak)}, 1, 2, 3, "a formula", asked.seq or 512, 768)


def test_what_fits_a_card_fits_and_what_is_larger_does_not(monkeypatch):
    monkeypatch.setattr(fits, "predict", formula)
    asked = plan.Plan(model="gemma-3-270m", batch=2, seq=128)
    found = fits.fit(asked, 12)
    assert found.plan == asked and found.batch > 2 and found.seq > 128 and found.seq % fits.PIECE == 0

    def need(**changes):
        return formula(asked.but(**changes)).need / 1e9

    assert need(batch=found.batch) <= 12 < need(batch=found.batch + 1)
    assert need(seq=found.seq) <= 12 < need(seq=found.seq + fits.PIECE)
    assert fits.fit(asked, 10_000).seq == 32_768  # as many as the model takes
    assert fits.fit(asked.but(seq=32), 12).seq == fits.fit(asked.but(seq=64), 12).seq  # shorter than a piece


def test_the_quickest_way_that_fits_is_taken(monkeypatch):
    monkeypatch.setattr(fits, "predict", formula)
    asked = plan.Plan(model="gemma-3-270m", batch=32, seq=512)
    needs = [formula(asked.but(**way)).need for way in fits.WAYS]
    assert needs == sorted(needs, reverse=True) and len(set(needs)) == 4
    for way, need in zip(fits.WAYS, needs, strict=True):
        assert fits.fit(asked, (need + 1) / 1e9).plan == asked.but(**way)
    assert fits.fit(asked, (min(needs) - 1) / 1e9) == fits.Fit(None)
    fractional = asked.but(tokens=0.2, mode="fractional")  # which keeps what checkpointing drops
    assert fits.fit(fractional, (needs[1] + 1) / 1e9).plan.quantize == "nf4"
    assert fits.fit(fractional, (needs[2] + 1) / 1e9).plan is None


@pytest.mark.parametrize(
    ("room", "limit", "expected"),
    [
        (lambda n: -1.0, 100, 0),
        (lambda n: 1.0 if n < 500 else -1e15, 512, 499),  # a cliff
        (lambda n: 5.4 - (1 + 0.5 * min(n, 8) + 0.01 * n), 2**20, 40),  # steep, then flat
        (lambda n: 1e6 - n, 2**20, 1_000_000),
        (lambda n: 1.0, 2**20, 2**20),
    ],
)
def test_the_largest_of_what_is_no_line(room, limit, expected):
    asked = []
    assert fits.largest(lambda n: asked.append(n) or room(n), 1, limit) == expected and len(asked) <= 40


def test_the_command_says_what_fits_in_words_and_in_json(deep, capsys, monkeypatch):
    command = [deep(3), "--seq", "128", "--batch", "1"]
    assert fits.main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["memory"]["peak"] < told["need"] and told["flops"] > 0 and told["plan"]["model"] == command[0]
    assert told["gpu"] is told["fit"] is None
    monkeypatch.setattr(fits, "predict", formula)
    assert fits.main([*command, "--gpu", "12"]) == 0
    text, found = capsys.readouterr().out, fits.fit(plan.Plan(model=command[0], seq=128, batch=1), 12)
    assert f"12 GB: fits as it is; at 128 tokens up to batch {found.batch:,}, at batch 1 up to {found.seq:,}" in text
    assert fits.main([*command, "--gpu", "3", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["fit"]
    assert told["batch"] > 1 and told["plan"]["seq"] == 128 and told["plan"]["quantize"] == "nf4"
    assert fits.main([*command, "--gpu", "0.5"]) == 0
    assert "0.5 GB: does not fit" in capsys.readouterr().out
    for gpu in ("-1.0", "nan", "inf"):
        with pytest.raises(ParameterError, match=f"gpu={gpu}: must be above 0"):
            fits.main([*command, "--gpu", gpu])
