"""HiRA: PEFT's outputs, gradients and files; closed forms; what one layer computes, keeps and leaves alone."""

from __future__ import annotations

import json

import hira_models
import pytest
import torch
from hira_models import backward, batch, logits, perturb
from training_runs import trainer

from benchmarks._profiled import measured_step_peak, training_step
from lorakit.adapters import (
    AdapterSettings,
    adapter_layers,
    adapter_state,
    attach,
    detach,
    load_adapter,
    merged,
    parameter_stats,
    save_adapter,
)
from lorakit.adapters.attach import attach_to
from lorakit.adapters.attachment import trained_tensors
from lorakit.adapters.peft_format import name_in_file
from lorakit.errors import CheckpointError
from lorakit.measure.memory import predict_step_memory

build = hira_models.build

HEADS = {"bert": ["classifier"]}
LINEARS = {
    "bert": ["query", "key", "value", "dense"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "gemma": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
KINDS = tuple(LINEARS)
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")


# --- oracle: PEFT ----------------------------------------------------------------------------------------------------


def peft_model(base, kind, **options):
    from peft import HiraConfig, get_peft_model

    head = list(HEADS.get(kind, [])) or None  # PEFT adds names of its own to the list
    config = {
        "r": 4,
        "target_modules": LINEARS[kind],
        "modules_to_save": head,
        "task_type": "SEQ_CLS" if head else None,
    }
    return get_peft_model(base, HiraConfig(**config | options)).eval()


def pair(build, kind, change=lambda model: model, dropout=0.0):
    """Our HiRA and PEFT's on the same base with the same trained weights."""
    from peft import set_peft_model_state_dict

    ours = attach(change(build(kind)), "hira", rank=4, dropout=dropout, target_modules=LINEARS[kind], seed=0)
    theirs = peft_model(change(build(kind)), kind, hira_dropout=dropout)
    state = {name_in_file("hira", name): tensor for name, tensor in adapter_state(perturb(ours)).items()}
    result = set_peft_model_state_dict(theirs, state)
    assert not result.unexpected_keys and not [key for key in result.missing_keys if "hira" in key]
    return ours, theirs


def gradient_errors(ours, theirs):
    """By tensor: the norm of the difference to PEFT's gradient over the norm of that."""
    named = {name.replace(".default", "").replace(".modules_to_save", ""): p for name, p in theirs.named_parameters()}
    errors = {}
    for name, mine in trained_tensors(ours).items():
        peft = named[name_in_file("hira", name)].grad
        assert mine.grad.dtype == peft.dtype == torch.float32
        assert peft.norm() > 1e-4, name  # a comparison of zeros proves nothing
        errors[name] = ((mine.grad - peft).norm() / peft.norm()).item()
    return errors


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_equal_pefts(build, kind, dropout):
    ours, theirs = pair(build, kind, dropout=dropout)
    outputs = []
    for model in (ours, theirs):
        model.train(dropout > 0)
        torch.manual_seed(5)  # dropout masks are drawn for the same number of elements in the same order
        outputs.append(backward(model))
    assert (outputs[1] - logits(build(kind))).abs().max() > 1e-2
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    assert max(gradient_errors(ours, theirs).values()) <= 1e-5


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_bf16_base_keeps_fp32_adapters_as_peft(build, kind):
    ours, theirs = pair(build, kind, change=lambda model: model.bfloat16())
    assert {layer.hira_A.dtype for layer in adapter_layers(ours).values()} == {torch.float32}
    mine, peft = backward(ours), backward(theirs)
    assert mine.dtype == torch.bfloat16
    assert (mine - peft).norm() <= 0.02 * peft.norm()  # bf16 rounds by up to 1/256 at each of many places


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_autocast_agrees_with_peft(build, kind):
    ours, theirs = pair(build, kind)
    with torch.autocast("cpu", torch.bfloat16):
        mine, peft = backward(ours), backward(theirs)
    assert (mine - peft).norm() <= 0.05 * peft.norm()
    assert max(gradient_errors(ours, theirs).values()) <= 0.15  # of bf16, in a sum that cancels


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_initial_values_follow_pefts_distribution(build, init):
    ours = attach(build("bert"), "hira", rank=16, init=init, seed=0)
    theirs = peft_model(build("bert"), "bert", r=16, init_weights=True if init == "kaiming" else "gaussian")
    mine = torch.cat([layer.hira_A.flatten() for layer in adapter_layers(ours).values() if layer.in_features == 32])
    peft = torch.cat([p.flatten() for name, p in theirs.named_parameters() if "hira_A" in name and p.shape[1] == 32])
    assert mine.std().item() == pytest.approx(peft.std().item(), rel=0.05)  # ~6000 draws: 1 % standard error
    assert mine.abs().max().item() == pytest.approx(peft.abs().max().item(), rel=0.3)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_our_file_with_equal_logits(build, tmp_path, kind, recwarn):
    from peft import PeftModel

    ours = perturb(attach(build(kind), "hira", rank=4, seed=0))
    save_adapter(ours, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(build(kind), tmp_path / "adapter").eval()
    assert not [str(w.message) for w in recwarn if "keyword" in str(w.message) or "missing" in str(w.message)]
    assert not torch.allclose(logits(ours), logits(build(kind)), atol=1e-3)
    torch.testing.assert_close(logits(theirs), logits(ours), atol=1e-5, rtol=1e-5)
    again = load_adapter(build(kind), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(ours)) and again.lorakit_attachment.method == "hira"


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_we_load_pefts_file_with_equal_logits(build, tmp_path, kind, attached):
    theirs = peft_model(build(kind), kind, init_weights=False)
    theirs.save_pretrained(tmp_path)
    ours = build(kind)
    if attached:
        attach(ours, "hira", rank=4, target_modules=LINEARS[kind])
    load_adapter(ours, tmp_path)
    assert not torch.allclose(logits(ours), logits(build(kind)), atol=1e-2)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)


def test_ranks_are_those_of_the_tensors(build, tmp_path):
    """PEFT 0.21 writes a HiRA config's rank_pattern and gives every layer the common rank all the same."""
    theirs = peft_model(build("bert"), "bert", rank_pattern={"query": 2}, init_weights=False, hira_dropout=0.25)
    theirs.save_pretrained(tmp_path / "peft")
    ours = load_adapter(build("bert"), tmp_path / "peft")
    assert {(s.rank, s.alpha, s.dropout) for s in ours.lorakit_attachment.targets.values()} == {(4, None, 0.25)}
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)

    common, own = (AdapterSettings(rank=rank, alpha=None) for rank in (4, 2))
    targets = {"bert.encoder.layer.0.attention.self.query": own, "bert.encoder.layer.1.output.dense": common}
    mixed = perturb(attach_to(build("bert"), "hira", common, targets, ["classifier"], seed=0))
    save_adapter(mixed, tmp_path / "mixed")
    again = load_adapter(build("bert"), tmp_path / "mixed")
    assert again.lorakit_attachment.targets == targets and torch.equal(logits(again), logits(mixed))


def test_the_files_hold_the_same_names_shapes_and_fields(build, tmp_path):
    from safetensors.torch import load_file

    save_adapter(attach(build("gpt2"), "hira", rank=4, init="gaussian", dropout=0.25), tmp_path / "ours")
    peft_model(build("gpt2"), "gpt2").save_pretrained(tmp_path / "peft")
    mine, peft = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "peft"))
    assert {name: t.shape for name, t in mine.items()} == {name: t.shape for name, t in peft.items()}
    mine, peft = (json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("ours", "peft"))
    assert mine.keys() <= peft.keys()
    assert (mine["peft_type"], mine["init_weights"], mine["fan_in_fan_out"]) == ("HIRA", "gaussian", True)
    assert (mine["r"], mine["hira_dropout"]) == (4, 0.25)


def test_files_that_do_not_fit_are_refused_and_nothing_changes(build, tmp_path):
    peft_model(build("gpt2"), "gpt2", target_modules=["c_fc", "wte"]).save_pretrained(tmp_path / "embedding")
    model = build("gpt2")
    assert detach(load_adapter(model, tmp_path / "embedding")) is model  # PEFT's own, which has it
    with pytest.raises(CheckpointError, match="does not fit this model"):
        load_adapter(attach(model, "hira"), tmp_path / "embedding")
    detach(model)

    save_adapter(attach(build("gpt2"), "hira"), tmp_path / "hira")
    with pytest.raises(CheckpointError, match="holds method 'hira', but 'lora' is attached"):
        load_adapter(attach(model, "lora"), tmp_path / "hira")
    config = json.loads((tmp_path / "hira" / "adapter_config.json").read_text())
    for broken in ({"init_weights": "pissa"}, {"alpha_pattern": {"c_fc": 3}}, {"use_dora": True}):
        (tmp_path / "hira" / "adapter_config.json").write_text(json.dumps(config | broken))
        with pytest.raises(CheckpointError, match=next(iter(broken)).removesuffix("_pattern")):
            load_adapter(build("gpt2"), tmp_path / "hira")


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes_at_the_start(build, kind):
    assert torch.equal(logits(attach(build(kind), "hira", seed=0)), logits(build(kind)))


def test_it_trains_as_many_values_as_lora(build):
    lora, hira = (attach(build("bert"), method, rank=5) for method in ("lora", "hira"))
    assert parameter_stats(lora).trainable == parameter_stats(hira).trainable


def test_training_leaves_frozen_weights_bit_identical(build, tmp_path):
    model = attach(build("bert"), "hira", seed=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = set(trained_tensors(model)) | {name for name, p in model.named_parameters() if p.requires_grad}
    trainer(model, tmp_path).train()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in trained), name


@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_unmerged(build, kind):
    model = perturb(attach(build(kind), "hira", seed=0))
    expected, bits = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with merged(model):
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
        assert not torch.equal(
            next(iter(adapter_layers(model).values())).base_layer.weight,
            bits[f"{next(iter(adapter_layers(model)))}.base_layer.weight"],
        )
    assert all(torch.equal(tensor, bits[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), expected)


NO_DROPOUT = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_gradient_checkpointing_gives_the_same_gradients(build, kind):
    model = perturb(attach(build(kind, **NO_DROPOUT[kind]), "hira", seed=0)).train()
    model.config.use_cache = False
    trained = [p for p in model.parameters() if p.requires_grad]
    plain = torch.autograd.grad(model(**batch()).logits.square().sum(), trained)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = torch.autograd.grad(model(**batch()).logits.square().sum(), trained)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize(
    ("kind", "options"), [("bert", {"gradient_checkpointing": True}), ("gpt2", {"autocast": "bf16"})]
)
def test_predicted_memory_equals_measured_memory(build, kind, options):
    ids = torch.randint(1, 99, (8, 64))
    inputs = {"input_ids": ids, "labels": ids[:, 0] % 2 if kind == "bert" else ids}

    def prepare():
        model = attach(build(kind), "hira", seed=0)
        model.config.use_cache = False
        if "gradient_checkpointing" in options:
            model.activation_checkpointing_enable({"use_reentrant": False})
        return training_step(model, {name: ids.clone() for name, ids in inputs.items()}, options.get("autocast"))

    predicted = predict_step_memory(attach(build(kind), "hira", seed=0), inputs, **options)["peak"]
    assert predicted == pytest.approx(measured_step_peak(prepare), rel=0.01)
    with torch.device("meta"):
        meta = build(kind)
    assert predict_step_memory(attach(meta, "hira"), inputs, **options)["peak"] == predicted
