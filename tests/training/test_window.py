"""A window's gradients over processes, and whether any come to be: small cases by hand."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
import training_runs as runs
from torch import nn
from transformers import PretrainedConfig

from lorakit.adapters import attach
from lorakit.errors import ParameterError
from lorakit.gates.log import GateLog, GateWarning
from lorakit.seams import AlwaysOpen
from lorakit.training.window import GRADIENTS_BY, Diverged, Watch, average_gradients, leaves_layers_out


def test_gradients_are_averaged_with_zeros_where_a_process_has_none():
    """Of three trained weights: both processes have the first's, the other one alone the second's, none the third's."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in ((2, 2), (2,), (1,), (1,))])
    model[3].requires_grad_(False)
    mine = model[0].grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    other, asked = torch.tensor([1.0, 1.0, 0.0, 3.0, 2.0, 1.0, 0.0, 8.0, 6.0, 0.0]), []

    def reduce(flat, how):
        asked.append(how)
        return (flat + other) / 2

    average_gradients(model, SimpleNamespace(num_processes=2, device="cpu", reduce=reduce))
    assert asked == ["mean"] and model[0].grad is mine
    assert mine.tolist() == [[2.0, 2.0], [2.0, 2.0]] and model[1].grad.tolist() == [4.0, 3.0]
    assert model[2].grad is None and model[3].grad is None


@pytest.mark.parametrize(
    ("numbers", "leaves"),
    [({"layerdrop": 0.1}, True), ({"encoder_layerdrop": 0.0}, False), ({"num_experts": 8}, True),
     ({"experts": "all"}, False), ({"text": {"n_routed_experts": 2}}, True), ({"hidden_size": 8}, False)],
)  # fmt: skip
def test_a_configuration_says_whether_layers_may_be_left_out(numbers, leaves):
    assert leaves_layers_out(SimpleNamespace(config=PretrainedConfig(**numbers))) == leaves


def watch():
    model = attach(runs.tiny_bert(num_hidden_layers=1), "lora", target_modules=["query", "key"], seed=0)
    model.zero_grad()
    watched = Watch(model, GateLog(AlwaysOpen()))
    return watched, {path.split(".")[-1]: module for path, module in model.named_modules() if path in watched.layers}


def reached(layer) -> None:
    for parameter in layer.adapter_parameters().values():
        parameter.grad = torch.ones_like(parameter)


def test_two_thousand_windows_in_a_row_without_a_backward_end_a_run():
    watched, _ = watch()
    for trained in [False] * 1999 + [True] + [False] * 1999:
        watched.window(trained)
    with pytest.raises(Diverged, match="^2000 batches in a row had no label or were rejected .gate 'none'."):
        watched.window(False)


def test_a_loss_that_is_none_is_named():
    watched, _ = watch()
    watched.finite(0.0, 3)
    with pytest.raises(Diverged, match="training loss is inf at step 3"):
        watched.finite(1.0, 3, float("inf"))


def told(watched, windows: int) -> list[str]:
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        for _ in range(windows):
            watched.gradients()
    assert all(warning.category is GateWarning for warning in given)
    return [str(warning.message)[:40] for warning in given]


def test_adapters_that_no_gradient_reaches_are_told_of_in_the_third_window():
    assert GRADIENTS_BY == 3
    watched, layers = watch()
    assert told(watched, 2) == []
    assert told(watched, 3) == ["no gradient reached an adapter in the fi"]  # none has one: it is not of a layer
    watched, layers = watch()
    reached(layers["key"])
    assert told(watched, 2) == [] and told(watched, 3) == ["target_modules: no gradient reached 1 ad"]
    watched, layers = watch()
    assert told(watched, 2) == []
    for layer in layers.values():
        reached(layer)
    assert told(watched, 3) == [] and watched.adapted == []


def test_an_adapter_that_is_skipped_or_not_trained_need_not_have_one():
    for active, refused in ((True, True), (False, False)):
        watched, layers = watch()
        watched.refuses = True
        layers["query"].probe = SimpleNamespace(active=active)
        reached(layers["key"])
        if refused:
            with pytest.raises(
                ParameterError, match="^target_modules='.*query': no gradient reached 1 adapters by step 1"
            ):
                watched.gradients()
        else:
            assert told(watched, 3) == []
    watched, layers = watch()
    watched.refuses = True
    layers["query"].requires_grad_(False)
    reached(layers["key"])
    assert told(watched, 3) == []
    watched, layers = watch()
    watched.refuses = True
    assert told(watched, 1) == []  # of all of them none has one
    reached(layers["key"])
    assert told(watched, 3) == []  # and later ones are not looked at so
