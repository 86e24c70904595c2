"""`with disabled(model):` is the frozen base, bit for bit, and leaves nothing behind."""

from __future__ import annotations

import peft
import peft_types
import pytest
import skipping
import torch
from peft_types import attached, batch
from small_models import HEADS, STILL, gradients, peft_model, perturb
from torch import nn

import lorakit
from lorakit.adapters import attach, detach, is_merged, merge
from lorakit.errors import LorakitError, ParameterError

build, light_collections = peft_types.build, peft_types.light_collections


def ours(method, **options):
    return lambda model: perturb(attach(model, method, rank=4, seed=0, **options))


def pefts(peft_type):
    return lambda model: perturb(attached(model, peft_type))


def plain(method, **options):
    """PEFT's own model, every trained value moved."""

    def wrapped(model):
        kind, task = ("bert", "SEQ_CLS") if "Bert" in type(model).__name__ else ("gpt2", "CAUSAL_LM")
        if method in ("PromptTuning", "PrefixTuning"):
            config = getattr(peft, f"{method}Config")(task_type=task, num_virtual_tokens=3)
            wrapper = peft.get_peft_model(model, config).eval()
        else:
            wrapper = peft_model(model, kind, method, **options)
        with torch.no_grad():
            for p in wrapper.parameters():
                p.add_(p.requires_grad * 0.1 * torch.randn(p.shape))
        return wrapper

    return wrapped


MODELS = {
    "lora": ours("lora"),
    "sparse": ours("sparse"),
    "hira": ours("hira"),
    **{name: pefts(name) for name in ("LORA", "DORA", "ADALORA", "IA3", "LN_TUNING", "POLY")},
    **{name: pefts(name) for name in ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING")},
    "plain LORA": plain("Lora"),
    "plain DORA": plain("Lora", use_dora=True),
    "plain LORA of tokens": plain("Lora", trainable_token_indices=[5, 6, 7]),
    "plain ADALORA": plain("AdaLora", total_step=20),
    "plain PROMPT_TUNING": plain("PromptTuning"),
    "plain PREFIX_TUNING": plain("PrefixTuning"),
}
# PEFT has no Conv1D for POLY
CASES = [(name, kind) for name in MODELS for kind in ("bert", "gpt2") if (name, kind) != ("POLY", "gpt2")]
CASES += [("ADAPTION_PROMPT", "gpt2"), ("TRAINABLE_TOKENS", "gpt2"), ("BEFT", "gemma"), ("SHADOW", "gpt2")]
cases = pytest.mark.parametrize(("name", "kind"), CASES)


def made(build, name, kind, **overrides):
    return MODELS.get(name, pefts(name))(build(kind, **overrides))


def outputs(model):
    with torch.no_grad():
        out = model(**batch(getattr(model, "_orig_mod", model)))
    return [out.loss, out.logits]


def same(one, other):
    return all(map(torch.equal, one, other))


def base(build, kind, model, **overrides):
    """The model built anew, with the head that `model` has trained."""
    twin = build(kind, **overrides)
    for name in HEADS.get(kind, []):
        (head,) = [module for path, module in model.named_modules() if path.endswith(name)]
        head = head.modules_to_save["default"] if hasattr(head, "modules_to_save") else head
        assert not torch.equal(head.weight, twin.get_submodule(name).weight)
        twin.get_submodule(name).load_state_dict(head.state_dict())
    return twin


def state(model):
    """What must be the same afterwards."""
    modules = list(model.modules())
    own = [{name: value for name, value in vars(module).items() if name[0] != "_"} for module in modules]
    hooks = [[*m._forward_hooks.values(), *m._forward_pre_hooks.values(), *m._backward_hooks.values()] for m in modules]
    disabled = [getattr(module, "disable_adapters", None) for module in modules]
    return modules, [p.requires_grad for p in model.parameters()], [str(values) for values in own], hooks, disabled


# --- what it computes, and what it leaves ----------------------------------------------------------------------------


@cases
def test_inside_it_is_the_base_and_afterwards_as_before(build, name, kind):
    model = made(build, name, kind)
    expected, before, held = outputs(base(build, kind, model)), outputs(model), state(model)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    assert not torch.equal(before[1], expected[1])
    with lorakit.disabled(model) as given:
        assert given is model and same(outputs(model), expected)
        assert all(p.requires_grad == flag for p, flag in flags)
        with lorakit.disabled(model):
            assert same(outputs(model), expected)
        assert same(outputs(model), expected)
    assert same(outputs(model), before) and state(model) == held
    with pytest.raises(ZeroDivisionError), lorakit.disabled(model), lorakit.disabled(model):
        raise ZeroDivisionError
    assert same(outputs(model), before) and state(model) == held


@pytest.mark.parametrize("name", ["lora", "sparse", "hira", "LORA", "DORA", "IA3", "LN_TUNING", "ADALORA"])
def test_what_is_merged_is_unmerged_inside(build, name):
    model = made(build, name, "bert")
    merge(model)
    merged, expected, held = outputs(model), outputs(base(build, "bert", model)), state(model)
    with lorakit.disabled(model), lorakit.disabled(model):
        assert same(outputs(model), expected)
    assert is_merged(model) and same(outputs(model), merged) and state(model)[1:3] == held[1:3]
    with pytest.raises(ZeroDivisionError), lorakit.disabled(model):
        raise ZeroDivisionError
    assert is_merged(model) and same(outputs(model), merged)


@pytest.mark.parametrize("name", ["lora", "LORA"])
def test_what_is_merged_and_not_finite_is_merged_again(build, name):
    model = made(build, name, "bert")
    with torch.no_grad():
        next(p for path, p in model.named_parameters() if "lora_B" in path).fill_(torch.inf)
    with lorakit.disabled(merge(model)):
        assert outputs(model)[1].isfinite().all()
    assert is_merged(model)


@pytest.mark.parametrize("name", ["lora", "hira", "LORA"])
def test_a_base_in_four_bits(build, name):
    model = made(build, name, "nf4")
    twin = detach(attach(build("nf4"), trainable=()))  # whose layers are mended as the model's are
    (head,) = [m for path, m in model.named_modules() if path.endswith("classifier")]
    head = head.modules_to_save["default"] if name == "LORA" else head
    twin.classifier.load_state_dict(head.state_dict())
    expected, before = outputs(twin), outputs(model)
    with lorakit.disabled(model):
        assert same(outputs(model), expected)
    assert same(outputs(model), before) and not same(before, expected)
    if name != "LORA":
        merged = outputs(merge(model))
        with lorakit.disabled(model):
            assert same(outputs(model), expected)
        assert same(outputs(model), merged) and is_merged(model)


@pytest.mark.parametrize("name", ["lora", "sparse", "hira", "LORA", "PREFIX_TUNING", "plain DORA"])
def test_under_autocast(build, name):
    model = made(build, name, "bert")
    with torch.autocast("cpu", torch.bfloat16):
        expected = outputs(base(build, "bert", model))
        with lorakit.disabled(model):
            assert same(outputs(model), expected)
    with lorakit.disabled(model):
        assert not same(outputs(model), expected)


@pytest.mark.parametrize("name", ["lora", "LORA", "PROMPT_TUNING"])
def test_a_compiled_model(build, name):
    torch._dynamo.reset()
    model = made(build, name, "bert", num_hidden_layers=1)
    compiled, expected = torch.compile(model, backend="eager"), outputs(base(build, "bert", model, num_hidden_layers=1))
    before = outputs(compiled)
    with lorakit.disabled(compiled) as given:
        assert given is compiled and same(outputs(compiled), expected)
    assert same(outputs(compiled), before) and not same(before, expected)


@pytest.mark.parametrize("name", ["LORA", "IA3", "PROMPT_TUNING", "PREFIX_TUNING", "plain PROMPT_TUNING", "lora"])
def test_generating(build, name):
    model, ids = made(build, name, "gpt2"), torch.randint(3, 99, (2, 5))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    with lorakit.disabled(model):
        assert torch.equal(model.generate(**given), build("gpt2").generate(**given))


def test_tokens_read_past_their_forward(build):
    model, untouched = made(build, "plain LORA of tokens", "bert"), build("bert").bert.embeddings.word_embeddings
    embedding = model.base_model.model.bert.embeddings.word_embeddings
    assert not torch.equal(embedding.weight, untouched.weight)
    with lorakit.disabled(model):
        assert torch.equal(embedding.weight, untouched.weight)


@torch.no_grad()
def test_a_prompt_is_no_reason_to_refuse_positions(build):
    model, packed = made(build, "PROMPT_TUNING", "gpt2"), {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]])}
    packed |= batch(model)
    with pytest.raises(LorakitError, match="drops their positions"):
        model(**packed)
    with lorakit.disabled(model):
        assert torch.equal(model(**packed).logits, build("gpt2")(**packed).logits)


def test_a_layer_whose_weight_is_read_past_its_forward():
    def encoder():
        torch.manual_seed(0)
        return nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)).eval()

    model, x = perturb(attach(encoder(), rank=2, trainable=(), seed=0)), torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = encoder()(x)
        assert not torch.allclose(model(x), expected)
        with lorakit.disabled(model):
            assert torch.equal(model(x), expected)


def test_experts_mixed_by_xlora(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    def llama():
        torch.manual_seed(0)
        sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, pad_token_id=0, use_cache=False)).eval()

    expert = {"target_modules": ["q_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    peft.get_peft_model(llama(), peft.LoraConfig(**expert)).save_pretrained(tmp_path)
    config = peft.XLoraConfig("CAUSAL_LM", hidden_size=32, adapters={"0": str(tmp_path), "1": str(tmp_path)})
    model, expected = peft.get_peft_model(llama(), config).eval(), outputs(llama())
    before, held = outputs(model), state(model)
    assert not same(before, expected)
    with lorakit.disabled(model), lorakit.disabled(model):
        assert same(outputs(model), expected)
    assert same(outputs(model), before) and state(model)[1:] == held[1:]


# --- around a training step ------------------------------------------------------------------------------------------


def step(model, between):
    """The gradients of a loss, with something between its forward and its backward."""
    model.zero_grad()
    loss = model(**batch(model)).loss
    between(loss)
    grads = gradients(model)
    assert grads and all(grad is not None for name, grad in grads.items() if "original" not in name)
    return [grad.clone() for grad in grads.values()]


@pytest.mark.parametrize("name", ["lora", "sparse", "hira", "LORA", "DORA", "PREFIX_TUNING", "plain LORA"])
def test_a_graph_made_before_keeps_its_gradients(build, name):
    model = made(build, name, "bert", **STILL["bert"]).train()

    def after(loss):
        with lorakit.disabled(model):
            outputs(model)
        loss.backward()

    def inside(loss):
        with lorakit.disabled(model):
            outputs(model)
            loss.backward()

    def together(loss):
        with lorakit.disabled(model):
            reference = model(**batch(model)).loss
        torch.autograd.backward([loss, 0 * reference])

    expected = step(model, lambda loss: loss.backward())
    for between in (after, inside, together):
        assert same(step(model, between), expected), between


@pytest.mark.parametrize("name", ["lora", "hira", "LORA"])
def test_adapters_draw_no_dropout_inside(build, name):
    given = {"rank": 4, "dropout": 0.5, "seed": 0} | ({"peft_type": "LORA"} if name == "LORA" else {})
    model = perturb(attach(build("bert", **STILL["bert"]), "peft" if name == "LORA" else name, **given)).train()
    expected, start = outputs(base(build, "bert", model, **STILL["bert"])), torch.get_rng_state()
    with lorakit.disabled(model):
        assert same(outputs(model), expected) and torch.equal(torch.get_rng_state(), start)
        assert model.training
    assert not same(outputs(model), outputs(model))  # which draw it outside


@skipping.both
def test_the_probes_of_skiplora_see_nothing_inside(build, tiny_bert):
    model, skip = skipping.prepared(build, tiny_bert)
    skip.begin_step(0.5)
    model(**skipping.batch()).loss.backward()

    def seen():
        return [(p.active, p.fresh, p.measuring, p.squares.tolist(), p.valid.tolist()) for p in skip.probes]

    before = seen()
    with lorakit.disabled(model):
        model(**skipping.batch(rows=4, tokens=8)).loss.item()
    assert seen() == before


# --- where there is nothing to switch off, or nothing may change -----------------------------------------------------


def test_an_adapter_in_a_part_of_the_model(build):
    model, expected = build("bert"), outputs(build("bert"))
    perturb(attach(model.bert, trainable=(), seed=0))
    assert not same(outputs(model), expected)
    with lorakit.disabled(model):
        assert same(outputs(model), expected)


@pytest.mark.parametrize("given", [None, "head", "full"])
def test_a_model_without_an_adapter_is_refused(build, given):
    model = build("bert") if given is None else attach(build("bert"), given)
    for refused in (model, torch.compile(model, backend="eager")):
        with (
            pytest.raises(ParameterError, match="model='BertForSequenceClassification': needs an adapter, from attach"),
            lorakit.disabled(refused),
        ):
            raise AssertionError


@pytest.mark.parametrize("make", [plain("Lora"), pefts("LORA")])
def test_what_peft_merged_itself_is_refused(build, make):
    model = make(build("bert"))
    model.merge_adapter()
    before = outputs(model)
    with pytest.raises(LorakitError, match=r"model\.unmerge_adapter\(\) first"), lorakit.disabled(model):
        raise AssertionError
    assert same(outputs(model), before)


@pytest.mark.parametrize("name", ["lora", "LORA"])
@pytest.mark.parametrize("call", [merge, detach])
def test_nothing_is_merged_or_taken_off_inside(build, name, call):
    model = made(build, name, "bert")
    before = outputs(model)
    with lorakit.disabled(model), pytest.raises(LorakitError, match="leave `with disabled"):
        call(model)
    assert same(outputs(model), before) and not is_merged(model)
    call(model)


def test_what_was_off_stays_off(build):
    model = made(build, "plain LORA", "gpt2")
    layer = model.base_model.model.transformer.h[0].mlp.c_fc
    layer.enable_adapters(False)
    before = outputs(model)
    with lorakit.disabled(model):
        assert same(outputs(model), outputs(build("gpt2")))
    assert layer.disable_adapters and same(outputs(model), before)
