"""The exact loss against the plain one: losses, gradients, FLOPs, memory and statistics, whatever the head is."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import training_runs as runs
import transformers
from decoders import SIZES, adapted, assert_close, batch, gradients, of, prepared, split
from torch import Tensor, nn

from lorakit.adapters import attach
from lorakit.base.quantize import quantize_nf4
from lorakit.errors import LorakitError, ParameterError
from lorakit.head import Head, find_head, rows
from lorakit.measure.flops import FlopCount
from lorakit.settings import Gating, TokenSettings
from lorakit.tokens import build_tokens
from lorakit.tokens.head_loss import HeadLoss, cheapest
from lorakit.training.loss import MeanLoss, example_statistics


def exact(model: nn.Module, kind: str = "causal", loss: str = "exact", **options):
    given = {"loss": TokenSettings(loss=loss)} | options
    return build_tokens(Gating(), model, kind, **given)


def scaled(name: str, **options) -> nn.Module:
    """A decoder whose logits are multiplied (Cohere) or divided (Granite)."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES | {"initializer_range": 0.2} | options)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def with_head(target: str = "", **options) -> nn.Module:
    """Llama with its head adapted, or its head's weight trained, or both ends tied and trained."""
    model = of("llama", **options)
    if target:
        return prepared(attach(model, "lora", rank=4, seed=0, target_modules=["q_proj", target]))
    model = adapted(model)
    model.get_output_embeddings().weight.requires_grad_()
    return model


def peft_model() -> nn.Module:
    import peft

    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    return prepared(peft.get_peft_model(of("llama"), config))


def four_bit() -> nn.Module:
    model = of("llama")
    quantize_nf4(model)
    return adapted(model)


def masked() -> nn.Module:
    model = prepared(attach(runs.tiny_masked(tie_word_embeddings=False), "lora", rank=4, seed=0)).eval()
    nn.init.normal_(model.get_output_embeddings().bias)
    return model


MODELS = {
    "llama": lambda: adapted(of("llama")),
    "gpt2": lambda: adapted(of("gpt2")),
    "soft-capped": lambda: adapted(of("gemma", final_logit_softcapping=1.5)),
    "logits multiplied": lambda: adapted(scaled("Cohere", logit_scale=0.3)),
    "logits divided": lambda: adapted(scaled("Granite", logits_scaling=3.0)),
    "masked, with a bias": masked,
    "head trained": with_head,
    "head tied and trained": lambda: with_head(tie_word_embeddings=True),
    "head adapted": lambda: with_head("lm_head"),
    "PEFT, head trained": peft_model,
    "NF4": four_bit,
}


def case(name: str) -> tuple[nn.Module, dict[str, Tensor], Tensor, str]:
    model, given = MODELS[name](), batch("prompt")
    given["labels"][0, 3:6] = -100
    return model, *split(given), "masked" if "masked" in name else "causal"


def plain(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor, kind: str, smoothing: float = 0.0) -> Tensor:
    return MeanLoss(kind, smoothing)(model(**inputs), labels)


def mean(tokens, model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    return tokens.select(model, inputs, labels).finish() / tokens.divisor(labels)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_every_gradient_are_the_plain_ones(monkeypatch, name, chunk, smoothing):
    monkeypatch.setattr(HeadLoss, "chunk", chunk)
    model, inputs, labels, kind = case(name)
    expected = plain(model, inputs, labels, kind, smoothing)
    truth = gradients(model, expected)
    tokens = exact(model, kind, smoothing=smoothing)
    tokens.verify(model, inputs, labels)
    found = mean(tokens, model, inputs, labels)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
    assert_close(gradients(model, found), truth, 5e-3 if name == "NF4" else 2e-6)  # whose layers work in bfloat16


@pytest.mark.parametrize("name", ["llama", "soft-capped", "logits multiplied", "masked, with a bias", "head trained"])
def test_under_autocast(name):
    """bf16 and fp16 with a scaler: as near to float32's gradient as the plain step is, and to the plain one."""
    model, inputs, labels, kind = case(name)
    truth = gradients(model, plain(model, inputs, labels, kind))
    size = torch.cat([g.flatten() for g in truth.values()]).norm()

    def off(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
        return float(torch.cat([(one[n] - other[n]).flatten() for n in other]).norm() / size)

    for dtype, scale in ((torch.bfloat16, 1.0), (torch.float16, 2.0**12)):
        with torch.autocast("cpu", dtype):
            theirs = gradients(model, scale * plain(model, inputs, labels, kind))
            ours = gradients(model, scale * mean(exact(model, kind), model, inputs, labels))
        theirs, ours = ({n: g / scale for n, g in made.items()} for made in (theirs, ours))
        assert off(ours, truth) < 1.2 * off(theirs, truth) + 1e-6
        assert off(ours, theirs) < (2e-2 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.parametrize("mode", ["", "gather", "fractional"])
@pytest.mark.parametrize("name", ["llama", "head trained"])
def test_the_loss_is_made_under_the_models_own_autocast(name, mode):
    """accelerate puts autocast around the model's forward, not around what is made of it afterwards."""
    model, inputs, labels, kind = case(name)
    chosen = Gating(method="random", topk_tokens=0.5, mode=mode) if mode else Gating()
    tokens, wrapped = (build_tokens(chosen, model, kind, loss=TokenSettings()) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        inside = tokens.select(model, inputs, labels).finish()
    outside = wrapped.select(torch.autocast("cpu", torch.bfloat16)(model.forward), inputs, labels).finish()
    assert torch.equal(inside, outside) and inside.dtype == torch.float32
    assert_close(gradients(model, outside), gradients(model, inside), 1e-6)


def test_rare_words_are_not_rounded_to_nothing_in_half_precision():
    """At the start of training every probability of 200,000 words is 5e-6: below fp16's normal numbers."""
    words = 200_000
    torch.manual_seed(0)
    module = nn.Linear(16, words, bias=False).requires_grad_(False)
    with torch.no_grad():
        module.weight[: words // 2] += 1.0
    states, targets = (0.01 * torch.randn(4, 16)).requires_grad_(), torch.tensor([1, 2, words - 1, words - 2])
    truth = torch.autograd.grad(F.cross_entropy(module(states), targets, reduction="sum"), states)[0]
    loss = HeadLoss(Head(module, 16, words, None), TokenSettings())
    with torch.autocast("cpu", torch.float16):
        found = torch.autograd.grad(loss(states, targets), states)[0]
    assert (found - truth).norm() < 2e-3 * truth.norm()


@pytest.mark.parametrize("name", ["llama", "soft-capped", "head trained"])
def test_dft_weighs_each_loss_by_its_own_probability(name):
    model, inputs, labels, kind = case(name)
    where, targets = rows(labels, kind)
    logs = F.log_softmax(model(**inputs).logits.flatten(0, 1)[where], dim=1).gather(1, targets[:, None])
    expected = (-logs * logs.exp().detach()).mean()
    truth = gradients(model, expected)
    found = mean(exact(model, kind, "dft"), model, inputs, labels)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
    assert_close(gradients(model, found), truth, 2e-6)


@pytest.mark.parametrize("loss", ["exact", "dft"])
@pytest.mark.parametrize("room", ["kept", "not kept"])
@pytest.mark.parametrize("rate", [0.3, 0.9])
def test_a_batch_that_waits_for_a_gate_gets_the_same_gradient(monkeypatch, rate, room, loss):
    """Its logits are kept, made again or their gradient made at once; what the gate sees are all predictions, once."""
    monkeypatch.setattr(HeadLoss, "chunk", 7)
    if room == "not kept":
        monkeypatch.setattr(HeadLoss, "room", 1.0)

    class Look:
        def __init__(self):
            self.rate, self.seen = rate, []

        def __call__(self, hidden, logits, labels, losses):
            torch.testing.assert_close(F.cross_entropy(logits, labels, reduction="none"), losses)
            self.seen.append(losses)

    monkeypatch.setattr(HeadLoss, "__post_init__", lambda self: None)
    model, inputs, labels, kind = case("soft-capped")
    tokens, look = exact(model, kind, loss), Look()
    truth = gradients(model, mean(tokens, model, inputs, labels))
    selected = tokens.select(model, inputs, labels, look)
    assert selected.made == ("keep" if room == "kept" else "now" if rate > 0.5 else "")
    nll = plain(model, inputs, labels, kind) * tokens.divisor(labels)
    torch.testing.assert_close(torch.cat(look.seen).sum(), nll, rtol=1e-5, atol=0)
    found = selected.finish() / tokens.divisor(labels)
    torch.testing.assert_close(found.double() * tokens.divisor(labels), selected.loss_sum, rtol=1e-5, atol=0)
    assert_close(gradients(model, found), truth, 2e-6)


# FLOPs and memory -----------------------------------------------------------------------------------


def counted(function) -> tuple[object, int]:
    with FlopCount() as count:
        result = function()
    return result, int(count.total)


@pytest.mark.parametrize("plan", ["keep", "again", "now"])
def test_flops_are_those_of_the_formulas(monkeypatch, plan):
    model, inputs, labels, kind = case("llama")
    rate = {"keep": 0.3, "again": 0.3, "now": 0.8}[plan]
    look = type("Look", (), {"rate": rate, "__call__": lambda *_: None})()
    tokens = exact(model, kind)
    room = math.inf if plan == "keep" else 1.0
    assert cheapest(rate * 20, 20, 40.0, room) == plan
    monkeypatch.setattr(HeadLoss, "room", 2.0**20 if plan == "keep" else 1.0)
    monkeypatch.setattr(HeadLoss, "chunk", 9)
    product = 2 * tokens.divisor(labels) * tokens.head.outputs * tokens.head.d_hidden
    trunk = counted(lambda: model.base_model(**inputs))[1]
    selected, looked = counted(lambda: tokens.select(model, inputs, labels, look))
    loss, finished = counted(selected.finish)
    assert looked - trunk == (2 if plan == "now" else 1) * product
    assert finished == {"keep": 1, "again": 2, "now": 0}[plan] * product
    (selected, looked), (_, finished) = counted(lambda: tokens.select(model, inputs, labels)), (None, 0)
    loss, finished = counted(selected.finish)
    assert (looked, finished) == (trunk, 2 * product)
    head = tokens.head
    plain_step = counted(lambda: plain(model, inputs, labels, kind).backward())[1]
    ours = looked + finished + counted(loss.backward)[1]
    left_out = labels.numel() - tokens.divisor(labels)
    assert plain_step - ours == 4 * left_out * head.outputs * head.d_hidden


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("softcap", "work"), [(None, 6), (30.0, 14)])
def test_all_that_is_as_wide_as_logits_fits_the_bound_at_any_time(dtype, softcap, work):
    from lorakit.measure.live import LiveBytes

    module = nn.Linear(4, 500, bias=False, dtype=dtype).requires_grad_(False)
    live, states = LiveBytes(), torch.randn(90, 4, dtype=dtype, requires_grad=True)
    live.logit_width = 500
    live.claim(module.weight, "parameters")
    loss = HeadLoss(Head(module, 4, 500, softcap), TokenSettings(logits_mib=(16.5 * work * 500) / 2**20))
    with live:
        loss(states, torch.randint(0, 500, (90,))).backward()
    wide = [entry for entry in live._all if entry.kind == "logits"]
    most = max(sum(other.nbytes for other in wide if other.born <= one.born < other.died) for one in wide)
    assert loss.chunk == 16 and 0.6 < most / (16 * work * 500) <= 1


def test_chunks_follow_the_bound_and_the_head():
    for mib, half, capped, chunk, wide in (
        (96, False, None, 64, 88), (96, True, None, 64, 176), (384, True, None, 256, 752), (112, True, 30.0, 32, 200)
    ):  # fmt: skip
        dtype = torch.bfloat16 if half else torch.float32
        module = nn.Linear(2, 262_144, bias=False, device="meta", dtype=dtype).requires_grad_(False)
        loss = HeadLoss(Head(module, 2, 262_144, capped), TokenSettings(logits_mib=mib))
        assert (loss.chunk, loss.wide(module.weight)) == (chunk, wide)
    assert HeadLoss(Head(module, 2, 262_144, None, scale=0.5), TokenSettings(logits_mib=112)).chunk == 32
    module.requires_grad_()
    assert HeadLoss(Head(module, 2, 262_144, None), TokenSettings(logits_mib=128)).chunk == 32


# evaluation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "soft-capped", "masked, with a bias"])
def test_statistics_of_an_evaluation_are_those_of_all_logits(monkeypatch, name):
    monkeypatch.setattr(HeadLoss, "chunk", 7)
    model, inputs, labels, kind = case(name)
    labels[1] = -100  # a row without a prediction
    model.eval()
    with torch.no_grad():
        expected = example_statistics(model(**inputs).logits, labels, kind)
        found = exact(model, kind, smoothing=0.3).statistics(model, inputs, labels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert expected[1].tolist() == [0, 0, 0, 0] and expected[0, 3] > 0


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_virtual_tokens_stand_before_the_words(smoothing):
    """Of PEFT's prompt tuning: the head is given more states than there are labels."""
    model = prepared(
        attach(of("llama"), "peft", peft_type="PROMPT_TUNING", peft_options={"num_virtual_tokens": 3}, seed=0)
    )
    inputs, labels = split(batch())
    tokens = exact(model, smoothing=smoothing)
    tokens.verify(model, inputs, labels)
    truth = gradients(model, plain(model, inputs, labels, "causal", smoothing))
    assert_close(gradients(model, mean(tokens, model, inputs, labels)), truth, 2e-6)
    model.eval()
    with torch.no_grad():
        expected = example_statistics(model(**inputs).logits, labels, "causal")
        torch.testing.assert_close(tokens.statistics(model, inputs, labels), expected, rtol=1e-5, atol=0)


def test_smoothed_labels_are_in_the_sums_behind_a_gate():
    model, inputs, labels, kind = case("soft-capped")
    tokens = exact(model, kind, smoothing=0.2)
    selected = tokens.select(model, inputs, labels, lambda *_: None)
    expected = plain(model, inputs, labels, kind, 0.2) * tokens.divisor(labels)
    torch.testing.assert_close(selected.loss_sum.float(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(selected.finish(), expected, rtol=1e-5, atol=0)


def test_a_head_that_is_pefts_own_is_checked_by_itself():
    """Once its adapter is no longer 0, as on resuming, its logits are not those of the weight that PEFT shows."""
    import peft

    model = prepared(peft.get_peft_model(of("llama"), peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj"])))
    inputs, labels = split(batch())
    exact(model).verify(model, inputs, labels)
    truth = gradients(model, plain(model, inputs, labels, "causal"))
    assert_close(gradients(model, mean(exact(model), model, inputs, labels)), truth, 2e-6)


@pytest.mark.parametrize("length", [2, 3, 5])
def test_rows_of_few_tokens(length):
    model, (inputs, labels) = adapted(of("llama")), split(batch("bare"))
    inputs, labels = {name: value[:, :length] for name, value in inputs.items()}, labels[:, :length]
    tokens = exact(model)
    tokens.verify(model, inputs, labels)
    torch.testing.assert_close(mean(tokens, model, inputs, labels), plain(model, inputs, labels, "causal"))


# bad input ------------------------------------------------------------------------------------------


def test_without_a_prediction_the_loss_is_zero_and_so_are_gradients():
    model, inputs, labels, kind = case("llama")
    loss = exact(model, kind).select(model, inputs, torch.full_like(labels, -100)).finish()
    assert loss == 0 and all(not grad.any() for grad in gradients(model, loss).values())


class Doubled(transformers.LlamaForCausalLM):
    """A head that does more than a linear map."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * 2
        return outputs


class Penalised(transformers.LlamaForCausalLM):
    """A loss of its own."""

    def forward(self, *args, labels=None, **kwargs):
        outputs = super().forward(*args, labels=labels, **kwargs)
        outputs.loss = None if outputs.loss is None else outputs.loss + 1
        return outputs


@pytest.mark.parametrize(("make", "told"), [(Doubled, "not the head's linear map"), (Penalised, "its own loss is")])
def test_a_model_whose_loss_is_another_is_refused_and_told_the_remedy(make, told):
    model = prepared(attach(make(transformers.LlamaConfig(**SIZES)), "lora", rank=2, seed=0))
    tokens, (inputs, labels) = exact(model), split(batch())
    with pytest.raises(LorakitError, match=rf"{told}.*loss 'nll'"):
        tokens.verify(model, inputs, labels)


def test_what_the_loss_cannot_be_is_an_error():
    model = adapted(of("llama"))
    row = 6 * 99 / 2**20
    with pytest.raises(ParameterError, match=r"^logits_mib=0.0005: must be at least 0.00056\d*: one row of 99 words"):
        build_tokens(Gating(), model, "causal", loss=TokenSettings(logits_mib=0.0005))
    assert build_tokens(Gating(), model, "causal", loss=TokenSettings(logits_mib=row)).loss.chunk == 1
    with pytest.raises(ParameterError, match="^loss='dft': .*label_smoothing_factor=0.1"):
        exact(model, "causal", "dft", smoothing=0.1)
    for loss in ("dft", "liger"):
        with pytest.raises(ParameterError, match=f"^loss='{loss}': needs a language model"):
            exact(runs.tiny_bert(), "classify", loss)
    assert not exact(runs.tiny_bert(), "classify").makes_loss
    with pytest.raises(ParameterError, match="^loss='liger': needs (the package liger-kernel|the model on CUDA)"):
        exact(model, "causal", "liger")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_ligers_kernel_gives_the_same_gradient():
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    model, inputs, labels, kind = case("soft-capped")
    model, labels = model.cuda(), labels.cuda()
    inputs = {name: value.cuda() for name, value in inputs.items()}
    expected = gradients(model, mean(exact(model, kind), model, inputs, labels))
    assert_close(gradients(model, mean(exact(model, kind, "liger"), model, inputs, labels)), expected, 1e-3)


def test_a_heads_scale_is_read_from_the_config():
    assert find_head(scaled("Cohere", logit_scale=0.3), "causal").scale == 0.3
    assert find_head(scaled("Granite", logits_scaling=4.0), "causal").scale == 0.25
    assert find_head(of("llama"), "causal").scale == 1.0
