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


@pytest.mark.parametrize(
    ("build", "method", "dropout"),
    [("tiny_bert", "lora", 0.1), ("tiny_bert", "hira", 0.0), ("tiny_gpt2", "lora", 0.0), ("tiny_gpt2", "hira", 0.1)],
)
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


def test_a_part_compiled_by_itself_is_refused_by_name(tiny_bert, tmp_path):
    model = tiny_bert()
    model.bert = torch.compile(model.bert, backend="eager")
    attached = attach(tiny_bert(), seed=0)
    attached.bert.encoder = torch.compile(attached.bert.encoder, backend="eager")
    for path, call in (
        ("bert", lambda: attach(model)),
        ("bert.encoder", lambda: save_adapter(attached, tmp_path / "a")),
        ("bert.encoder", lambda: attached.save_pretrained(tmp_path / "a")),
    ):
        with pytest.raises(ParameterError, match=rf"its {path} is compiled by itself: torch\.compile\(model\), or"):
            call()
    assert not hasattr(model, "lorakit_attachment") and not (tmp_path / "a").exists()
    attached = attach(tiny_bert(), seed=0)
    attached.bert.compile(backend="eager")
    save_adapter(attached, tmp_path / "a")


# --- one adapter at a time ------------------------------------------------------------------------------------------


def below(model):
    attach(model.bert, trainable=())
    return model


def above(model):
    return attach(model).bert


def head_below(model):
    attach(model.bert, "head", trainable=["pooler"])
    return model


def in_full(model):
    return attach(model, "full").bert


def in_a_head(model):
    return attach(model, "head", trainable=["pooler"]).bert.pooler


def pefts(model):
    return get_peft_model(model, LoraConfig(target_modules=["query"]))


def in_pefts(model):
    return pefts(model).get_base_model()


def prompts(model):
    return get_peft_model(model, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))


def in_ours_of_peft(model):
    return attach(model, "peft", peft_type="LORA").get_base_model()


NAMED = {above: "pooler", in_full: "pooler", in_a_head: "dense"}


@pytest.mark.parametrize("given", [{}, {"method": "head"}, {"method": "full"}, {"method": "peft", "peft_type": "LORA"}])
@pytest.mark.parametrize(
    "present", [below, above, head_below, in_full, in_a_head, pefts, in_pefts, prompts, in_ours_of_peft]
)
def test_a_second_adapter_is_refused(tiny_bert, tmp_path, present, given):
    save_adapter(attach(tiny_bert()), tmp_path)
    whole = tiny_bert()
    model = present(whole)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ParameterError, match=r"already has (an|PEFT's) adapter; (detach\(…\)|unload\(\)) it first"):
        attach(model, **given, **({"trainable": [name]} if (name := NAMED.get(present)) else {}))
    with pytest.raises(CheckpointError, match="already has"):
        load_adapter(model, tmp_path)
    assert [p.requires_grad for p in model.parameters()] == flags
