"""`torch.compile`: a whole graph, and a compiled model is as good as the one inside; and one adapter at a time."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from lorakit.adapters import (
    adapter_state,
    attach,
    compact,
    detach,
    export,
    load_adapter,
    load_adapter_state,
    merge,
    quantize_nf4,
    save_adapter,
    unmerge,
)
from lorakit.errors import CheckpointError, ParameterError

IDS = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("method", ["lora", "hira"])
@pytest.mark.parametrize("build", ["tiny_bert", "tiny_gpt2"])
def test_the_graph_is_whole(request, build, method, dropout):
    torch._dynamo.reset()
    model = attach(request.getfixturevalue(build)().eval(), method, seed=0, dropout=dropout)
    expected = model(input_ids=IDS).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input_ids=IDS).logits, expected, atol=1e-5, rtol=1e-5)
    torch.compile(model.train(), fullgraph=True, backend="aot_eager")(input_ids=IDS).logits.sum().backward()


def test_a_compiled_model_is_the_one_inside(tiny_bert, tmp_path):
    bare = torch.compile(tiny_bert(), backend="eager")
    model = attach(bare, seed=0)
    assert model is bare and attach(detach(model), seed=0) is bare
    names = adapter_state(model).keys()
    assert names == adapter_state(attach(tiny_bert(), seed=0)).keys()
    load_adapter_state(model, adapter_state(model))
    loaded = load_adapter(tiny_bert(), save_adapter(model, tmp_path / "adapter"))
    assert adapter_state(loaded).keys() == names
    again = torch.compile(tiny_bert(), backend="eager")
    assert load_adapter(again, tmp_path / "adapter") is again
    export(merge(model), tmp_path / "whole")
    assert compact(unmerge(model)) is model
    quantized = torch.compile(tiny_bert(), backend="eager")
    assert quantize_nf4(quantized) is quantized


# --- one adapter at a time ------------------------------------------------------------------------------------------


def below(model):
    attach(model.bert, trainable=())
    return model


def above(model):
    return attach(model).bert


def head_below(model):
    attach(model.bert, "head", trainable=["pooler"])
    return model


def pefts(model):
    return get_peft_model(model, LoraConfig(target_modules=["query"]))


def in_pefts(model):
    return pefts(model).get_base_model()


def prompts(model):
    return get_peft_model(model, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))


def in_ours_of_peft(model):
    return attach(model, "peft", peft_type="LORA").get_base_model()


@pytest.mark.parametrize("given", [{}, {"method": "head"}, {"method": "full"}, {"method": "peft", "peft_type": "LORA"}])
@pytest.mark.parametrize("present", [below, above, head_below, pefts, in_pefts, prompts, in_ours_of_peft])
def test_a_second_adapter_is_refused(tiny_bert, tmp_path, present, given):
    save_adapter(attach(tiny_bert()), tmp_path)
    whole = tiny_bert()
    model = present(whole)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ParameterError, match=r"already has (an|PEFT's) adapter; (detach\(…\)|unload\(\)) it first"):
        attach(model, **given, **({"trainable": ["pooler"]} if present is above else {}))
    with pytest.raises(CheckpointError, match="already has"):
        load_adapter(model, tmp_path)
    assert [p.requires_grad for p in model.parameters()] == flags
