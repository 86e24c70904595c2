"""`python -m` a part tries the part; A starts as it is told; batches may be dicts."""

from __future__ import annotations

import doctest
import subprocess
import sys

import pytest
import torch

from lorakit.errors import ParameterError
from lorakit.scratch import LoRALinear, LoRATrainer, LoRATransformer, byte_loader, layer, transformer
from lorakit.scratch.layer import SIGMA


@pytest.mark.parametrize("part", ["layer", "transformer"])
def test_a_part_tries_itself_and_says_so(part):
    told = subprocess.run([sys.executable, "-m", f"lorakit.scratch.{part}"], capture_output=True, text=True)
    assert told.returncode == 0 and told.stderr == ""
    assert told.stdout.count("\nok\n") >= 15 and told.stdout.endswith("Test passed.\n")


def wrong(*_) -> None:
    """Does nothing."""


BROKEN = [(layer, LoRALinear, "unmerge"), (layer, LoRALinear, "merge"), (layer, LoRALinear, "reset_lora"),
          (transformer, LoRATransformer, "merge"), (transformer, LoRATransformer, "switch_adapter"),
          (transformer, LoRATransformer, "store_adapter"),
          (transformer, LoRATransformer, "configure_lora_training")]  # fmt: skip


@pytest.mark.parametrize(("module", "kind", "method"), BROKEN)
def test_a_broken_part_fails_its_own_trial(module, kind, method, monkeypatch, capsys):
    monkeypatch.setattr(kind, method, wrong)
    assert doctest.testmod(module).failed > 0


def test_a_starts_gaussian_with_the_sigma_it_is_given_or_kaiming_uniform():
    torch.manual_seed(0)
    for given, sigma in (({}, SIGMA), ({"lora_sigma": 0.3}, 0.3)):
        A = LoRALinear(400, 4, r=100, **given).lora_A.detach().flatten()
        assert abs(A.std() / sigma - 1) < 0.02 and abs(A.mean()) < 0.03 * sigma
        assert abs((A.abs() < sigma).float().mean() - 0.6827) < 0.01  # of a normal distribution
    A = LoRALinear(400, 4, r=100, lora_sigma=None).lora_A.detach()
    assert 0.99 * 400**-0.5 < A.abs().max() <= 400**-0.5 and abs(A.std() * 3**0.5 / 400**-0.5 - 1) < 0.02
    model = LoRATransformer(50, 64, 2, 1, lora_sigma=0.3)
    assert all(abs(part.lora_A.std() / 0.3 - 1) < 0.2 for part in model.lora_layers())


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan"), float("inf")])
def test_no_other_sigma(sigma):
    with pytest.raises(ParameterError, match="lora_sigma=.*: must be a number > 0 or None"):
        LoRALinear(4, 4, lora_sigma=sigma)


@pytest.mark.parametrize("masked", [False, True])
def test_batches_as_dicts_are_those_as_tuples(masked):
    found = []
    for named in (False, True):
        torch.manual_seed(0)
        model = LoRATransformer(256, 16, 2, 1)
        batches = [tuple(batch) for batch in byte_loader([f"a line of text, {n}" for n in range(40)], 16, 8)]
        if masked:
            batches = [(*batch, torch.ones_like(batch[0]).tril()) for batch in batches]
        if named:  # and what a collator may add
            names = ("labels", "input_ids", "attention_mask")
            batches = [
                dict(zip(names, (batch[1], batch[0], *batch[2:]), strict=False)) | {"idx": torch.arange(len(batch[0]))}
                for batch in batches
            ]
        found.append(LoRATrainer(model, batches, batches, 1e-2).train(2))
    first, second = ({name: series for name, series in history.items() if name != "seconds"} for history in found)
    assert first == second and first["train_loss"][1] < first["train_loss"][0]
