"""What a caller need not say: the numbers and switches that public callables assume, as they are documented."""

from __future__ import annotations

import inspect
from importlib import import_module

import pytest

NOVELTY = {"m": 512, "k": 64, "target_novelty": 0.3, "target_novelty_scaler": 10.0, "novelty_ema_rate": 0.01}
NOVELTY |= {"burn_in": 2000, "reorth_every": 128, "k_topk": 64, "rows": 0, "decay": 1.0, "leverage": False}
NOVELTY |= {"device": "cpu", "kind": "causal"}
DEFAULTS = {
    "lorakit.adapters.attach:attach": {"method": "lora", "trainable": "head"},
    "lorakit.adapters.attachment:merge": {"safe": False},
    "lorakit.adapters.attachment:merged": {"safe": False},
    "lorakit.adapters.saving:save_adapter": {"packed": False},
    "lorakit.base.quantize:quantisable": {"exclude": "heads"},
    "lorakit.base.quantize:quantize_nf4": {"double_quant": True, "compute_dtype": "bf16", "exclude": "heads"},
    "lorakit.gates:build_gate": {"seed": 0},
    "lorakit.gates.novelty:HeadGradientGate": NOVELTY | {"seed": 0},
    "lorakit.gates.simple:RandomGate": {"burn_in": 0, "seed": 0},
    "lorakit.gates.simple:ScoredGate": {"seed": 0},
    "lorakit.gates.threshold:RunningScale": {"count": 0, "mean": 0.0, "variance": 0.0},
    "lorakit.gates.threshold:ThresholdController": {"steepness": 10.0, "ema_rate": 0.02, "burn_in": 0},
    "lorakit.sketches.frequent_directions:FrequentDirections": {"decay": 1.0, "device": "cpu"},
    "lorakit.skip.controller:SkipLoRA": {"threshold": 0.05, "decide": "forward", "skip": "adapter", "seed": 0},
    "lorakit.tokens:build_tokens": {"seed": 0, "rank": 0, "smoothing": 0.0},
    "lorakit.tokens.choice:Shares": {"seed": 0, "rank": 0, "draws": 0},
    "lorakit.tokens.head_loss:HeadLoss": {"smoothing": 0.0},
    "lorakit.tokens.head_loss:likelihoods": {"smoothing": 0.0, "grouped": False},
    "lorakit.tokens.scores:TokenScore": {"seed": 0},
    "lorakit.tokens.selection:TokenGate": {"seed": 0, "rank": 0, "smoothing": 0.0},
    "lorakit.training.slora:SLoRATrainer": {"loss": "nll"},
    "lorakit.training.trainer:BudgetTrainer": {"evaluations": 1, "save_steps": 0, "keep_best": False},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_the_documented_ones(name):
    module, _, attribute = name.partition(":")
    parameters = inspect.signature(getattr(import_module(module), attribute)).parameters
    said = {key: one.default for key, one in parameters.items() if isinstance(one.default, (bool, int, float, str))}
    assert {key: value for key, value in said.items() if value != "" and key != "title"} == DEFAULTS[name]
