"""Arguments and models of scripts written for the plain Trainer: served as it serves them, or refused by name."""

from __future__ import annotations

import pytest
from flora_runs import arguments, decoder

from lorakit.errors import ParameterError
from lorakit.training import FLoRATrainer

# keys that only mean something beside another -------------------------------------------------------


@pytest.mark.parametrize(
    ("gating", "message"),
    [
        ({"topk_tokens": 0.2, "mode": "fractional"}, "^gating.topk_tokens=0.2: says nothing without method"),
        ({"mode": "fractional"}, "^gating.mode='fractional': says nothing without method"),
        ({"per": "sequence"}, "^gating.per='sequence': says nothing without method"),
        ({"method": "random", "score": "loss"}, "^gating.score='loss': says nothing without method 'flora'"),
        ({"method": "random", "policy": "pps"}, "^gating.policy='pps': says nothing without method 'flora'"),
        ({"method": "flora", "score": "loss", "sketch_dim": 64}, "^gating.sketch_dim=64: says nothing without score"),
    ],
)
def test_a_key_without_the_one_it_belongs_to_is_refused(tmp_path, gating, message):
    with pytest.raises(ParameterError, match=message):
        FLoRATrainer(decoder(), arguments(tmp_path), gating=gating)
