"""What others load: an exported model, `save_pretrained` and a plain Trainer's checkpoints of an adapted one."""

from __future__ import annotations

import json

import pytest
import torch
from small_models import trained_tensors
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments

from lorakit import cli, records
from lorakit.adapters import attach, detach, export, load_adapter, merge, merged, quantize_nf4, save_adapter, unmerge
from lorakit.adapters.storage import described
from lorakit.analysis import figures, style
from lorakit.errors import LorakitError, ParameterError

AUTO = {"tiny_bert": AutoModelForSequenceClassification, "tiny_gpt2": AutoModelForCausalLM}
AUTO |= {"untied": AutoModelForCausalLM}


def logits(model):
    ids = torch.randint(3, 99, (4, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def twin(build, **overrides):
    torch.manual_seed(7)
    return build(**overrides)


def perturbed(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in trained_tensors(model).values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model


WHOLE = [
    ("tiny_bert", {}),
    ("tiny_bert", {"method": "hira"}),
    ("tiny_bert", {"method": "head"}),
    ("tiny_bert", {"method": "peft", "peft_type": "DORA"}),
    ("tiny_bert", {"method": "peft", "peft_type": "IA3"}),
    ("tiny_gpt2", {}),
    ("tiny_gpt2", {"target_modules": ["c_attn", "lm_head"]}),  # tied to the embedding until merged
    ("tiny_gpt2", {"method": "full"}),
    ("untied", {"method": "full"}),
]


@pytest.fixture
def untied(tiny_gpt2):
    return lambda: tiny_gpt2(tie_word_embeddings=False)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(("build", "options"), WHOLE)
def test_exported_is_a_plain_model(request, tmp_path, build, options, before):
    options = options | ({"target_modules": ["query", "dense"]} if options.get("peft_type") == "IA3" else {})
    model = perturbed(attach(twin(request.getfixturevalue(build)), seed=0, **options))
    expected = logits(model)
    (merge if before else unmerge)(model)
    modules, config = list(model.modules()), model.config.to_dict()
    (tmp_path / "whole").mkdir()  # it may be there, and empty
    plain, info = AUTO[build].from_pretrained(export(model, tmp_path / "whole"), output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(logits(plain), expected, atol=1e-5, rtol=1e-5)
    assert list(model.modules()) == modules and torch.allclose(logits(unmerge(model)), expected, atol=1e-5)
    assert model.config.tie_word_embeddings == config["tie_word_embeddings"]
    assert ("save_pretrained" in vars(model)) is (options.get("method", "lora") in ("lora", "hira"))
    with pytest.raises(ParameterError, match="not empty"):
        export(model, tmp_path / "whole")


def test_four_bits_are_exported_dense(tiny_bert, tmp_path):
    model = perturbed(attach(quantize_nf4(twin(tiny_bert), compute_dtype="fp32"), target_modules=["query"], seed=0))
    expected = logits(model)
    modules, model.hf_quantizer = list(model.modules()), (quantizer := object())  # as after transformers' own loading
    model.config.quantization_config = {"load_in_4bit": True}
    plain = AUTO["tiny_bert"].from_pretrained(export(model, tmp_path / "whole"))
    torch.testing.assert_close(logits(plain), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(model), expected)
    assert list(model.modules()) == modules  # still in 4 bits, and known as such
    assert (model.hf_quantizer, model.config.quantization_config) == (quantizer, {"load_in_4bit": True})
    assert not hasattr(plain.config, "quantization_config")


@pytest.mark.parametrize("build", ["tiny_bert", "tiny_gpt2"])
@pytest.mark.parametrize("method", ["lora", "hira"])
def test_save_pretrained_is_an_adapter_that_peft_loads_and_merged_a_plain_model(request, tmp_path, build, method):
    from peft import PeftModel

    build, auto = request.getfixturevalue(build), AUTO[build]
    model = perturbed(attach(twin(build), method, seed=0))
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    for loaded in (PeftModel.from_pretrained, load_adapter):
        torch.testing.assert_close(logits(loaded(twin(build), tmp_path / "adapter")), expected, atol=1e-5, rtol=1e-5)
    merge(model).save_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits(auto.from_pretrained(tmp_path / "whole")), expected, atol=1e-5, rtol=1e-5)
    detach(model).save_pretrained(tmp_path / "detached")  # transformers' own again
    assert torch.equal(logits(auto.from_pretrained(tmp_path / "detached")), logits(model))


@pytest.mark.parametrize("doing", [lambda m: m.state_dict(), lambda m: m.load_state_dict(m.lorakit_state)])
def test_a_merged_state_dict_is_refused(tiny_bert, doing):
    model = attach(tiny_bert())
    vars(model)["lorakit_state"] = model.state_dict()
    with pytest.raises(LorakitError, match=r"unmerge\(model\).*lorakit\.export"):
        doing(merge(model))


@pytest.mark.parametrize("options", [{}, {"method": "hira"}, {"method": "peft", "peft_type": "LORA"}])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_merges_no_nan(tiny_bert, tmp_path, options, value):
    model = attach(tiny_bert(), **options)
    with torch.no_grad():
        next(p for name, p in reversed(list(model.named_parameters())) if "_B" in name)[0, 0] = value
    for unsafe in (lambda: merge(model, safe=True), lambda: export(model, tmp_path / "whole")):
        with pytest.raises(LorakitError, match="NaN or infinite"):
            unsafe()
        assert not model.lorakit_attachment.is_merged(model) and not list(tmp_path.iterdir())
    with merged(model):
        merge(model)


def test_a_model_without_save_pretrained_is_refused(tmp_path):
    model = attach(torch.nn.Sequential(torch.nn.Linear(4, 4)), trainable=())
    assert not hasattr(model, "save_pretrained")
    with pytest.raises(ParameterError, match="no transformers model"):
        export(model, tmp_path / "whole")
    assert not list(tmp_path.iterdir())


# --- the plain Trainer ----------------------------------------------------------------------------------------------


def trainer(model, folder, steps, **options):
    rows = [{"input_ids": [3 + i, 7, 9, 11 + i], "labels": [3 + i, 7, 9, 11 + i]} for i in range(8)]
    arguments = {"per_device_train_batch_size": 2, "save_steps": 2, "report_to": [], "use_cpu": True, "seed": 1}
    arguments |= {"output_dir": str(folder), "max_steps": steps, "learning_rate": 1e-2, "disable_tqdm": True}
    return Trainer(model, TrainingArguments(**(arguments | options)), train_dataset=rows)


TIED = [
    {},
    {"target_modules": ["c_attn", "lm_head"]},
    {"trainable": ["wte", "lm_head"]},
    {"method": "hira"},
    {"method": "peft", "peft_type": "LORA"},
]


@pytest.mark.parametrize("options", TIED)
def test_a_plain_trainer_saves_and_resumes(tiny_gpt2, tmp_path, options):
    def build():
        return attach(twin(tiny_gpt2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), seed=0, **options)

    whole, resumed = build(), build()
    trainer(whole, tmp_path / "a", 4).train()
    trainer(resumed, tmp_path / "a", 4).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert torch.equal(logits(resumed), logits(whole))
    trainer(whole, tmp_path / "b", 4).save_model()
    for folder in (tmp_path / "a" / "checkpoint-4", tmp_path / "b"):
        assert torch.equal(logits(load_adapter(twin(tiny_gpt2), folder)), logits(whole))


# --- the command line -----------------------------------------------------------------------------------------------


def test_the_command_line_merges(tmp_path, capsys):
    from lorakit import models

    loaded = models.load("toy-encoder", "classify", num_labels=3)
    model = perturbed(attach(loaded.model, seed=0))
    adapter = str(save_adapter(model, tmp_path / "adapter"))
    assert cli.main(["export", adapter, "--merge", "--base", "toy-encoder", "--output", str(tmp_path / "whole")]) == 0
    plain = models.load(str(tmp_path / "whole"), "classify", num_labels=3).model
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-5, rtol=1e-5)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    capsys.readouterr()
    for argv, message in (
        ([adapter], "give --base"),
        ([str(tmp_path / "absent")], "no such folder"),
        ([adapter, "--base", "toy-encoder", "--output", adapter], "not empty"),
    ):
        assert cli.main(["export", *argv, "--merge"]) == 2
        assert message in capsys.readouterr().err


def test_a_tilde_is_the_users_folder_by_every_door(tiny_bert, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model = attach(tiny_bert(), seed=0)
    assert save_adapter(model, "~/adapter") == tmp_path / "adapter"
    load_adapter(attach(tiny_bert(), seed=1), "~/adapter")
    assert described("~/adapter") == (None, "classify", 2)
    export(model, "~/whole")
    run = records.Record(setting="s", method="lora", seed=0, status="done")
    assert records.write(run, "~/r/s0.json") == tmp_path / "r" / "s0.json"
    assert records.read("~/r/s0.json") == run and records.read_all("~/r") == [run]
    style.save(figures.overview([run]), "~/r/s0.png")
    names = {path.name for path in tmp_path.iterdir()}
    assert {"adapter", "r", "whole"} <= names and "~" not in names
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["s0.json", "s0.png"]
