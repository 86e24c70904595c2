"""Oracle: PEFT. Same weights give the same outputs and gradients, and files are read by both sides."""

from __future__ import annotations

import json

import pytest
import torch

from lorakit.adapters import adapter_layers, adapter_state, attach, load_adapter, save_adapter

HEADS = {"bert": ["classifier"], "distilbert": ["pre_classifier", "classifier"], "gpt2_classifier": ["score"]}
LINEARS = {
    "bert": ["query", "key", "value", "dense"],
    "distilbert": ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "gpt2_classifier": ["c_attn", "c_fc", "c_proj"],
    "gemma": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")


@pytest.fixture
def build(tiny_bert, tiny_gpt2, tiny_gemma):
    """`build(kind)`: the same small model at every call."""

    def distilbert():
        from transformers import DistilBertConfig, DistilBertForSequenceClassification

        config = DistilBertConfig(vocab_size=99, dim=32, n_layers=2, n_heads=2, hidden_dim=64, pad_token_id=0)
        return DistilBertForSequenceClassification(config)

    def gpt2_classifier():
        from transformers import GPT2ForSequenceClassification

        return GPT2ForSequenceClassification(tiny_gpt2().config)

    builders = {"bert": tiny_bert, "gpt2": tiny_gpt2, "gemma": tiny_gemma}
    builders |= {"distilbert": distilbert, "gpt2_classifier": gpt2_classifier}

    def build(kind, seed=7):
        torch.manual_seed(seed)
        return builders[kind]().eval()

    return build


def peft_model(base, kind, **options):
    from peft import LoraConfig, get_peft_model

    head = list(HEADS.get(kind, [])) or None  # PEFT adds names of its own to the list
    config = {"r": 4, "lora_alpha": 12, "target_modules": LINEARS[kind], "modules_to_save": head}
    config["task_type"] = "SEQ_CLS" if head else None
    return get_peft_model(base, LoraConfig(**config | options)).eval()


def give_to_peft(ours, theirs):
    from peft import set_peft_model_state_dict

    state = {f"base_model.model.{name}": tensor for name, tensor in adapter_state(ours).items()}
    result = set_peft_model_state_dict(theirs, state)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora" in key]


def perturb(model):
    """Weights as after training: B away from zero, the head moved."""
    from lorakit.adapters.attachment import trained_tensors

    with torch.no_grad():
        for tensor in trained_tensors(model).values():
            tensor.add_(0.1 * torch.randn_like(tensor))
    return model


def inputs(length=9, batch=4):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 99, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def gradients_of(model, batch):
    """Gradients of a fixed random projection of the logits, by PEFT's file names."""
    logits = model(**batch).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=logits.dtype)
    (logits * weights).sum().backward()
    return logits.detach()


def grad_pairs(ours, theirs):
    peft_named = {
        name.replace(".default", "").removeprefix("base_model.model.").replace(".modules_to_save", ""): p
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    from lorakit.adapters.attachment import trained_tensors

    mine = trained_tensors(ours)
    assert mine.keys() == peft_named.keys()
    return [(name, mine[name].grad, peft_named[name].grad) for name in mine]


def assert_same_gradients(ours, theirs, tolerance=1e-5):
    """The difference is below `tolerance` of the gradient's norm, tensor by tensor."""
    for name, mine, peft in grad_pairs(ours, theirs):
        assert mine.dtype == peft.dtype == torch.float32
        assert peft.norm() > 1e-3, name  # a comparison of zeros proves nothing
        error = ((mine - peft).norm() / peft.norm()).item()
        assert error <= tolerance, f"{name}: {error:.1e}"


CASES = [("bert", {}), ("distilbert", {}), ("gpt2", {}), ("gpt2_classifier", {}), ("gemma", {}), ("bert", "rslora")]


@pytest.mark.parametrize(("kind", "option"), CASES)
def test_outputs_and_gradients_equal_pefts(build, kind, option):
    rslora = option == "rslora"
    ours = perturb(attach(build(kind), rank=4, alpha=12, target_modules=LINEARS[kind], rslora=rslora, seed=0))
    theirs = peft_model(build(kind), kind, use_rslora=rslora)
    give_to_peft(ours, theirs)
    torch.testing.assert_close(gradients_of(ours, inputs()), gradients_of(theirs, inputs()), atol=1e-5, rtol=1e-5)
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_dropout_acts_where_pefts_does(build, kind):
    ours = perturb(attach(build(kind), rank=4, alpha=12, dropout=0.3, target_modules=LINEARS[kind], seed=0))
    theirs = peft_model(build(kind), kind, lora_dropout=0.3)
    give_to_peft(ours, theirs)
    logits = []
    for model in (ours, theirs):
        model.train()
        torch.manual_seed(5)  # dropout masks are drawn for the same number of elements in the same order
        logits.append(gradients_of(model, inputs()))
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-5)
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_bf16_base_keeps_fp32_adapters_as_peft(build, kind):
    ours = perturb(attach(build(kind).bfloat16(), rank=4, alpha=12, target_modules=LINEARS[kind], seed=0))
    theirs = peft_model(build(kind).bfloat16(), kind)
    give_to_peft(ours, theirs)
    assert {layer.lora_A.dtype for layer in adapter_layers(ours).values()} == {torch.float32}
    mine, peft = gradients_of(ours, inputs()), gradients_of(theirs, inputs())
    assert mine.dtype == torch.bfloat16
    assert (mine - peft).norm() <= 0.02 * peft.norm()  # bf16 rounds by up to 1/256 at each of many places


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_autocast_agrees_with_peft(build, kind):
    ours = perturb(attach(build(kind), rank=4, alpha=12, target_modules=LINEARS[kind], seed=0))
    theirs = peft_model(build(kind), kind)
    give_to_peft(ours, theirs)
    with torch.autocast("cpu", torch.bfloat16):
        mine, peft = gradients_of(ours, inputs()), gradients_of(theirs, inputs())
    assert (mine - peft).norm() <= 0.05 * peft.norm()  # bf16 rounds by up to 1/256 at each of many places
    assert_same_gradients(ours, theirs, tolerance=0.15)  # of bf16, in a sum that cancels


@pytest.mark.parametrize("kind", ["bert", "gpt2", "gemma", "gpt2_classifier"])
def test_all_linear_means_what_it_means_in_peft(build, kind):
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    task = "SEQ_CLS" if kind in HEADS else None
    theirs = get_peft_model(build(kind), LoraConfig(target_modules="all-linear", task_type=task))
    expected = [name for name, module in theirs.base_model.model.named_modules() if isinstance(module, LoraLayer)]
    assert list(adapter_layers(attach(build(kind)))) == expected


@pytest.mark.parametrize(
    "target", [["query"], ["attention.output.dense"], r".*layer\.1\..*(query|value)", ["key", "value"]]
)
def test_names_and_regexes_match_as_in_peft(build, target):
    from peft.tuners.lora import LoraLayer

    theirs = peft_model(build("bert"), "bert", target_modules=target)
    expected = [name for name, module in theirs.base_model.model.named_modules() if isinstance(module, LoraLayer)]
    assert expected
    assert list(adapter_layers(attach(build("bert"), target_modules=target))) == expected


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_initial_values_follow_pefts_distribution(build, init):
    ours = attach(build("bert"), rank=16, init=init, seed=0)
    torch.manual_seed(0)
    theirs = peft_model(build("bert"), "bert", r=16, init_lora_weights=True if init == "kaiming" else "gaussian")
    mine = torch.cat([layer.lora_A.flatten() for layer in adapter_layers(ours).values() if layer.in_features == 32])
    peft = torch.cat([p.flatten() for name, p in theirs.named_parameters() if "lora_A" in name and p.shape[1] == 32])
    assert mine.std().item() == pytest.approx(peft.std().item(), rel=0.05)  # ~6000 draws: 1 % standard error
    assert mine.abs().max().item() == pytest.approx(peft.abs().max().item(), rel=0.3)


# --- files -----------------------------------------------------------------------------------------------------------

FILES = ["bert", "distilbert", "gpt2", "gpt2_classifier", "gemma"]


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_our_file_with_equal_logits(build, tmp_path, kind, rslora):
    from peft import PeftModel

    ours = perturb(attach(build(kind), rank=4, alpha=12.5, rslora=rslora, seed=0))
    save_adapter(ours, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(build(kind), tmp_path / "adapter").eval()
    expected = ours(**inputs()).logits
    assert not torch.allclose(expected, build(kind)(**inputs()).logits, atol=1e-3)
    torch.testing.assert_close(theirs(**inputs()).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("attached", [False, True])
def test_we_load_pefts_file_with_equal_logits(build, tmp_path, kind, attached):
    theirs = peft_model(build(kind), kind)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    ours = build(kind)
    if attached:
        attach(ours, rank=4, alpha=12, target_modules=LINEARS[kind])
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(**inputs()).logits, theirs(**inputs()).logits, atol=1e-5, rtol=1e-5)
    if kind in HEADS:
        assert list(ours.lorakit_attachment.trained) == HEADS[kind]


def test_rank_and_alpha_patterns_are_honoured_and_written_back(build, tmp_path):
    from peft import PeftModel

    patterns = {"rank_pattern": {"query": 2, "layer.1.output.dense": 6}, "alpha_pattern": {"value": 40}}
    theirs = peft_model(build("bert"), "bert", **patterns, init_lora_weights=False)
    theirs.save_pretrained(tmp_path / "peft")
    ours = load_adapter(build("bert"), tmp_path / "peft")
    expected = theirs(**inputs()).logits
    torch.testing.assert_close(ours(**inputs()).logits, expected, atol=1e-5, rtol=1e-5)
    assert {layer.settings.rank for layer in adapter_layers(ours).values()} == {2, 4, 6}
    save_adapter(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(build("bert"), tmp_path / "ours").eval()
    torch.testing.assert_close(again(**inputs()).logits, expected, atol=1e-5, rtol=1e-5)


def test_excluded_and_layerwise_targets_of_a_peft_file_are_honoured(build, tmp_path):
    options = {"layers_to_transform": [1], "target_modules": ["query", "key"], "exclude_modules": ["key"]}
    theirs = peft_model(build("bert"), "bert", **options, init_lora_weights=False)
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(build("bert"), tmp_path)
    assert list(adapter_layers(ours)) == ["bert.encoder.layer.1.attention.self.query"]
    torch.testing.assert_close(ours(**inputs()).logits, theirs(**inputs()).logits, atol=1e-5, rtol=1e-5)


def test_the_files_hold_the_same_names_and_shapes(build, tmp_path):
    from safetensors.torch import load_file

    save_adapter(attach(build("distilbert"), rank=4, target_modules=LINEARS["distilbert"]), tmp_path / "ours")
    peft_model(build("distilbert"), "distilbert").save_pretrained(tmp_path / "peft")
    mine, peft = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "peft"))
    assert {name: t.shape for name, t in mine.items()} == {name: t.shape for name, t in peft.items()}
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["pre_classifier", "classifier"] and config["task_type"] == "SEQ_CLS"


@pytest.mark.parametrize(
    ("options", "named"),
    [({"bias": "lora_only"}, "bias"), ({"use_dora": True, "bias": "lora_only"}, "bias")],
)
def test_peft_features_we_lack_are_refused_by_name(build, tmp_path, options, named):
    from lorakit.errors import CheckpointError

    peft_model(build("bert"), "bert", **options).save_pretrained(tmp_path)
    model = build("bert")
    with pytest.raises(CheckpointError, match=named):
        load_adapter(model, tmp_path)
    assert not hasattr(model, "lorakit_attachment")


def test_an_initialisation_that_changed_the_base_is_refused(build, tmp_path):
    from lorakit.errors import CheckpointError

    peft_model(build("bert"), "bert", init_lora_weights="pissa").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="init_lora_weights='pissa'"):
        load_adapter(build("bert"), tmp_path)


def test_another_method_than_the_attached_is_refused_by_name(build, tmp_path):
    from peft import IA3Config, get_peft_model

    from lorakit.errors import CheckpointError

    config = IA3Config(target_modules=["query"], feedforward_modules=[])
    get_peft_model(build("bert"), config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="IA3"):
        load_adapter(attach(build("bert")), tmp_path)
