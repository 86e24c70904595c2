"""What attached adapters refuse, hand over and leave alone, part by part."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext

import pytest
import sparse_models
import torch
from peft_types import attached
from safetensors.torch import load_file, save_file
from torch import nn

from lorakit.adapters import attach, load_adapter, save_adapter
from lorakit.adapters.attach import Attaching, asked_of
from lorakit.adapters.attachment import adapter_layers, can_merge, check_state
from lorakit.adapters.layer import ADAPTERS
from lorakit.adapters.peft import files
from lorakit.adapters.peft.schedule import PeftSchedule
from lorakit.adapters.sparsify import Sparsifier
from lorakit.errors import CheckpointError, LorakitError, ParameterError

model = sparse_models.model


@pytest.mark.parametrize("kind", [list, tuple, set])
def test_targets_may_be_any_collection(tiny_bert, kind):
    adapted = attach(tiny_bert(), target_modules=kind(["query", "value"]))
    assert {path.rpartition(".")[2] for path in adapter_layers(adapted)} == {"query", "value"}


def test_a_base_in_eight_bits_is_not_read(tiny_bert):
    layer = next(iter(adapter_layers(attach(tiny_bert())).values()))
    layer.base_layer.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(LorakitError, match=r"the base weight is torch.int8 \(Linear\), not read here"):
        layer.base_weight()


def test_who_needs_something_between_steps(model):
    assert ADAPTERS["lora"].controllers(model(), None) == []
    sparse = model()
    (sparsifier,) = sparse.lorakit_attachment.controllers(sparse, sparse_models.runs.zeros())
    assert isinstance(sparsifier, Sparsifier)
    wrapper = attached(sparse_models.bare(), "LN_TUNING")
    (schedule,) = wrapper.lorakit_attachment.controllers(wrapper, None)
    assert isinstance(schedule, PeftSchedule) and schedule.state_dict() == {"step": 0}


def test_what_has_no_gradient_is_not_shrunk(model):
    built = model()
    sparsifier = Sparsifier(built, sparse_models.runs.zeros("l1", l1=1e6))
    before = [p.clone() for p in built.parameters()]
    sparsifier.begin()
    sparsifier.after_step(0.5, torch.optim.SGD(built.parameters(), lr=0.1))
    assert all(torch.equal(a, b) for a, b in zip(before, built.parameters(), strict=True))


def test_a_run_asks_for_an_alpha_only_where_it_is_not_the_default():
    assert asked_of(Attaching(rank=16)) == {n: v for n, v in vars(Attaching(rank=16)).items() if n != "alpha"}
    assert asked_of(Attaching(alpha=8.0)) == vars(Attaching(alpha=8.0))


def test_only_the_main_process_saves_and_nobody_pushes(tiny_bert, tmp_path):
    saving = attach(tiny_bert()).save_pretrained
    saving(tmp_path / "other", is_main_process=False)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ParameterError, match="push_to_hub=True"):
        saving(tmp_path, push_to_hub=True)
    saving(tmp_path / "main")
    assert (tmp_path / "main" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"method": "lora"}, "method='lora': .* may hold 'head' or 'full'"), ({"version": 2}, "version=2; this lorakit"),
     ({"format": "other"}, "format='other'"), ({"trained": ["nowhere"]}, "this model has no module nowhere")],
)  # fmt: skip
def test_our_own_file_is_read_as_what_it_says_or_not_at_all(tiny_bert, tmp_path, change, message):
    save_adapter(attach(tiny_bert(), "head"), tmp_path)
    (path,) = tmp_path.glob("*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        load_adapter(tiny_bert(), tmp_path)


LAYERS = ["bert.encoder.layer.0", "bert.encoder.layer.1"]
NORMS = [f"{path}.LayerNorm" for layer in LAYERS for path in (f"{layer}.attention.output", f"{layer}.output")]
NORMS = ["bert.embeddings.LayerNorm", *NORMS]
COMMON = {"rank": 5, "alpha": 3}
CONFIGS = [
    ("bert", "LORA", COMMON, {"r": 5, "lora_alpha": 3, "lora_dropout": 0, "use_rslora": False, "use_dora": False}),
    ("bert", "LORA", {}, {"init_lora_weights": True, "task_type": "SEQ_CLS", "modules_to_save": ["classifier"]}),
    ("bert", "LORA", {"trainable": ()}, {"task_type": None, "modules_to_save": None}),
    ("bert", "lora", {"rslora": True, "init": "gaussian"}, {"use_rslora": True, "init_lora_weights": "gaussian"}),
    ("bert", "RSLORA", {}, {"use_rslora": True, "use_dora": False}),
    ("bert", "LORA", {"peft_options": {"init_lora_weights": False}}, {"init_lora_weights": False}),
    ("gpt2", "DORA", {}, {"use_dora": True, "use_rslora": False, "task_type": "CAUSAL_LM", "modules_to_save": None}),
    ("bert", "ADALORA", COMMON | {"total_steps": 9}, {"target_r": 5, "init_r": 8, "lora_alpha": 3, "total_step": 9}),
    *(("bert", kind, COMMON, {"r": 5, "alpha": 3}) for kind in ("LOHA", "LOKR", "DEFT")),
    ("bert", "GRALORA", {"rank": 4, "alpha": 3}, {"r": 4, "alpha": 3}),
    ("bert", "PSOFT", COMMON, {"r": 5, "psoft_alpha": 3}),
    ("bert", "RANDLORA", COMMON, {"r": 5, "randlora_alpha": 3}),
    ("bert", "VERA", {"rank": 5, "dropout": 0.25}, {"r": 5, "vera_dropout": 0.25}),
    ("bert", "IA3", {"target_modules": ["bert.encoder.layer.0.output.dense"]}, {"feedforward_modules": set()}),
    ("masked", "PROMPT_TUNING", {}, {"num_virtual_tokens": 8, "token_dim": 32, "num_attention_heads": 2}),
    ("gpt2", "ADAPTION_PROMPT", {}, {"adapter_len": 10, "adapter_layers": 2}),
    ("bert", "FROD", {}, {"progressbar": False}),
    ("bert", "SHADOW", {}, {"auxiliary_loss_weight": 0.0, "target_modules": set(LAYERS)}),
    ("bert", "SHADOW", {"target_modules": LAYERS[:1]}, {"target_modules": set(LAYERS[:1])}),
    ("bert", "LN_TUNING", {"target_modules": "All-Linear", "trainable": ()}, {"target_modules": NORMS}),
]


@pytest.mark.parametrize(("kind", "peft_type", "given", "expected"), CONFIGS)
def test_what_a_config_of_peft_is_told(build, monkeypatch, kind, peft_type, given, expected):
    """PEFT's defaults are others; the config is looked at before PEFT changes it."""
    monkeypatch.setattr("lorakit.adapters.peft.method.wrap", lambda _, config, *others: config)
    config = attach(build(kind), "peft", peft_type=peft_type, **given)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize("wanted", [".*LayerNorm", ["LayerNorm"], ("LayerNorm",)])
def test_types_that_act_on_other_modules_name_them(tiny_bert, wanted):
    found = attached(tiny_bert(), "LN_TUNING", target_modules=wanted).peft_config["default"].target_modules
    assert found == (wanted if isinstance(wanted, str) else ["LayerNorm"])


def test_what_peft_does_not_take_from_a_file_is_told(tiny_bert, tmp_path, monkeypatch):
    def refuses(*_):
        raise RuntimeError("size\n   mismatch")

    save_adapter(attached(tiny_bert(), "IA3"), tmp_path)
    tensors = {name: tensor + 1 for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    for stub, message in ((refuses, "does not fit this model: size mismatch"), (lambda *_: None, "PEFT did not take")):
        monkeypatch.setattr("lorakit.adapters.peft.files.set_peft_model_state_dict", stub)
        with pytest.raises(CheckpointError, match=message):
            load_adapter(attached(tiny_bert(), "IA3"), tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "NO_SUCH"}')
    with pytest.raises(CheckpointError, match="PEFT cannot read its config"):
        files.read_config(tmp_path)


@pytest.mark.parametrize("how", ["around", "inside", "ours"])
def test_what_carries_an_adapter_gets_no_second_one(tiny_bert, how):
    from peft import LoraConfig, get_peft_model, inject_adapter_in_model

    bare, config = tiny_bert(), LoraConfig(target_modules=["query"])
    if how == "around":
        carrying, message = get_peft_model(bare, config), "the model already has PEFT's adapter; unload.. it first"
    elif how == "inside":
        inject_adapter_in_model(config, bare)
        carrying, message = bare, "bert.encoder.*query already has PEFT's adapter; unload.. it first"
    else:
        carrying, message = nn.Sequential(attach(bare)), r"0 already has an adapter; detach\(…\) it first"
    for method in ("lora", "head", "peft"):
        with pytest.raises(ParameterError, match=message):
            attach(carrying, method)


def test_where_peft_was_never_imported_nothing_is_asked_of_it(tiny_bert, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft.tuners.tuners_utils", None)
    assert adapter_layers(attach(tiny_bert()))


def test_a_part_that_was_trained_elsewhere_is_free(tiny_bert):
    whole = attach(tiny_bert(), "head")
    assert can_merge(attach(tiny_bert())) and not can_merge(whole)
    assert whole.lorakit_attachment.controllers(whole, None) == []
    part, whole.classifier = whole.classifier, nn.Linear(32, 2)
    assert attach(part, "full").weight.requires_grad


def tensors(*names):
    return {name: torch.zeros(2) for name in names}


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("here", "given", "message"),
    [
        (tensors(*"dcba"), {}, "4 missing tensors: a, b, c, d$"),
        (tensors(), tensors(*"edcba"), "5 unexpected tensors: a, b, c, d, …$"),
        (tensors(), tensors(*"fedcba"), "6 unexpected tensors: a, b, c, d, …$"),
        (tensors("a"), {"a": torch.zeros(3)}, r"a is \(3,\), this model has \(2,\)"),
        (tensors("a"), {"a": torch.zeros(2, dtype=torch.int64)}, "a is torch.int64, this model has torch.float32"),
        (tensors("a"), {"a": torch.zeros(2, dtype=torch.complex64)}, "a is torch.complex64, this model"),
        (tensors("a"), {"a": torch.tensor([1, NAN])}, "a holds NaN or infinite values"),
        ({"a": torch.zeros(1) + 0j}, {"a": torch.tensor([complex(1, INF)])}, "a holds NaN or infinite values"),
        ({"a": torch.tensor([-INF])}, {"a": torch.tensor([-INF])}, ""),  # a mask
        ({"a": torch.zeros(1, device="meta")}, {"a": torch.zeros(1, device="meta")}, ""),
        *[({"a": zeros}, {"a": zeros}, "") for zeros in (torch.zeros(2, dtype=torch.float8_e4m3fn), torch.arange(2))],
    ],
)
def test_tensors_that_do_not_fit_are_told_by_name_shape_and_type(here, given, message):
    with pytest.raises(CheckpointError, match=message) if message else nullcontext():
        check_state(here, given)
