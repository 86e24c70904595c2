"""Adapter files of our own side: what is saved comes back, and a failure leaves nothing behind."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch

from lorakit.adapters import adapter_bytes, adapter_state, attach, load_adapter, load_adapter_state, merge, save_adapter
from lorakit.adapters.attachment import trained_tensors
from lorakit.errors import CheckpointError, LorakitError, ParameterError


def logits(model):
    ids = torch.randint(3, 99, (4, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def twin(build, **overrides):
    torch.manual_seed(7)
    return build(**overrides)


def trained(build, method="lora", **options):
    model = attach(twin(build), method, seed=0, **options)
    with torch.no_grad():
        for tensor in trained_tensors(model).values():
            tensor.add_(0.1 * torch.randn_like(tensor))
    return model


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("method", ["lora", "head", "full"])
@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("kind", ["tiny_bert", "tiny_gpt2"])
def test_saved_comes_back(request, tmp_path, method, bare, kind):
    build = request.getfixturevalue(kind)
    model = trained(build, method)
    folder = save_adapter(model, tmp_path / "deep" / "adapter")
    assert names(tmp_path / "deep") == ["adapter"]  # no temporary folder stays
    other = twin(build)
    assert not torch.equal(logits(other), logits(model))
    load_adapter(other if bare else attach(other, method, seed=1), folder)
    assert torch.equal(logits(other), logits(model))
    assert {n for n, p in other.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_head_and_full_files_are_clearly_ours(tiny_bert, tmp_path):
    folder = save_adapter(trained(tiny_bert, "head"), tmp_path / "head")
    assert names(folder) == ["lorakit_config.json", "lorakit_trained.safetensors"]
    config = json.loads((folder / "lorakit_config.json").read_text())
    assert config == {"format": "lorakit", "version": 1, "method": "head", "trained": ["classifier"]}


@pytest.mark.parametrize("method", ["lora", "head", "full"])
def test_adapter_bytes_is_the_file_without_its_header(tiny_bert, tmp_path, method):
    model = trained(tiny_bert, method)
    file = next(save_adapter(model, tmp_path / "adapter").glob("*.safetensors"))
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size - header == adapter_bytes(model)


def test_saving_over_keeps_other_files_and_drops_the_old_adapter(tiny_bert, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    save_adapter(trained(tiny_bert, "head"), tmp_path)
    save_adapter(trained(tiny_bert), tmp_path)
    assert names(tmp_path) == ["adapter_config.json", "adapter_model.safetensors", "notes.txt"]


def test_a_failed_save_leaves_nothing(tiny_bert, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(json, "dumps", fail)  # after the tensors are written
    with pytest.raises(OSError, match="disk full"):
        save_adapter(trained(tiny_bert), tmp_path / "adapter")
    assert names(tmp_path) == []


def test_a_failed_save_keeps_the_old_adapter(tiny_bert, tmp_path, monkeypatch):
    old = trained(tiny_bert)
    save_adapter(old, tmp_path / "adapter")
    monkeypatch.setattr(json, "dumps", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_adapter(trained(tiny_bert), tmp_path / "adapter")
    assert torch.equal(logits(load_adapter(twin(tiny_bert), tmp_path / "adapter")), logits(old))
    assert names(tmp_path) == ["adapter"]


def test_a_folder_below_a_read_only_one_is_saved_into(tiny_bert, tmp_path, monkeypatch):
    mount, make = tmp_path / "mount", tempfile.mkdtemp
    mount.mkdir()

    def guarded(dir, **options):
        if Path(dir) == tmp_path:
            raise PermissionError(f"read-only: {dir}")
        return make(dir=dir, **options)

    monkeypatch.setattr(tempfile, "mkdtemp", guarded)
    model = trained(tiny_bert)
    for _ in range(2):
        save_adapter(model, mount)
        assert names(mount) == ["adapter_config.json", "adapter_model.safetensors"]
    assert torch.equal(logits(load_adapter(twin(tiny_bert), mount)), logits(model))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("method", ["lora", "hira"])
def test_both_names_of_a_tied_weight_in_trainable_come_back(tiny_gpt2, tmp_path, method, packed):
    model = trained(tiny_gpt2, method, trainable=["wte", "lm_head"])
    folder = save_adapter(model, tmp_path / "adapter", packed=packed)
    for other in (twin(tiny_gpt2), attach(twin(tiny_gpt2), method, trainable=["wte", "lm_head"])):
        assert torch.equal(logits(load_adapter(other, folder)), logits(model))
        assert other.lm_head.weight is other.transformer.wte.weight
    if packed:
        return
    from peft import PeftModel

    torch.testing.assert_close(logits(PeftModel.from_pretrained(twin(tiny_gpt2), folder)), logits(model))
    edit(folder, lambda tensors: tensors.pop("base_model.model.lm_head.weight"))  # as older versions stored it
    assert torch.equal(logits(load_adapter(twin(tiny_gpt2), folder)), logits(model))
    edit(folder, lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.zeros(99, 32)}))
    refused(twin(tiny_gpt2), folder, r"lm_head\.weight and transformer\.wte\.weight differ in the file")


# --- files that do not fit -------------------------------------------------------------------------------------------


def refused(model, folder, match):
    """Loading raises, and the model is what it was."""
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(CheckpointError, match=match) as error:
        load_adapter(model, folder)
    assert str(folder) in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


@pytest.mark.parametrize("bare", [True, False])
def test_another_base_is_refused_naming_tensor_and_shapes(tiny_bert, tmp_path, bare):
    folder = save_adapter(trained(tiny_bert), tmp_path / "adapter")
    wide = tiny_bert(hidden_size=48)
    model = wide if bare else attach(wide)
    refused(model, folder, r"bert\.\S+\.lora_A\.weight is \(8, 32\), this model has \(8, 48\)")


def test_a_base_without_the_layer_is_refused_naming_the_tensor(tiny_bert, tiny_gpt2, tmp_path):
    folder = save_adapter(trained(tiny_bert), tmp_path / "adapter")
    refused(tiny_gpt2(), folder, r"bert\.encoder\.\S+\.lora_B\.weight \(32, 8\): this model has no linear bert\.")
    folder = save_adapter(trained(tiny_bert, "head"), tmp_path / "head")
    refused(tiny_gpt2(), folder, "this model has no module classifier")


def test_another_number_of_classes_is_refused(tiny_bert, tmp_path):
    folder = save_adapter(trained(tiny_bert), tmp_path / "adapter")
    refused(tiny_bert(num_labels=5), folder, r"classifier\.weight is \(2, 32\), this model has \(5, 32\)")


def test_other_settings_than_the_attached_are_refused(tiny_bert, tmp_path):
    folder = save_adapter(trained(tiny_bert), tmp_path / "adapter")
    refused(attach(tiny_bert(), rank=4), folder, r"is \(8, 32\), this model has \(4, 32\)")
    refused(attach(tiny_bert(), alpha=8), folder, "alpha=16")
    refused(attach(tiny_bert(), rslora=True), folder, "rslora=False")
    refused(attach(tiny_bert(), target_modules=["query"]), folder, "unexpected tensors: bert")
    refused(attach(tiny_bert(), trainable=()), folder, "unexpected tensors: classifier")
    refused(attach(tiny_bert(), "head"), folder, "holds method 'lora', but 'head' is attached")


def edit(folder, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def test_missing_and_unexpected_tensors_are_named(tiny_bert, tmp_path):
    folder = save_adapter(trained(tiny_bert), tmp_path / "adapter")
    edit(folder, lambda tensors: tensors.update(extra=torch.zeros(1)))
    refused(tiny_bert(), folder, "1 unexpected tensors: extra")
    query = "bert.encoder.layer.0.attention.self.query"
    edit(folder, lambda tensors: (tensors.pop("extra"), tensors.pop(f"base_model.model.{query}.lora_B.weight")))
    refused(tiny_bert(), folder, rf"1 missing tensors: {query}\.lora_B\.weight")


def test_damaged_files_are_refused(tiny_bert, tmp_path):
    refused(tiny_bert(), tmp_path / "absent", "no adapter here")
    folder = save_adapter(trained(tiny_bert), tmp_path / "adapter")
    tensors = folder / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    refused(tiny_bert(), folder, "adapter_model.safetensors is damaged")
    tensors.unlink()
    refused(tiny_bert(), folder, "adapter_model.safetensors is missing")
    (folder / "adapter_config.json").write_text("{")
    refused(tiny_bert(), folder, "not JSON")
    (folder / "adapter_config.json").write_text("[]")
    refused(tiny_bert(), folder, "not a mapping")


def test_a_setting_out_of_range_in_the_file_is_refused(tiny_bert, tmp_path):
    folder = save_adapter(trained(tiny_bert), tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 0}))
    refused(tiny_bert(), folder, "rank=0")


def test_merged_is_neither_saved_nor_loaded(tiny_bert, tmp_path):
    model = trained(tiny_bert)
    folder, state = save_adapter(model, tmp_path / "adapter"), adapter_state(model)
    merge(model)
    refused(model, folder, "unmerge")
    for call in (lambda: save_adapter(model, tmp_path / "new"), lambda: adapter_state(model)):
        with pytest.raises(CheckpointError, match="unmerge"):
            call()
    with pytest.raises(CheckpointError, match="unmerge"):
        load_adapter_state(model, state)
    assert names(tmp_path) == ["adapter"]


def test_a_bare_model_has_nothing_to_save(tiny_bert, tmp_path):
    with pytest.raises(LorakitError, match="no adapter; call attach"):
        save_adapter(tiny_bert(), tmp_path / "adapter")


def test_a_file_is_no_folder(tiny_bert, tmp_path):
    (tmp_path / "adapter").write_text("")
    with pytest.raises(ParameterError, match="is a file"):
        save_adapter(trained(tiny_bert), tmp_path / "adapter")


def test_a_state_is_loaded_whole_or_not_at_all(tiny_bert):
    model = trained(tiny_bert)
    before, state = logits(model), adapter_state(trained(tiny_bert))
    state["classifier.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"classifier\.bias is \(3,\), this model has \(2,\)"):
        load_adapter_state(model, state)
    assert torch.equal(logits(model), before)
