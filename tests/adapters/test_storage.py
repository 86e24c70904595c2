"""Adapter files of our own side: what is saved comes back, and a failure leaves nothing behind."""

from __future__ import annotations

import json
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from small_models import bits, logits, perturb, same_bits

from lorakit.adapters import (
    adapter_bytes,
    adapter_state,
    attach,
    export,
    load_adapter,
    load_adapter_state,
    merge,
    save_adapter,
)
from lorakit.adapters.peft_format import adapts_more
from lorakit.adapters.saving import save_pretrained
from lorakit.adapters.storage import described
from lorakit.errors import CheckpointError, LorakitError, ParameterError


def trained(build, method="lora", kind="bert"):
    return perturb(attach(build(kind), method, seed=0))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("method", ["lora", "head", "full"])
@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_saved_comes_back(build, tmp_path, method, bare, kind):
    model, other = trained(build, method, kind), build(kind)
    folder = save_adapter(model, tmp_path / "deep" / "adapter")
    assert names(tmp_path / "deep") == ["adapter"]  # no temporary folder stays
    assert not torch.equal(logits(other), logits(model))
    state = torch.get_rng_state()
    load_adapter(other if bare else attach(other, method, seed=1), folder)
    assert torch.equal(logits(other), logits(model))
    assert not bare or torch.equal(torch.get_rng_state(), state)
    sides = ({n for n, p in side.named_parameters() if p.requires_grad} for side in (other, model))
    assert next(sides) == next(sides)


def test_head_and_full_files_are_clearly_ours(build, tmp_path):
    folder = save_adapter(trained(build, "head"), tmp_path / "head")
    assert names(folder) == ["lorakit_config.json", "lorakit_trained.safetensors"]
    config = json.loads((folder / "lorakit_config.json").read_text())
    assert config == {"format": "lorakit", "version": 1, "method": "head", "trained": ["classifier"]}


SAYS = [
    ("bert", {"method": "head"}, (None, 2)),
    ("bert", {"method": "full"}, (None, None)),
    ("bert", {}, ("classify", 2)),
    ("bert", {"trainable": ()}, (None, None)),
    ("bert", {"trainable": ["LayerNorm"]}, (None, None)),  # whose weights are no matrices
    ("gpt2", {}, ("causal", None)),
]


@pytest.mark.parametrize(("model", "given", "says"), SAYS)
def test_a_file_says_of_what_base_and_kind_its_model_is_and_how_many_labels_it_has(build, tmp_path, model, given, says):
    for name in ("", "some/base"):
        base = build(model)
        base.config.name_or_path = name
        folder = save_adapter(attach(base, **given), tmp_path / "adapter")
        assert described(folder) == (None if "method" in given else name or None, *says)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    assert described(folder)[1:] == (says[0], None)


def test_the_labels_of_a_head_of_two_layers_are_its_last_ones(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import RobertaConfig, RobertaForSequenceClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    base = RobertaForSequenceClassification(RobertaConfig(vocab_size=30, num_labels=3, **sizes))
    get_peft_model(base, LoraConfig(r=2, task_type="SEQ_CLS")).save_pretrained(tmp_path)
    assert described(tmp_path)[1:] == ("classify", 3)


def test_a_whole_model_is_not_written_over(build, tmp_path):
    build("bert").save_pretrained(tmp_path / "base"), build("bert").config.save_pretrained(tmp_path / "own")
    model, weights = trained(build), tmp_path / "base" / "model.safetensors"
    before = weights.read_bytes()
    for _ in range(2):  # over an adapter of ours
        model.save_pretrained(tmp_path / "own")
        with pytest.raises(ParameterError, match="save_directory='.*base': holds a whole model"):
            model.save_pretrained(tmp_path / "base")
        save_adapter(model, tmp_path / "base")
    assert weights.read_bytes() == before


def test_an_adapter_of_convolutions_is_more_than_linear_maps():
    assert adapts_more({"layer.lora_A.weight": torch.zeros(2, 3, 1)})
    assert not adapts_more({"layer.lora_A.weight": torch.zeros(2, 3), "norm.weight": torch.zeros(2, 3, 1)})


@pytest.mark.parametrize("method", ["lora", "head", "full"])
def test_adapter_bytes_is_the_file_without_its_header(build, tmp_path, method):
    model = trained(build, method)
    file = next(save_adapter(model, tmp_path / "adapter").glob("*.safetensors"))
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size - header == adapter_bytes(model)


def test_saving_over_keeps_other_files_and_drops_the_old_adapter(build, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    save_adapter(trained(build, "head"), tmp_path)
    save_adapter(trained(build), tmp_path)
    assert names(tmp_path) == ["adapter_config.json", "adapter_model.safetensors", "notes.txt"]


def test_a_failed_save_keeps_the_old_adapter_and_leaves_nothing_else(build, tmp_path, monkeypatch):
    old = trained(build)
    save_adapter(old, tmp_path / "adapter")
    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", lambda *_, **__: 1 / 0)  # after the tensors are written
        for name in ("adapter", "new"):
            with pytest.raises(ZeroDivisionError):
                save_adapter(perturb(trained(build)), tmp_path / name)
    assert names(tmp_path) == ["adapter"]
    assert torch.equal(logits(load_adapter(build("bert"), tmp_path / "adapter")), logits(old))


def test_a_folder_below_a_read_only_one_is_saved_into(build, tmp_path, monkeypatch):
    mount, make = tmp_path / "mount", tempfile.mkdtemp
    mount.mkdir()

    def guarded(dir, **options):
        if Path(dir) == tmp_path:
            raise PermissionError(f"read-only: {dir}")
        return make(dir=dir, **options)

    monkeypatch.setattr(tempfile, "mkdtemp", guarded)
    model = trained(build)
    for _ in range(2):
        save_adapter(model, mount)
        assert names(mount) == ["adapter_config.json", "adapter_model.safetensors"]
    assert torch.equal(logits(load_adapter(build("bert"), mount)), logits(model))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("method", ["lora", "hira"])
def test_both_names_of_a_tied_weight_in_trainable_come_back(build, tmp_path, method, packed):
    model = perturb(attach(build("gpt2"), method, seed=0, trainable=["wte", "lm_head"]))
    folder = save_adapter(model, tmp_path / "adapter", packed=packed)
    for other in (build("gpt2"), attach(build("gpt2"), method, trainable=["wte", "lm_head"])):
        assert torch.equal(logits(load_adapter(other, folder)), logits(model))
        assert other.lm_head.weight is other.transformer.wte.weight
    if packed:
        return
    from peft import PeftModel

    torch.testing.assert_close(logits(PeftModel.from_pretrained(build("gpt2"), folder)), logits(model))
    edit(folder, lambda tensors: tensors.pop("base_model.model.lm_head.weight"))  # as older versions stored it
    assert torch.equal(logits(load_adapter(build("gpt2"), folder)), logits(model))
    edit(folder, lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.zeros(99, 32)}))
    refused(build("gpt2"), folder, r"lm_head\.weight and transformer\.wte\.weight differ in the file")


# --- files that do not fit -------------------------------------------------------------------------------------------


def refused(model, folder, match):
    """Loading raises, and the model is what it was."""
    before, flags = bits(model), {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(CheckpointError, match=match) as error:
        load_adapter(model, folder)
    assert str(folder) in str(error.value)
    assert same_bits(model, before) and {name: p.requires_grad for name, p in model.named_parameters()} == flags


@pytest.mark.parametrize(
    ("saved", "kind", "base", "attached", "message"),
    [
        (
            "lora",
            "bert",
            {"hidden_size": 48},
            None,
            r"bert\.\S+\.lora_A\.weight is \(8, 32\), this model has \(8, 48\)",
        ),
        ("lora", "bert", {"hidden_size": 48}, {}, r"bert\.\S+\.lora_A\.weight is \(8, 32\), this model has \(8, 48\)"),
        ("lora", "gpt2", {}, None, r"bert\.encoder\.\S+\.lora_B\.weight \(32, 8\): this model has no linear bert\."),
        ("head", "gpt2", {}, None, "this model has no module classifier"),
        ("lora", "bert", {"num_labels": 5}, None, r"classifier\.weight is \(2, 32\), this model has \(5, 32\)"),
        ("lora", "bert", {}, {"rank": 4}, r"is \(8, 32\), this model has \(4, 32\)"),
        ("lora", "bert", {}, {"alpha": 8}, "alpha=16"),
        ("lora", "bert", {}, {"rslora": True}, "rslora=False"),
        ("lora", "bert", {}, {"target_modules": ["query"]}, "unexpected tensors: bert"),
        ("lora", "bert", {}, {"trainable": ()}, "unexpected tensors: classifier"),
        ("lora", "bert", {}, {"method": "head"}, "holds method 'lora', but 'head' is attached"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(build, tmp_path, saved, kind, base, attached, message):
    folder = save_adapter(trained(build, saved), tmp_path / "adapter")
    model = build(kind, **base)
    refused(model if attached is None else attach(model, **attached), folder, message)


def test_an_adapter_of_fewer_layers_is_refused_by_an_attached_one(build, tmp_path):
    model = perturb(attach(build("bert"), target_modules=["query"], seed=0))
    folder = save_adapter(model, tmp_path / "adapter")
    refused(attach(build("bert"), target_modules=["query", "value"]), folder, r"missing tensors: bert\S+value\.lora_A")


@pytest.mark.parametrize(("alpha", "written"), [(16, "16"), (16.0, "16"), (2.5, "2.5")])
def test_a_whole_alpha_is_a_whole_number_in_pefts_file(build, tmp_path, alpha, written):
    folder = save_adapter(attach(build("bert"), alpha=alpha), tmp_path / "adapter")
    assert f'"lora_alpha": {written},' in (folder / "adapter_config.json").read_text()


def edit(folder, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def test_missing_and_unexpected_tensors_are_named(build, tmp_path):
    norm = "base_model.model.bert.embeddings.LayerNorm.lora_A.weight"
    folder = save_adapter(trained(build), tmp_path / "adapter")
    edit(folder, lambda tensors: tensors.update({norm: torch.zeros(8, 32)}))
    refused(build("bert"), folder, r"LayerNorm.lora_A.weight \(8, 32\): this model has no linear bert.*LayerNorm")
    edit(folder, lambda tensors: (tensors.pop(norm), tensors.update(extra=torch.zeros(1))))
    refused(build("bert"), folder, "1 unexpected tensors: extra")
    query = "bert.encoder.layer.0.attention.self.query"
    edit(folder, lambda tensors: (tensors.pop("extra"), tensors.pop(f"base_model.model.{query}.lora_B.weight")))
    refused(build("bert"), folder, rf"1 missing tensors: {query}\.lora_B\.weight")


def test_damaged_files_are_refused(build, tmp_path):
    refused(build("bert"), tmp_path / "absent", "no adapter here")
    folder = save_adapter(trained(build), tmp_path / "adapter")
    tensors, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(whole := config.read_text()) | {"r": 0}))
    refused(build("bert"), folder, "rank=0")
    config.write_text(whole)
    tensors.write_bytes(tensors.read_bytes()[:-100])
    refused(build("bert"), folder, "adapter_model.safetensors is damaged")
    tensors.unlink()
    refused(build("bert"), folder, "adapter_model.safetensors is missing")
    config.write_text("{")
    refused(build("bert"), folder, "not JSON")
    config.write_text("[]")
    refused(build("bert"), folder, "the whole: Input should be a valid dictionary")


def test_merged_is_neither_saved_nor_loaded(build, tmp_path):
    model = trained(build)
    folder, state = save_adapter(model, tmp_path / "adapter"), adapter_state(model)
    merge(model)
    refused(model, folder, "unmerge")
    for call in (lambda: save_adapter(model, tmp_path / "new"), lambda: adapter_state(model)):
        with pytest.raises(CheckpointError, match="unmerge"):
            call()
    with pytest.raises(CheckpointError, match="unmerge"):
        load_adapter_state(model, state)
    assert names(tmp_path) == ["adapter"]


def test_a_bare_model_has_nothing_to_save_and_a_file_is_no_folder(build, tmp_path):
    with pytest.raises(LorakitError, match="no adapter; call attach"):
        save_adapter(build("bert"), tmp_path / "adapter")
    (tmp_path / "adapter").write_text("")
    for write, message in ((save_adapter, "is a file"), (export, "is not a folder")):
        with pytest.raises(ParameterError, match=f"folder='{tmp_path}/adapter': {message}"):
            write(trained(build), tmp_path / "adapter")


def test_a_state_is_loaded_whole_or_not_at_all(build):
    model = trained(build)
    before, state = logits(model), adapter_state(perturb(trained(build)))
    state["classifier.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"classifier\.bias is \(3,\), this model has \(2,\)"):
        load_adapter_state(model, state)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_names_beyond_ascii_and_weights_that_lie_across_are_stored(tmp_path, method):
    def build(value):
        torch.manual_seed(value)
        model = torch.nn.ModuleDict({"tête": torch.nn.Linear(3, 3)})
        model["tête"].weight = torch.nn.Parameter(torch.arange(9.0).view(3, 3).T * value)
        return model

    model = perturb(attach(build(1), method, trainable=(), seed=0))
    save_pretrained(model, tmp_path)
    loaded = load_adapter(build(2 if method == "full" else 1), tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), model.parameters(), strict=True))


class Normed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.first(x))


@pytest.mark.parametrize("given", [{}, {"method": "peft", "peft_type": "LORA"}], ids=["ours", "PEFT's"])
@pytest.mark.parametrize("how", ["train", "eval", "trainable"])
def test_statistics_that_no_adapter_file_holds_are_told_of(tmp_path, given, how):
    torch.manual_seed(0)
    model = attach(Normed(), trainable=["norm"] if how == "trainable" else (), seed=0, **given).train()
    if how == "eval":
        next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm1d)).eval()
    model(torch.randn(8, 4))
    told = (
        pytest.warns(UserWarning, match="^norm: running statistics of 1 frozen layers")
        if how == "train"
        else nullcontext()
    )
    with told:
        save_adapter(model, tmp_path / "a")
    if how != "train":
        torch.manual_seed(0)
        again, x = load_adapter(Normed(), tmp_path / "a").eval(), torch.randn(3, 4)
        torch.testing.assert_close(again(x), model.eval()(x))
