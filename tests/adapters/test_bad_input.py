"""Bad input to `attach`: the error names parameter, value and what is allowed, and the model is as it was."""

from __future__ import annotations

import pytest
from torch import nn

from lorakit.adapters import attach, detach, merge, unmerge
from lorakit.errors import LorakitError, ParameterError

BAD = [
    ({"rank": 0}, "rank=0: Input should be greater than or equal to 1"),
    ({"rank": -3}, "rank=-3"), ({"rank": 2.5}, "rank=2.5"), ({"rank": True}, "rank=True"), ({"alpha": 0}, "alpha=0"),
    ({"alpha": float("nan")}, "alpha=nan"), ({"alpha": "16"}, "alpha='16'"), ({"dropout": 1.0}, "dropout=1.0"),
    ({"dropout": -0.1}, "dropout=-0.1"), ({"rslora": 1}, "rslora=1"),
    ({"init": "orthogonal"}, "init='orthogonal': Input should be 'kaiming' or 'gaussian'"),
    ({"method": "lore"}, "method='lore': unknown method; known are lora, hira, sparse, peft, head, full"),
    ({"target_modules": ["quary"]}, "'quary' matches no module.*layers are query, key, value, dense, classifier"),
    ({"target_modules": ["query", "quary"]}, "'quary' matches no module"),
    ({"target_modules": "query"}, "a string is a regular expression"),
    ({"target_modules": ["uery"]}, "'uery' matches no module"),  # names end at a dot
    ({"target_modules": r".*self\.quer"}, "matches no linear layer"),  # a pattern matches the whole path
    ({"target_modules": ".*["}, "not a regular expression"), ({"target_modules": []}, "matches no linear layer"),
    ({"target_modules": None}, "target_modules=None: Input should be"), ({"trainable": 3}, "trainable=3"),
    ({"target_modules": ["LayerNorm"]}, "LayerNorm is a LayerNorm, not a linear layer"),
    ({"target_modules": ["classifier"]}, "matches no linear layer outside the modules trained in full"),
    ({"trainable": "classifier"}, "trainable='classifier': must be \"head\", a list"),
    ({"trainable": ["klassifier"]}, "'klassifier' matches no module.*classifier"),
    ({"method": "head", "trainable": ()}, "no trainable parameters"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "message"), BAD)
def test_refused_by_name_with_the_model_unchanged(tiny_bert, given, message):
    model = tiny_bert()
    modules = list(model.modules())
    with pytest.raises(ParameterError, match=message):
        attach(model, **given)
    assert list(model.modules()) == modules
    assert all(p.requires_grad for p in model.parameters())
    attach(model)  # nothing stands in the way of a right call


def test_attaching_twice_is_refused(tiny_bert):
    model = attach(tiny_bert())
    with pytest.raises(ParameterError, match=r"already has 'lora'; detach\(model\) first"):
        attach(model, "full")
    attach(detach(model), "full")


@pytest.mark.parametrize("call", [detach, merge, unmerge])
def test_a_bare_model_is_refused(tiny_bert, call):
    with pytest.raises(LorakitError, match="this BertForSequenceClassification has no adapter"):
        call(tiny_bert())


def test_a_module_without_a_head_needs_a_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ParameterError, match="no trainable parameters"):
        attach(model, "head")
    assert attach(model, "head", trainable=["2"])[2].weight.requires_grad
    with pytest.raises(ParameterError, match="linear layers are 0, 2"):
        attach(detach(model), target_modules=["1"])


@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        (lambda gpt2: nn.Linear(2, 2), {}, "linear layers are none"),
        (lambda gpt2: nn.ReLU(), {"method": "full"}, "no trainable parameters"),
        (lambda gpt2: gpt2(), {"method": "head", "trainable": ()}, "no trainable parameters"),
        (lambda gpt2: gpt2(), {"trainable": ["lm_head"]}, "shares its weight with the frozen transformer.wte.weight"),
    ],
)
def test_nothing_to_adapt_or_to_train_is_refused(tiny_gpt2, make, given, message):
    with pytest.raises(ParameterError, match=message):
        attach(make(tiny_gpt2), **given)
