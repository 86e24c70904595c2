"""Parts of the trainers by themselves: what a batch counts as, losses of no label, checkpoints that do not belong."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lorakit.errors import CheckpointError
from lorakit.seams import Candidate
from lorakit.training import checkpoint
from lorakit.training.checkpoint import Resuming
from lorakit.training.costs import count_tokens
from lorakit.training.loss import MeanLoss, OwnLoss, has_labels, is_mean_loss
from lorakit.training.window import blank

IDS = torch.tensor([[5, 6, 0], [7, 0, 0]])
LABELS = torch.tensor([[1, -100, 3], [-100, -100, 2]])


@pytest.mark.parametrize(
    ("inputs", "pad", "count"),
    [
        ({"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])}, 0, 4),
        ({"input_ids": IDS}, 0, 3),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 1, 3, 3)}, 0, 3),  # of packed rows: says nothing of padding
        ({"input_ids": IDS}, None, 6),
        ({"inputs_embeds": torch.zeros(2, 3, 5)}, 0, 6),
        ({"labels": torch.ones(2), "pixels": torch.zeros(2, 3, 4, 4)}, 0, 6),
    ],
)
def test_tokens_are_counted_by_the_mask_else_the_padding_else_all(inputs, pad, count):
    assert count_tokens(inputs, SimpleNamespace(pad_token_id=pad)) == count


@pytest.mark.parametrize(("shifts", "count"), [(False, 3), (True, 2)])
def test_a_models_own_loss_weighs_as_its_labels_do(shifts, count):
    outputs = SimpleNamespace(loss=torch.tensor(2.0), logits=torch.randn(2, 3, 4, requires_grad=True))
    assert OwnLoss(shifts)(outputs, LABELS) is outputs.loss
    assert OwnLoss(shifts)(outputs, LABELS, 6).item() == pytest.approx(2.0 * count / 6)
    outputs.loss = torch.tensor(math.nan)
    outputs.logits = torch.full((2, 3, 4), 6e4, dtype=torch.float16, requires_grad=True)  # their sum is no half
    nothing = OwnLoss(shifts)(outputs, torch.full_like(LABELS, -100), 6)
    assert nothing.item() == 0 and nothing.requires_grad
    with torch.no_grad():  # evaluated
        assert OwnLoss(shifts)(outputs, torch.full_like(LABELS, -100), 6).isnan()


@pytest.mark.parametrize("kind", ["masked", "causal"])
@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_the_mean_loss_is_that_of_single_precision(kind, smoothing):
    logits = torch.randn(2, 3, 4).bfloat16().requires_grad_()
    found = (loss := MeanLoss(kind, smoothing))(SimpleNamespace(logits=logits), LABELS)
    words = LABELS if kind == "masked" else torch.tensor([[-100, 3, -100], [-100, 2, -100]])
    logs = logits.float().log_softmax(-1)
    right = -logs.gather(2, words.clamp(min=0)[..., None])[..., 0]
    each = ((1 - smoothing) * right - smoothing * logs.mean(-1)) * (words != -100)
    count = int((words != -100).sum())
    torch.testing.assert_close(found, each.sum() / count)
    torch.testing.assert_close(loss(SimpleNamespace(logits=logits), LABELS, torch.tensor(7)), each.sum() / 7)
    assert found.requires_grad
    if smoothing:
        assert loss.token_losses is None
    else:
        torch.testing.assert_close(loss.token_losses, each.flatten().detach())
        assert not loss.token_losses.requires_grad
    nothing = torch.full_like(LABELS, -100)
    assert loss(SimpleNamespace(logits=logits), nothing).item() == 0
    with torch.no_grad():
        assert loss(SimpleNamespace(logits=logits), nothing).isnan()


@pytest.mark.parametrize(("labels", "has"), [(None, False), (LABELS, True), (torch.full((2, 3), -100), False)])
def test_a_batch_has_labels_where_one_is_predicted(labels, has):
    assert has_labels(labels) is has


def test_a_model_without_a_loss_is_taken_at_its_word():
    assert is_mean_loss(nn.Linear(2, 2), {"labels": LABELS}, "causal")


def test_a_blank_candidate_has_the_shapes_and_no_nan():
    nans = {"loss": torch.tensor(math.nan), "logits": torch.full((2, 3, 4), math.nan)}
    found = blank(Candidate(**nans, labels=LABELS, hidden=torch.full((2, 3, 5), math.nan), token_losses=LABELS))
    assert (found.loss.shape, found.logits.shape, found.hidden.shape) == ((), (2, 3, 4), (2, 3, 5))
    assert not any(value.any() for value in (found.loss, found.logits, found.hidden))
    assert found.labels is LABELS and found.token_losses is None


def test_a_checkpoint_of_another_number_of_processes_is_refused(tmp_path):
    def require(processes: int) -> None:
        run = SimpleNamespace(accelerator=SimpleNamespace(num_processes=processes), checkpoint_files=[])
        Resuming.require_resumable(run, tmp_path)

    require(3)  # it says nothing
    for rank in range(2):
        (tmp_path / f"rng_state_{rank}.pth").touch()
    require(2)
    with pytest.raises(CheckpointError, match=r"written by 2 process\(es\), which cannot be resumed by 1"):
        require(1)


def test_a_checkpoint_of_other_parameters_is_refused(tmp_path):
    save_file({"other": torch.zeros(2)}, tmp_path / checkpoint.WEIGHTS)
    with pytest.raises(CheckpointError, match="trains other parameters than this run: bias, other, weight"):
        checkpoint.load_weights(nn.Linear(2, 2), tmp_path)
