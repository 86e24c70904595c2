"""The training loop, what LoRA learns on a trained base and not on a random one, the history and its figure."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from lorakit.errors import ParameterError
from lorakit.scratch import DivergedError, LoRATrainer, LoRATransformer, Settings, byte_loader, evaluate, pretrain
from lorakit.scratch.compare import compare, review_loaders
from lorakit.scratch.loop import rate
from lorakit.tasks.toy.grammar import reviews, split_seed

TEXT = ["the quick brown fox", "jumps over the lazy dog"] * 8
SMALL = {"vocab_size": 256, "d_model": 16, "num_heads": 2, "num_layers": 1, "lora_r": 2, "lora_alpha": 4}
LEARNING = Settings(d_model=48, length=64, texts=400, epochs=2, pretrain_epochs=4)


def loaders():
    return byte_loader(TEXT, 16, 4, shuffle=True), byte_loader(TEXT[:4], 16, 4)


@pytest.fixture(scope="module")
def comparison():
    return compare(LEARNING)


# learning


def test_lora_improves_a_trained_base_and_does_far_better_than_on_a_random_one(comparison):
    pretrained, random = comparison.pretrained, comparison.random
    assert comparison.pretrain_loss[-1] < 1.5 < comparison.pretrain_loss[0]
    assert pretrained.history["val_loss"][-1] < pretrained.initial_val_loss - 1
    assert pretrained.history["val_loss"][-1] < random.history["val_loss"][-1] - 1
    assert random.initial_val_loss > math.log(256)  # a random base knows nothing
    assert pretrained.history["val_loss"][-1] < letter_frequencies(pretrained) - 0.5


def letter_frequencies(trainer: LoRATrainer) -> float:
    """Loss of a model that knows how often each byte occurs and nothing else."""
    counts = torch.cat([labels.flatten() for _, labels in trainer.train_loader]).bincount(minlength=256) + 0.01
    targets = torch.cat([labels.flatten() for _, labels in trainer.val_loader])
    return -(counts / counts.sum()).log()[targets].mean().item()


def test_both_bases_start_from_the_same_weights_and_one_stays_there(comparison):
    torch.manual_seed(LEARNING.seed)
    start = LoRATransformer(**LEARNING.model_arguments()).base_state_dict()
    random, pretrained = (t.model.base_state_dict() for t in (comparison.random, comparison.pretrained))
    assert all(torch.equal(random[name], tensor) for name, tensor in start.items())
    assert not any(torch.equal(pretrained[name], tensor) for name, tensor in start.items())


def test_merging_what_was_learned_keeps_the_loss(comparison):
    trainer = comparison.pretrained
    trainer.model.merge()
    assert evaluate(trainer.model, trainer.val_loader) == pytest.approx(trainer.history["val_loss"][-1], abs=1e-4)
    trainer.model.unmerge()
    assert evaluate(trainer.model, trainer.val_loader) == trainer.history["val_loss"][-1]


def test_no_validation_review_was_trained_on():
    train, validation = review_loaders(Settings(texts=300))
    seen = {text for text, _ in reviews(300, split_seed("train"))}
    text = bytes(torch.cat([labels.flatten() for _, labels in validation]).tolist()).decode()
    whole = text.split("\n")[1:-1]
    assert len(whole) > 20 and not seen & set(whole)
    assert len(train.dataset) > len(validation.dataset)


# the loop


def test_training_leaves_the_frozen_weights_bit_identical():
    model = LoRATransformer(**SMALL)
    base, lora = model.base_state_dict(), model.lora_state_dict()
    LoRATrainer(model, *loaders(), learning_rate=1e-2).train(2)
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.base_state_dict().items())
    assert not any(torch.equal(tensor, lora[name]) for name, tensor in model.lora_state_dict().items())


def test_pretraining_leaves_the_adapter_alone_and_freezes_the_base_again():
    model = LoRATransformer(**SMALL)
    lora = model.lora_state_dict()
    losses = pretrain(model, loaders()[0], epochs=3, learning_rate=1e-2)
    assert len(losses) == 3 and losses[-1] < losses[0] - 0.5
    assert all(torch.equal(tensor, lora[name]) for name, tensor in model.lora_state_dict().items())
    assert model.get_parameter_stats()["trainable"] == model.get_parameter_stats()["lora"]


def test_one_step_is_adamw_on_the_clipped_mean_gradient():
    model = LoRATransformer(**SMALL)
    batch = next(iter(loaders()[1]))
    layers = list(model.lora_layers())
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B)
    expected = [layer.lora_B.detach().clone().requires_grad_() for layer in layers]
    state = {f"{name}": p for name, p in model.named_parameters()}
    names = [name for name in state if name.endswith("lora_B")]
    logits = torch.func.functional_call(model, state | dict(zip(names, expected, strict=True)), (batch[0],))
    F.cross_entropy(logits.flatten(0, 1), batch[1].flatten()).backward()
    LoRATrainer(model, [batch], [batch], learning_rate=1e-2).train(1)
    for layer, start in zip(layers, expected, strict=True):  # AdamW's first step is the rate times the sign
        moved = start.detach() - 1e-2 * start.grad.sign()
        clear = start.grad.abs() > 1e-4
        assert clear.any()
        torch.testing.assert_close(layer.lora_B.detach()[clear], moved[clear], atol=1e-4, rtol=0)


def test_the_rate_warms_up_decays_and_never_stops():
    rates = [rate(step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(later < earlier for earlier, later in zip(rates[4:], rates[5:], strict=False))
    assert 0 < rates[-1] < 0.02
    assert rate(0, 1) == 1.0


def test_a_second_training_has_the_full_rate_again(monkeypatch):
    rates, step = [], torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    trainer = LoRATrainer(LoRATransformer(**SMALL), *loaders(), learning_rate=1e-2)
    trainer.train(2)
    first, initial = list(rates), trainer.initial_val_loss
    rates.clear()
    trainer.train(2)
    assert rates == first and max(rates) == pytest.approx(1e-2)
    assert trainer.initial_val_loss == initial and {len(series) for series in trainer.history.values()} == {4}


def test_history_has_one_entry_per_epoch():
    train, validation = loaders()
    lines = []
    trainer = LoRATrainer(LoRATransformer(**SMALL), train, validation, learning_rate=1e-2)
    assert trainer.initial_val_loss is None
    history = trainer.train(3, lines.append)
    assert history is trainer.history and list(history) == ["train_loss", "val_loss", "tokens", "seconds"]
    assert {len(series) for series in history.values()} == {3} and len(lines) == 3
    assert history["tokens"] == [train.dataset.tensors[1].numel()] * 3
    assert history["val_loss"][-1] == evaluate(trainer.model, validation)
    assert history["val_loss"][-1] < trainer.initial_val_loss


def test_the_same_seed_trains_the_same():
    losses = []
    for _ in range(2):
        torch.manual_seed(3)
        model = LoRATransformer(**SMALL, lora_dropout=0.2)
        losses.append(LoRATrainer(model, *loaders(), learning_rate=1e-2).train(2)["val_loss"])
    assert losses[0] == losses[1]


def test_evaluate_is_the_mean_over_targets_and_keeps_the_mode():
    model = LoRATransformer(**SMALL, lora_dropout=0.9).train()
    ids = torch.randint(0, 256, (3, 8))
    labels = ids.clone()
    labels[0, :7] = -100
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    batches = [(ids[:1], labels[:1], mask[:1]), (ids[1:], labels[1:], mask[1:])]
    loss = evaluate(model, batches)
    assert model.training
    with torch.no_grad():
        logits = model.eval()(ids, mask)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())  # over 17 targets, not the mean of two means
    assert loss == pytest.approx(expected.item(), abs=1e-6)


def test_divergence_is_an_error():
    model = LoRATransformer(**SMALL)
    model.embedding.weight.data.fill_(math.inf)
    with pytest.raises(DivergedError, match="step 1: lower learning_rate"):
        LoRATrainer(model, *loaders(), learning_rate=1e-2).train(1)


@pytest.mark.parametrize("value", [0.0, -1e-3, math.inf, math.nan])
def test_a_rate_that_is_no_positive_number_is_refused(value):
    with pytest.raises(ParameterError, match="learning_rate"):
        LoRATrainer(LoRATransformer(**SMALL), *loaders(), learning_rate=value)
    with pytest.raises(ParameterError, match="learning_rate"):
        pretrain(LoRATransformer(**SMALL), loaders()[0], 1, value)


def test_nothing_to_train_on_is_refused():
    model = LoRATransformer(**SMALL)
    train, validation = loaders()
    cases = {"epochs=0": (train, validation, 0), "at least one batch": ([], validation, 1)}
    for says, (seen, held_out, epochs) in (cases | {"at least one target": (train, [], 1)}).items():
        with pytest.raises(ParameterError, match=says):
            LoRATrainer(model, seen, held_out, 1e-2).train(epochs)


# figure


def test_the_figure_shows_the_history_with_labelled_axes():
    trainer = LoRATrainer(LoRATransformer(**SMALL), *loaders(), learning_rate=1e-2)
    with pytest.raises(ParameterError, match="train"):
        trainer.plot_training_history()
    trainer.train(3)
    figure = trainer.plot_training_history()
    (axes,) = figure.axes
    assert axes.get_xlabel() == "epochs" and axes.get_ylabel() == "loss (nats per token)"
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert lines["training (mean of an epoch)"] == trainer.history["train_loss"]
    assert lines["validation"] == [trainer.initial_val_loss, *trainer.history["val_loss"]]
    assert set(lines) == {text.get_text() for text in axes.get_legend().get_texts()}
