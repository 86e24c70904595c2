"""HiRA: PEFT's outputs, gradients and files; closed forms; what one layer computes, keeps and leaves alone."""

from __future__ import annotations

import copy
import json
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training_runs import trainer

from benchmarks._profiled import measured_step_peak, training_step
from lorakit.adapters import (
    AdapterSettings,
    HiRALayer,
    adapter_layers,
    adapter_state,
    attach,
    load_adapter,
    merge,
    merged,
    parameter_stats,
    save_adapter,
    unmerge,
)
from lorakit.adapters.attach import attach_to
from lorakit.adapters.attachment import trained_tensors
from lorakit.adapters.peft_format import name_in_file
from lorakit.errors import CheckpointError, LorakitError, ParameterError
from lorakit.measure.flops import FlopCount
from lorakit.measure.live import LiveBytes
from lorakit.measure.memory import predict_step_memory

HEADS = {"bert": ["classifier"]}
LINEARS = {
    "bert": ["query", "key", "value", "dense"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "gemma": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
KINDS = tuple(LINEARS)
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")


@pytest.fixture
def build(tiny_bert, tiny_gpt2, tiny_gemma):
    """`build(kind)`: the same small model at every call."""
    factories = {"bert": tiny_bert, "gpt2": tiny_gpt2, "gemma": tiny_gemma}

    def build(kind, **overrides):
        torch.manual_seed(7)
        return factories[kind](initializer_range=0.2, **overrides).eval()  # HiRA's update is as large as W0 lets it be

    return build


def perturb(model):
    """Adapters as after training: BA of the order of 0.3, the head moved."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in trained_tensors(model).items():
            spread = 1.0 if "hira_B" in name else 0.1
            tensor.add_(spread * torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype))
    return model


def batch(rows=4, length=9):
    ids = torch.randint(3, 99, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def logits(model):
    with torch.no_grad():
        return model(**batch()).logits


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


def backward(model):
    """Logits, after the backward of a fixed random projection of them."""
    output = model(**batch()).logits
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.dtype)
    (output * weights).sum().backward()
    return output.detach()


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
    with pytest.raises(CheckpointError, match="hira_embedding"):
        load_adapter(model, tmp_path / "embedding")
    assert not hasattr(model, "lorakit_attachment") and not adapter_layers(model)

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


# --- one layer -------------------------------------------------------------------------------------------------------


def conv1d(inputs=5, outputs=7):
    from transformers.pytorch_utils import Conv1D

    return Conv1D(outputs, inputs)


BASES = [lambda: nn.Linear(5, 7), lambda: nn.Linear(5, 7, bias=False), conv1d]
bases = pytest.mark.parametrize("base", BASES, ids=["linear", "without bias", "Conv1D"])


def layer_of(base, kind=HiRALayer, **settings):
    """A layer as after training, its base with a bias away from zero."""
    with torch.no_grad():
        if base.bias is not None:
            base.bias.normal_()
    layer = kind(base.requires_grad_(False), AdapterSettings(alpha=None, **settings))
    nn.init.normal_(layer.hira_B, generator=torch.Generator().manual_seed(4))
    return layer


@bases
def test_the_layer_is_the_formula(base):
    layer = layer_of(base().double(), rank=3)
    W0 = layer.base_layer.weight.T if layer.transposed else layer.base_layer.weight
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    expected = F.linear(x, W0 * (1 + layer.hira_B @ layer.hira_A), layer.bias)
    assert layer(x).dtype == torch.float64
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(layer(x[0, 0]), expected[0, 0], atol=1e-12, rtol=0)
    assert layer(x[:0]).shape == (0, 3, 7)


@bases
def test_closed_form_gradients(base):
    layer = layer_of(base().double(), rank=3)
    W0, A, B = layer.base_weight(), layer.hira_A, layer.hira_B
    X, dY = (torch.randn(11, size, dtype=torch.float64) for size in (5, 7))
    X.requires_grad_()
    layer(X).backward(dY)
    G = dY.T @ X
    torch.testing.assert_close(B.grad, (W0 * G) @ A.T, atol=1e-12, rtol=0)
    torch.testing.assert_close(A.grad, B.T @ (W0 * G), atol=1e-12, rtol=0)
    torch.testing.assert_close(X.grad, dY @ (W0 * (1 + B @ A)), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@bases
def test_gradcheck(base, dropout):
    layer = layer_of(base().double(), rank=2, dropout=dropout)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    bias = layer.bias.clone().requires_grad_() if layer.bias is not None else None

    def call(x, A, B, *bias):
        torch.manual_seed(0)  # the same dropout mask every time
        values = {"hira_A": A, "hira_B": B} | ({"base_layer.bias": bias[0]} if bias else {})
        return torch.func.functional_call(layer, values, (x,))

    inputs = (x, layer.hira_A, layer.hira_B, *([bias] if bias is not None else []))
    assert torch.autograd.gradcheck(call, inputs)


def test_a_second_derivative_is_refused_not_wrong():
    layer = layer_of(nn.Linear(3, 4), rank=2)
    x = torch.randn(5, 3, requires_grad=True)
    (dX,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dX.sum().backward()


@pytest.mark.parametrize("base_rank", [3, 24])
def test_the_update_has_a_rank_up_to_the_product_of_ranks(base_rank):
    base = nn.Linear(24, 24).double()
    with torch.no_grad():
        base.weight.copy_(torch.randn(24, base_rank).double() @ torch.randn(base_rank, 24).double())
    layer = layer_of(base, rank=2)
    rank = int(torch.linalg.matrix_rank(layer.delta_weight()))
    assert rank == min(24, 2 * base_rank) > 2


@pytest.mark.parametrize("base", [lambda: nn.Linear(16, 12), lambda: conv1d(16, 12)], ids=["linear", "Conv1D"])
def test_entries_that_are_zero_never_change(base):
    base = base().requires_grad_(False)
    base.weight[torch.rand(base.weight.shape) < 0.4] = 0
    zeros = base.weight == 0
    model = attach(nn.Sequential(base), "hira", trainable=(), seed=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(20):
        model(torch.randn(8, 16)).sub(1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    before = base.weight.clone()
    after = merge(model)[0].base_layer.weight
    assert zeros.any() and torch.equal(after == 0, zeros)
    assert (after - before)[~zeros].abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerge_restores_every_bit_where_the_weight_was_wiped_out(dtype):
    model = attach(nn.Sequential(nn.Linear(6, 4, bias=False)).to(dtype), "hira", rank=1, trainable=(), seed=0)
    layer, x = model[0], torch.randn(3, 6).to(dtype)
    nn.init.ones_(layer.hira_A), nn.init.constant_(layer.hira_B, -1.0)  # 1 + BA = 0: no division brings W0 back
    before = layer.base_layer.weight.clone()
    assert torch.equal(merge(model)[0].base_layer.weight, torch.zeros_like(before))
    assert torch.equal(unmerge(model)[0].base_layer.weight, before)
    assert torch.equal(model(x), torch.zeros(3, 4, dtype=dtype))


def test_dropout_acts_in_training_on_the_update_only():
    layer = layer_of(nn.Linear(40, 8), rank=2, dropout=0.5)
    x = torch.randn(6, 40)
    torch.manual_seed(0)
    dropped = layer.train()(x)
    torch.manual_seed(0)
    expected = layer.base_layer(x) + F.linear(F.dropout(x, 0.5), layer.delta_weight())
    torch.testing.assert_close(dropped, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.eval()(x), F.linear(x, layer.weight, layer.bias), atol=1e-5, rtol=1e-5)


def test_a_small_coherent_update_survives_a_bf16_base():
    """BA = ±2⁻¹⁰ is lost where W0·(1 + BA) is rounded to bf16, yet moves the output by 2⁻¹⁰ Σ|w x|, a percent."""
    base = nn.Linear(1024, 1, bias=False).bfloat16()
    layer = layer_of(base, rank=1)
    x = torch.randn(1, 1024).bfloat16()
    with torch.no_grad():
        layer.hira_A.copy_((base.weight * x).sign())
        layer.hira_B.fill_(2**-10)
        assert torch.equal(layer.merged_weight(), base.weight)
        moved = (layer(x) - base(x)).item()
    assert moved == pytest.approx(2**-10 * (base.weight * x).float().abs().sum().item(), rel=0.2)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_autocast_multiplies_in_bf16_and_makes_the_weight_in_fp32(dropout):
    layer = layer_of(nn.Linear(64, 48), rank=4, dropout=dropout)
    x = torch.randn(5, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer.eval()(x)
        inside = torch.autograd.grad(out.float().sum(), (x, layer.hira_A, layer.hira_B), retain_graph=True)
    outside = torch.autograd.grad(out.float().sum(), (x, layer.hira_A, layer.hira_B))
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(inside, outside, strict=True))
    assert out.dtype == torch.bfloat16
    W0 = layer.base_layer.weight
    weight = torch.addcmul(W0, W0, layer.hira_B @ layer.hira_A).bfloat16()
    assert torch.equal(out, F.linear(x.bfloat16(), weight, layer.bias.bfloat16()))


# --- what it costs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@bases
def test_no_matrix_of_the_weights_size_is_saved(base, dropout):
    layer, x, saved = layer_of(base(), rank=2, dropout=dropout), torch.randn(11, 5), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert sum(t.numel() for t in saved) == x.numel() + layer.hira_A.numel() + layer.hira_B.numel()


class Unpacking(HiRALayer):
    """As a 4-bit base: the plain weight exists only while asked for."""

    def base_weight(self):
        self.unpacked = [*getattr(self, "unpacked", []), weakref.ref(weight := super().base_weight().clone())]
        return weight


@bases
def test_an_unpacked_weight_does_not_outlive_the_forward(base):
    layer = layer_of(base(), kind=Unpacking, rank=2)
    out = layer(torch.randn(11, 5))
    assert [weight() for weight in layer.unpacked] == [None]
    out.sum().backward()
    assert [weight() for weight in layer.unpacked] == [None, None]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("base", [lambda: nn.Linear(96, 128), lambda: conv1d(96, 128)], ids=["linear", "Conv1D"])
def test_one_temporary_of_the_weights_size_at_a_time(base, dropout):
    layer = layer_of(base(), rank=1, dropout=dropout)
    x = torch.randn(2, 96, requires_grad=True)
    live = LiveBytes()
    for tensor in (*layer.parameters(), x):
        live.claim(tensor, "parameters")
    with live:
        layer(x).sum().backward()
    size = layer.base_layer.weight.nbytes
    assert size < live.peak()["activations"] < 1.2 * size


@pytest.mark.parametrize("wanted", ["x", "A", "B", "xAB"])
def test_only_the_gradients_asked_for_are_computed(wanted):
    N, inputs, outputs, r = 17, 24, 40, 2
    layer = layer_of(nn.Linear(inputs, outputs), rank=r)
    x = torch.randn(N, inputs, requires_grad="x" in wanted)
    layer.hira_A.requires_grad_("A" in wanted)
    layer.hira_B.requires_grad_("B" in wanted)
    large, small = 2 * N * inputs * outputs, 2 * r * inputs * outputs
    with FlopCount() as count:
        out = layer(x)
    assert count.total == large + small
    with FlopCount() as count:
        out.sum().backward()
    factors = ("A" in wanted) + ("B" in wanted)
    assert count.total == ("x" in wanted) * (large + small) + bool(factors) * large + factors * small
    assert [t.grad is not None for t in (x, layer.hira_A, layer.hira_B)] == [name in wanted for name in "xAB"]


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("option", "named"), [({"alpha": 8}, "alpha=8.0"), ({"rslora": True}, "rslora=True")])
def test_alpha_is_refused(build, option, named):
    model = build("bert")
    with pytest.raises(ParameterError, match=f"^{named}: method 'hira' has no alpha"):
        attach(model, "hira", **option)
    assert not hasattr(model, "lorakit_attachment") and not adapter_layers(model)
    settings = {"alpha": None, "rslora": False} | option
    with pytest.raises(ParameterError, match=f"^{named}: HiRA has no"):
        HiRALayer(nn.Linear(3, 4), AdapterSettings(**settings))


def test_a_base_weight_that_wants_a_gradient_is_refused():
    layer = layer_of(nn.Linear(3, 4))
    layer.base_layer.weight.requires_grad_(True)
    with pytest.raises(LorakitError, match="frozen"):
        layer(torch.randn(2, 3))
    with torch.no_grad():
        layer(torch.randn(2, 3))


def test_a_copy_is_independent(build):
    model = perturb(attach(build("bert"), "hira", seed=0))
    twin, expected = copy.deepcopy(model), logits(model)
    backward(model), perturb(model)
    assert torch.equal(logits(twin), expected) and not torch.equal(logits(model), expected)
