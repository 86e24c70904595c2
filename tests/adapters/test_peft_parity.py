"""Oracle: PEFT. Same weights give the same outputs and gradients, and files are read by both sides."""

from __future__ import annotations

import json

import pytest
import torch
from small_models import HEADS, KINDS, LINEARS, backward, logits, peft_model, perturb, trained_tensors

from lorakit.adapters import AdapterSettings, adapter_layers, adapter_state, attach, load_adapter, save_adapter
from lorakit.adapters.attach import attach_to
from lorakit.adapters.layer import ADAPTERS
from lorakit.adapters.peft_format import name_in_file
from lorakit.base.quantize import quantize_nf4
from lorakit.errors import CheckpointError

ALL = tuple(LINEARS)
PEFTS = {"lora": "Lora", "hira": "Hira"}
INIT = {"lora": "init_lora_weights", "hira": "init_weights"}
EVERY = [("lora", kind) for kind in ALL] + [("hira", kind) for kind in KINDS]
methods = pytest.mark.parametrize("method", PEFTS)
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")


@pytest.fixture
def build(build):
    """HiRA's update is as large as W0 lets it be."""
    return lambda kind: build(kind, initializer_range=0.2)


def ours_on(base, method, kind, **options):
    alpha = {"alpha": 12} if method == "lora" else {}
    return attach(base, method, rank=4, target_modules=LINEARS[kind], seed=0, **alpha | options)


def pair(build, method, kind, change=lambda model: model, dropout=0.0, rslora=False):
    """Our adapter and PEFT's on the same base with the same trained weights."""
    from peft import set_peft_model_state_dict

    ours = perturb(ours_on(change(build(kind)), method, kind, dropout=dropout, rslora=rslora))
    options = {f"{method}_dropout": dropout} | ({"use_rslora": True} if rslora else {})
    theirs = peft_model(change(build(kind)), kind, PEFTS[method], **options)
    state = {name_in_file(method, name): tensor for name, tensor in adapter_state(ours).items()}
    result = set_peft_model_state_dict(theirs, state)
    assert not result.unexpected_keys and not [key for key in result.missing_keys if method in key]
    return ours, theirs


def assert_same_gradients(method, ours, theirs, tolerance=1e-5):
    """The difference is below `tolerance` of the gradient's norm, tensor by tensor."""
    trained = ((name, p) for name, p in theirs.named_parameters() if p.requires_grad)
    named = {name.replace(".default", "").replace(".modules_to_save", ""): p for name, p in trained}
    mine = {name_in_file(method, name): tensor for name, tensor in trained_tensors(ours).items()}
    assert mine.keys() == named.keys()
    for name, tensor in mine.items():
        peft = named[name].grad
        assert tensor.grad.dtype == peft.dtype == torch.float32
        assert peft.norm() > 1e-3, name  # a comparison of zeros proves nothing
        error = ((tensor.grad - peft).norm() / peft.norm()).item()
        assert error <= tolerance, f"{name}: {error:.1e}"


RSLORA = [("lora", "bert", {"rslora": True})]
DROPOUT = [(m, k, {"dropout": 0.3}) for m, k in (("lora", "bert"), ("lora", "gpt2"), *(("hira", k) for k in KINDS))]


@pytest.mark.parametrize(("method", "kind", "options"), [(*case, {}) for case in EVERY] + RSLORA + DROPOUT)
def test_outputs_and_gradients_equal_pefts(build, method, kind, options):
    ours, theirs = pair(build, method, kind, **options)
    outputs = []
    for model in (ours, theirs):
        model.train("dropout" in options)
        torch.manual_seed(5)  # dropout masks are drawn for the same number of elements in the same order
        outputs.append(backward(model))
    assert (outputs[1] - logits(build(kind))).abs().max() > 1e-2
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    assert_same_gradients(method, ours, theirs)


@methods
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_bf16_base_keeps_fp32_adapters_as_peft(build, method, kind):
    ours, theirs = pair(build, method, kind, change=lambda model: model.bfloat16())
    factors = {p.dtype for layer in adapter_layers(ours).values() for p in layer.adapter_parameters().values()}
    assert factors == {torch.float32}
    mine, peft = backward(ours), backward(theirs)
    assert mine.dtype == torch.bfloat16
    assert (mine - peft).norm() <= 0.02 * peft.norm()  # bf16 rounds by up to 1/256 at each of many places


@methods
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_autocast_agrees_with_peft(build, method, kind):
    ours, theirs = pair(build, method, kind)
    with torch.autocast("cpu", torch.bfloat16):
        mine, peft = backward(ours), backward(theirs)
    assert (mine - peft).norm() <= 0.05 * peft.norm()  # bf16 rounds by up to 1/256 at each of many places
    assert_same_gradients(method, ours, theirs, tolerance=0.15)  # of bf16, in a sum that cancels


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("compute_dtype", "outputs", "tolerance"), [("fp32", 1e-5, 1e-4), ("bf16", 5e-3, 0.05)])
def test_on_4_bits_as_peft(build, kind, compute_dtype, outputs, tolerance):
    """Gradients of fp32 sums, rounded in bf16."""
    from peft.tuners.lora.bnb import Linear4bit

    ours, theirs = pair(build, "lora", kind, change=lambda model: quantize_nf4(model, compute_dtype=compute_dtype))
    assert any(isinstance(module, Linear4bit) for module in theirs.modules())  # PEFT's own for 4 bits
    mine, peft = backward(ours), backward(theirs)
    assert (mine - peft).norm() <= outputs * peft.norm()
    assert_same_gradients("lora", ours, theirs, tolerance)


def adapted_in_peft(model):
    from peft.tuners.lora import LoraLayer

    return [name for name, module in model.base_model.model.named_modules() if isinstance(module, LoraLayer)]


@pytest.mark.parametrize("kind", ["bert", "gpt2", "gemma", "gpt2_classifier"])
def test_all_linear_means_what_it_means_in_peft(build, kind):
    theirs = peft_model(build(kind), kind, target_modules="all-linear", modules_to_save=None)
    assert list(adapter_layers(attach(build(kind)))) == adapted_in_peft(theirs)


@pytest.mark.parametrize(
    "target", [["query"], ["attention.output.dense"], r".*layer\.1\..*(query|value)", ["key", "value"]]
)
def test_names_and_regexes_match_as_in_peft(build, target):
    expected = adapted_in_peft(peft_model(build("bert"), "bert", target_modules=target))
    assert expected and list(adapter_layers(attach(build("bert"), target_modules=target))) == expected


@methods
@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_initial_values_follow_pefts_distribution(build, method, init):
    ours = attach(build("bert"), method, rank=16, init=init, seed=0)
    theirs = peft_model(
        build("bert"), "bert", PEFTS[method], r=16, **{INIT[method]: True if init == "kaiming" else "gaussian"}
    )
    layers = [layer for layer in adapter_layers(ours).values() if layer.in_features == 32]
    mine = torch.cat([layer.adapter_parameters()[f"{method}_A"].flatten() for layer in layers])
    peft = [p.flatten() for name, p in theirs.named_parameters() if f"{method}_A" in name and p.shape[1] == 32]
    peft = torch.cat(peft)
    assert mine.std().item() == pytest.approx(peft.std().item(), rel=0.05)  # ~6000 draws: 1 % standard error
    assert mine.abs().max().item() == pytest.approx(peft.abs().max().item(), rel=0.3)


# --- files -----------------------------------------------------------------------------------------------------------

OURS = [(*case, {}) for case in EVERY] + [("lora", kind, {"alpha": 12.5, "rslora": True}) for kind in ALL]


@pytest.mark.parametrize(("method", "kind", "options"), OURS)
def test_peft_loads_our_file_with_equal_logits(build, tmp_path, method, kind, options, recwarn):
    from peft import PeftModel

    ours = perturb(attach(build(kind), method, rank=4, seed=0, **options))
    save_adapter(ours, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(build(kind), tmp_path / "adapter")
    assert not [str(w.message) for w in recwarn if "keyword" in str(w.message) or "missing" in str(w.message)]
    assert not torch.allclose(logits(ours), logits(build(kind)), atol=1e-3)
    torch.testing.assert_close(logits(theirs), logits(ours), atol=1e-5, rtol=1e-5)
    again = load_adapter(build(kind), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(ours)) and again.lorakit_attachment.method == method


@pytest.mark.parametrize(("method", "kind"), EVERY)
@pytest.mark.parametrize("attached", [False, True])
def test_we_load_pefts_file_with_equal_logits(build, tmp_path, method, kind, attached):
    theirs = peft_model(build(kind), kind, PEFTS[method])
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(ours_on(build(kind), method, kind) if attached else build(kind), tmp_path)
    assert not torch.allclose(logits(ours), logits(build(kind)), atol=1e-2)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)
    assert list(ours.lorakit_attachment.trained) == HEADS.get(kind, [])


def moved(model):
    """PEFT's, every trained value of it away from where it started."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * parameter.requires_grad)
    return model


@pytest.mark.parametrize("use_dora", [False, True])
def test_modules_to_save_are_named_by_their_ends_too(build, tmp_path, use_dora):
    options = {"target_modules": ["query"], "modules_to_save": ["pooler", "classifier"], "use_dora": use_dora}
    theirs = moved(peft_model(build("bert"), "bert", **options))
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(build("bert"), tmp_path)
    assert list(ours.lorakit_attachment.trained) == ["bert.pooler", "classifier"]
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_an_embedding_is_trained_with_what_is_tied_to_it_where_peft_ties_them_or_refused(build, tmp_path):
    for kind, name, tied in (("gemma", "embed_tokens", True), ("gemma", "embed_tokens", False), ("gpt2", "wte", True)):
        options = {"target_modules": LINEARS[kind][:1], "modules_to_save": [name], "ensure_weight_tying": tied}
        theirs = moved(peft_model(build(kind), kind, **options))
        theirs.save_pretrained(folder := tmp_path / f"{name}{tied}")
        if (name, tied) == ("embed_tokens", True):
            ours = load_adapter(build(kind), folder)
            assert list(ours.lorakit_attachment.trained) == ["model.embed_tokens", "lm_head"]
            torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)
        else:  # PEFT trains one of the two
            with pytest.raises(CheckpointError, match="shares its weight with the frozen lm_head.weight"):
                load_adapter(build(kind), folder)


def test_rank_and_alpha_patterns_are_honoured_and_written_back(build, tmp_path):
    from peft import PeftModel

    patterns = {"rank_pattern": {"query": 2, "layer.1.output.dense": 6}, "alpha_pattern": {"value": 40}}
    theirs = peft_model(build("bert"), "bert", **patterns, init_lora_weights=False)
    theirs.save_pretrained(tmp_path / "peft")
    ours = load_adapter(build("bert"), tmp_path / "peft")
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)
    assert {layer.settings.rank for layer in adapter_layers(ours).values()} == {2, 4, 6}
    save_adapter(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(build("bert"), tmp_path / "ours")
    torch.testing.assert_close(logits(again), logits(theirs), atol=1e-5, rtol=1e-5)


def test_ranks_of_hira_are_those_of_the_tensors(build, tmp_path):
    """PEFT 0.21 writes a HiRA config's rank_pattern and gives every layer the common rank all the same."""
    options = {"rank_pattern": {"query": 2}, "init_weights": False, "hira_dropout": 0.25}
    theirs = peft_model(build("bert"), "bert", "Hira", **options)
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


def test_excluded_and_layerwise_targets_of_a_peft_file_are_honoured(build, tmp_path):
    options = {"layers_to_transform": [1], "target_modules": ["query", "key"], "exclude_modules": ["key"]}
    theirs = peft_model(build("bert"), "bert", **options, init_lora_weights=False)
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(build("bert"), tmp_path)
    assert list(adapter_layers(ours)) == ["bert.encoder.layer.1.attention.self.query"]
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)


CLASSIFIER = {"modules_to_save": ["pre_classifier", "classifier"], "task_type": "SEQ_CLS", "init_lora_weights": True}
CLASSIFIER |= {"fan_in_fan_out": False}
GPT2 = {"peft_type": "HIRA", "init_weights": "gaussian", "fan_in_fan_out": True, "r": 4, "hira_dropout": 0.25}
GPT2 |= {"modules_to_save": None, "task_type": "CAUSAL_LM", "inference_mode": True, "base_model_name_or_path": None}


@pytest.mark.parametrize(
    ("method", "kind", "options", "fields"),
    [
        ("lora", "distilbert", {}, CLASSIFIER),
        ("lora", "bert", {"init": "gaussian"}, {"init_lora_weights": "gaussian"}),
        ("hira", "bert", {}, {"init_weights": True}),
        ("hira", "gpt2", {"init": "gaussian", "dropout": 0.25}, GPT2),
    ],
)
def test_the_files_hold_the_same_names_shapes_and_fields(build, tmp_path, method, kind, options, fields):
    from safetensors.torch import load_file

    save_adapter(ours_on(build(kind), method, kind, **options), tmp_path / "ours")
    peft_model(build(kind), kind, PEFTS[method]).save_pretrained(tmp_path / "peft")
    mine, peft = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "peft"))
    assert {name: t.shape for name, t in mine.items()} == {name: t.shape for name, t in peft.items()}
    text, peft = ((tmp_path / side / "adapter_config.json").read_text() for side in ("ours", "peft"))
    mine, peft = json.loads(text), json.loads(peft)
    assert mine.keys() <= peft.keys() and mine == mine | fields
    assert text == json.dumps(mine, indent=2, sort_keys=True) + "\n"


@methods
def test_what_a_config_does_not_say_is_what_peft_takes(method):
    """And what it says is taken."""
    import peft

    layer, theirs = ADAPTERS[method], getattr(peft, f"{PEFTS[method]}Config")()
    assert layer.settings_from_peft({}) == layer.settings_from_peft(theirs.to_dict())
    given = {"alpha": 2.5, "rslora": True} if method == "lora" else {"alpha": None}
    settings = AdapterSettings(rank=3, dropout=0.25, init="gaussian", **given)
    assert layer.settings_from_peft(layer.settings_to_peft(settings)) == settings


@pytest.mark.parametrize(
    ("method", "kind", "options", "named"),
    [
        ("Lora", "bert", {"bias": "lora_only"}, "bias"),
        ("Lora", "bert", {"use_dora": True, "bias": "lora_only"}, "bias"),
        ("Lora", "bert", {"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    ],
)
def test_peft_features_we_lack_are_refused_by_name(build, tmp_path, method, kind, options, named):
    peft_model(build(kind), kind, method, **options).save_pretrained(tmp_path)
    model = build(kind)
    with pytest.raises(CheckpointError, match=named):
        load_adapter(model, tmp_path)
    assert not hasattr(model, "lorakit_attachment") and not adapter_layers(model)


def test_another_method_than_the_attached_is_refused_by_name(build, tmp_path):
    from peft import IA3Config, get_peft_model

    config = IA3Config(target_modules=["query"], feedforward_modules=[])
    get_peft_model(build("bert"), config).save_pretrained(tmp_path / "ia3")
    with pytest.raises(CheckpointError, match="peft_type='IA3': must be one of LORA, HIRA$"):
        load_adapter(attach(build("bert")), tmp_path / "ia3")
    save_adapter(attach(build("gpt2"), "hira"), tmp_path / "hira")
    with pytest.raises(CheckpointError, match="holds method 'hira', but 'lora' is attached"):
        load_adapter(attach(build("gpt2"), "lora"), tmp_path / "hira")


@pytest.mark.parametrize("broken", [{"init_weights": "pissa"}, {"alpha_pattern": {"c_fc": 3}}, {"use_dora": True}])
def test_a_changed_hira_file_is_refused_by_the_field(build, tmp_path, broken):
    file = save_adapter(attach(build("gpt2"), "hira"), tmp_path / "hira") / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | broken))
    with pytest.raises(CheckpointError, match=next(iter(broken)).removesuffix("_pattern")):
        load_adapter(build("gpt2"), tmp_path / "hira")
