"""Any PEFT method as a row: every type of PEFT trains, saves, loads, merges and comes off again, or says why not."""

from __future__ import annotations

import peft_types
import pytest
import torch
from peft_types import IN_THE_TRAINER, attached, batch, logits, train
from small_models import bits, same_bits

from lorakit import adapters
from lorakit.adapters.peft.method import CANNOT_MERGE
from lorakit.adapters.peft.types import CANNOT, VARIANTS
from lorakit.errors import LorakitError, ParameterError

build, light_collections = peft_types.build, peft_types.light_collections

PEFT_0_21 = """
    PROMPT_TUNING MULTITASK_PROMPT_TUNING P_TUNING PREFIX_TUNING LORA ADALORA ADAMSS BOFT ADAPTION_PROMPT IA3
    BEFT LILY LOHA LOKR OFT POLY LN_TUNING VERA FROD PVERA FOURIERFT GLORA XLORA HRA VBLORA UNILORA CPT MISS
    RANDLORA ROAD TRAINABLE_TOKENS HIRA SHIRA C3A WAVEFT OSF DELORA GRALORA CARTRIDGE TINYLORA PSOFT PEANUT
    SHADOW SUPERTUNING DEFT
"""
TYPES = PEFT_0_21.split()
# the last block's shadow state is read by nobody, nor is the shadow's own embedding; GLoRA's D scales a zero bias
NOTHING_TO_LEARN = {"SHADOW": ("h.1.", "layer.1.", "layers.1.", "word_embeddings", "wte", "pooler", "shadow_head")}
NOTHING_TO_LEARN["GLORA"] = ("glora_D",)


def may_stay(peft_type, name):
    return any(part in name for part in NOTHING_TO_LEARN.get(peft_type, ()))


def runs(peft_type, model):
    kind, _ = VARIANTS.get(peft_type, (peft_type, {}))
    tags = {"bert": {"bert", "classify", "head"}, "gpt2": {"gpt2", "causal", "Conv1D"}, "gemma": {"gemma3_text"}}
    return not CANNOT.get(kind, {}).keys() & (tags[model] | {"any"})


CASES = [(name, kind) for name in (*TYPES, *VARIANTS) for kind in ("bert", "gpt2", "gemma") if runs(name, kind)]
# Gemma where GPT-2 cannot: its layers are plain linear ones
CASES = [(name, kind) for name, kind in CASES if kind != "gemma" or (name, "gpt2") not in CASES]


def test_every_type_of_peft_runs_or_says_why_not():
    from peft import PeftType

    assert {kind.value for kind in PeftType} == set(TYPES)
    assert CANNOT.keys() <= set(TYPES)
    assert {name for name, _ in CASES} | {"XLORA"} == {*TYPES, *VARIANTS}
    assert len(IN_THE_TRAINER) >= 10


@pytest.mark.parametrize(("peft_type", "kind"), CASES)
def test_a_type_trains_saves_loads_merges_and_comes_off(build, tmp_path, peft_type, kind):
    from safetensors.torch import load_file

    model = build(kind)
    modules, flags = list(model.modules()), [p.requires_grad for p in model.parameters()]
    base, start = bits(model), logits(model)
    own = list(model.parameters())
    wrapper = attached(model, peft_type)
    frozen = {name: p.detach().clone() for name, p in wrapper.named_parameters() if not p.requires_grad}

    still = train(wrapper)
    assert all(may_stay(peft_type, name) for name in still), still
    for name, p in wrapper.named_parameters():
        assert name not in frozen or torch.equal(p, frozen[name]), name
    trained = logits(wrapper)
    assert trained.shape == start.shape
    assert not torch.allclose(trained, start, atol=1e-4)

    adapters.save_adapter(wrapper, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert adapters.adapter_bytes(wrapper) == sum(t.numel() * t.element_size() for t in tensors.values())
    loaded = adapters.load_adapter(build(kind), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), trained, atol=1e-6, rtol=1e-6)
    heads = ("classifier",) * (kind == "bert")
    assert [tuple(side.lorakit_attachment.trained) for side in (wrapper, loaded)] == [heads, heads]
    if peft_type != "P_TUNING":  # whose file is without its encoder
        assert adapters.parameter_stats(loaded).trainable == adapters.parameter_stats(wrapper).trainable

    kept = adapters.adapter_state(wrapper)
    train(wrapper, steps=1)
    assert not torch.equal(logits(wrapper), trained)
    adapters.load_adapter_state(wrapper, kept)
    torch.testing.assert_close(logits(wrapper), trained, atol=1e-6, rtol=1e-6)

    before = bits(wrapper)
    assert adapters.can_merge(wrapper) == (peft_type not in CANNOT_MERGE and (peft_type, kind) != ("BEFT", "gemma"))
    if adapters.can_merge(wrapper):
        learning = sum(p.requires_grad for p in wrapper.parameters())
        with adapters.merged(wrapper):
            torch.testing.assert_close(logits(wrapper), trained, atol=1e-5, rtol=1e-5)
            assert adapters.is_merged(wrapper) is True
            assert sum(p.requires_grad for p in wrapper.parameters()) == learning
    else:
        with pytest.raises(LorakitError, match=f"{VARIANTS.get(peft_type, [peft_type])[0]} cannot be merged: "):
            adapters.merge(wrapper)
    assert not adapters.is_merged(wrapper)
    assert same_bits(wrapper, before)

    assert adapters.detach(wrapper.train()) is model and all(module.training for module in model.modules())
    model.eval()
    assert list(model.modules()) == modules and [p.requires_grad for p in model.parameters()] == flags
    assert all(a is b for a, b in zip(model.parameters(), own, strict=True))
    for name, tensor in bits(model).items():
        assert torch.equal(tensor, base[name]) == (not name.startswith("classifier")), name
    model.load_state_dict(base)
    assert torch.equal(logits(model), start)
    attached(model, peft_type)  # and it can be attached again


PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CARTRIDGE")


@pytest.mark.parametrize(
    ("peft_type", "kind"),
    [(name, "masked") for name in PROMPTS]
    + [(name, "distilbert") for name in PROMPTS[:2]]
    + [(name, "distilbert") for name in ("DORA", "IA3", "SHADOW", "LN_TUNING")]
    + [(name, "gpt2_classifier") for name in ("PREFIX_TUNING", "CARTRIDGE", "IA3", "DORA")]
    + [(name, "masked") for name in ("LORA", "POLY", "ADALORA", "SHADOW")]
    + [(name, "nf4") for name in ("DORA", "VERA", "OFT", "IA3")],
)
def test_other_models_train_as_well(build, peft_type, kind):
    model = build(kind)
    start = logits(model)
    wrapper = attached(model, peft_type)
    still = train(wrapper)
    assert all(may_stay(peft_type, name) for name in still), still
    assert logits(wrapper).shape == start.shape
    assert not torch.allclose(logits(wrapper), start, atol=1e-4)
    if kind == "nf4":
        assert not adapters.can_merge(wrapper)
        with pytest.raises(LorakitError, match="round the sum to 4 bits again"):
            adapters.merge(wrapper)


# --- what cannot run -------------------------------------------------------------------------------------------------

HAS = {"any": "bert", "classify": "bert", "head": "bert", "score": "gpt2_classifier", "Conv1D": "gpt2"}
HAS |= {"4 bits": "nf4", "masked": "masked", "bert": "bert", "distilbert": "distilbert", "gemma3_text": "gemma"}
REFUSED = [(name, tag) for name, reasons in CANNOT.items() for tag in reasons]


def refused_model(build, peft_type, tag):
    """A model that shows the reason `tag`; ADAPTION_PROMPT has another one on BERT."""
    return build("gpt2_classifier" if (peft_type, tag) == ("ADAPTION_PROMPT", "head") else HAS[tag])


@pytest.mark.parametrize(("peft_type", "tag"), REFUSED)
def test_what_cannot_run_is_refused_with_its_reason(build, peft_type, tag):
    model = refused_model(build, peft_type, tag)
    before = bits(model)
    with pytest.raises(ParameterError) as error:
        attached(model, peft_type)
    assert CANNOT[peft_type][tag] in str(error.value) and error.value.name == "peft_type"
    assert bits(model).keys() == before.keys() and not hasattr(model, "lorakit_attachment")


@pytest.mark.parametrize(("peft_type", "tag"), REFUSED)
def test_the_reasons_are_true(build, monkeypatch, peft_type, tag):
    """Past the refusal it does fail."""
    monkeypatch.delitem(CANNOT, peft_type)
    model = refused_model(build, peft_type, tag)
    if tag == "head":  # the head stays as random as it is
        wrapper = attached(model, peft_type)
        assert not [name for name, p in wrapper.named_parameters() if p.requires_grad and "score" in name]
        assert not [name for name, p in wrapper.named_parameters() if p.requires_grad and "classifier" in name]
    elif tag == "score":  # padding changes the prediction
        wrapper, ids = attached(model, peft_type), torch.full((1, 5), 7)
        padded = torch.cat([ids, torch.zeros(1, 3, dtype=torch.long)], dim=1)
        short, long = (wrapper(input_ids=x, attention_mask=(x > 0).long()).logits for x in (ids, padded))
        assert not torch.allclose(short, long, atol=1e-2)
    elif peft_type == "XLORA":
        model.config.use_cache = False
        with pytest.warns(UserWarning), pytest.raises(ParameterError, match="nothing in this model would be trained"):
            attached(model, peft_type, peft_options={"hidden_size": 32})
    else:
        with pytest.raises((ParameterError, ValueError, RuntimeError)):  # by PEFT, or by the first forward
            attached(model, peft_type)(**batch(model))
