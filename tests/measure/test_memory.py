"""Predicted peak memory against the allocations torch's profiler measures; formulas for the steady parts."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks._profiled import measured_step_peak, training_step
from lorakit import adapters
from lorakit.errors import ParameterError
from lorakit.measure.live import KINDS, LiveBytes
from lorakit.measure.memory import cuda_peak_bytes, predict_step_memory, reset_cuda_peak
from lorakit.settings import Gating
from lorakit.tokens import build_tokens

ROWS, TOKENS = 8, 64


@pytest.fixture(params=["bert", "gpt2", "gemma"])
def build(request):
    """A factory of one architecture, and its batch."""
    factory = request.getfixturevalue(f"tiny_{request.param}")
    ids = torch.randint(1, 99, (ROWS, TOKENS))
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    labels = ids[:, 0] % 2 if request.param == "bert" else ids
    return factory, {"input_ids": ids, "attention_mask": mask, "labels": labels}


def attached(factory, method: str) -> nn.Module:
    base, method = (adapters.quantize_nf4(factory()), "lora") if method == "nf4" else (factory(), method)
    return adapters.attach(base, method, seed=0)


def measured(factory, batch, method, autocast=None, gradient_checkpointing=False) -> int:
    def prepare():
        model = attached(factory, method)
        model.config.use_cache = False
        if gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        return training_step(model, {name: value.clone() for name, value in batch.items()}, autocast)

    # with AVX-512 but not its bf16, oneDNN's products in bf16 take room of their own, counted as the step's
    emulated = torch.cpu._is_avx512_supported() and not torch.cpu._is_avx512_bf16_supported()
    with torch.backends.mkldnn.flags(enabled=not (emulated and autocast)):
        return measured_step_peak(prepare)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {}),
        ("full", {}),
        ("head", {}),
        ("lora", {"autocast": "bf16"}),
        ("full", {"autocast": "bf16"}),
        ("lora", {"gradient_checkpointing": True}),
        ("hira", {"autocast": "bf16"}),
        ("hira", {"gradient_checkpointing": True}),
        ("nf4", {}),
        ("nf4", {"autocast": "bf16", "gradient_checkpointing": True}),
    ],
)
def test_prediction_equals_measurement(build, method, options):
    factory, batch = build
    predicted = predict_step_memory(attached(factory, method), batch, **options)
    assert predicted["peak"] == pytest.approx(measured(factory, batch, method, **options), rel=0.01)
    assert predicted["peak"] == sum(predicted[kind] for kind in KINDS)


@pytest.mark.parametrize("method", ["lora", "hira"])
def test_meta_model_predicts_as_the_real_one(build, method):
    factory, batch = build

    def on_meta():
        with torch.device("meta"):
            model = factory()
        return adapters.attach(model, method, seed=0)

    real = predict_step_memory(adapters.attach(factory(), method, seed=0), batch)
    assert predict_step_memory(on_meta(), batch) == real


@pytest.mark.parametrize("checkpointing", [False, True])
def test_model_batch_and_random_state_are_left_alone(build, checkpointing):
    factory, batch = build
    model = factory().eval()
    parameters, weights = list(model.parameters()), [p.clone() for p in model.parameters()]
    attributes = _attributes(model)
    config, random, given = model.config.to_dict(), torch.get_rng_state(), dict(batch)
    predict_step_memory(model, batch, gradient_checkpointing=checkpointing)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(a, b) and a.grad is None for a, b in zip(model.parameters(), weights, strict=True))
    assert _attributes(model) == attributes and model.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), random) and batch == given


def _attributes(model: nn.Module) -> list[dict[str, str]]:
    skipped = ("_parameters", "_buffers", "_modules")
    return [{key: repr(value) for key, value in vars(m).items() if key not in skipped} for m in model.modules()]


def test_model_is_put_back_when_the_step_fails(tiny_gpt2):
    model = tiny_gpt2()
    parameters = list(model.parameters())
    with pytest.raises(ValueError):
        predict_step_memory(model, {"no_such_input": torch.zeros(1)})
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_checkpointing_already_on_is_predicted_and_kept(tiny_gemma):
    ids = torch.randint(1, 99, (ROWS, TOKENS))
    model, batch = tiny_gemma(), {"input_ids": ids, "labels": ids}
    expected = predict_step_memory(model, batch, gradient_checkpointing=True)
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert predict_step_memory(model, batch) == expected
    assert model.is_activation_checkpointing
    assert expected["peak"] < predict_step_memory(tiny_gemma(), batch)["peak"]


def choosing_step(model: nn.Module, batch, settings, autocast=None):
    """One step on chosen tokens, as the trainer does it."""
    tokens = build_tokens(settings, model.train(), "causal")
    optimizer = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    inputs = {name: value.clone() for name, value in batch.items()}
    labels = inputs.pop("labels")

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
            loss = tokens.select(model, inputs, labels).finish()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@pytest.mark.parametrize("mode", ["gather", "fractional"])
@pytest.mark.parametrize(("method", "autocast"), [("flora", None), ("random", None), ("flora", "bf16")])
def test_prediction_with_chosen_tokens_equals_measurement(tiny_gemma, mode, method, autocast):
    ids = torch.randint(1, 99, (ROWS, TOKENS))
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[0, 40:] = 0
    labels[:, :10] = labels[0, 40:] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    settings = Gating(method=method, topk_tokens=0.25, mode=mode, per="sequence", sketch_dim=64)

    def made():
        model = adapters.attach(tiny_gemma(), "lora", seed=0)
        model.config.use_cache = False
        return model

    model = made()
    tokens = build_tokens(settings, model, "causal")
    state = tokens.state_dict()
    predicted = predict_step_memory(model, batch, tokens=tokens, autocast=autocast)
    assert tokens.state_dict() == state  # a prediction draws nothing
    assert predicted["peak"] == sum(predicted[kind] for kind in KINDS)
    measured = measured_step_peak(lambda: choosing_step(made(), batch, settings, autocast))
    assert predicted["peak"] == pytest.approx(measured, rel=0.05)
    if mode == "fractional" and not autocast:
        plain = predict_step_memory(made(), batch)
        assert predicted["activations"] + predicted["logits"] < 0.97 * (plain["activations"] + plain["logits"])


def test_all_tokens_are_predicted_as_the_plain_step(tiny_gemma):
    ids = torch.randint(1, 99, (ROWS, TOKENS))
    model, batch = tiny_gemma(), {"input_ids": ids, "labels": ids}
    every = build_tokens(Gating(method="flora", topk_tokens=1.0), model, "causal")
    assert predict_step_memory(model, batch, tokens=every) == predict_step_memory(model, batch)


class Wide(nn.Module):
    """One linear layer and a sum: every byte can be counted by hand."""

    def __init__(self, inner: int, outer: int):
        super().__init__()
        self.layer = nn.Linear(inner, outer, bias=False)

    def forward(self, x):
        return SimpleNamespace(loss=self.layer(x).sum())


@pytest.mark.parametrize(
    ("optimizer", "bytes_per_parameter"),
    [("adamw_torch", 8), ("adamw_torch_fused", 8), ("sgd", 0), ("adamw_8bit", 2 + 2 * 4 / 256 + 2048 / (64 * 256))],
)
def test_optimizer_state(optimizer, bytes_per_parameter):
    predicted = predict_step_memory(Wide(64, 256), {"x": torch.zeros(2, 64)}, optimizer=optimizer)
    assert predicted["parameters"] == 4 * 64 * 256
    assert predicted["optimizer"] == pytest.approx(bytes_per_parameter * 64 * 256, abs=8)  # 4: the step counter


def test_update_of_all_tensors_at_once_needs_a_temporary_of_all():
    model = nn.Sequential(Wide(256, 256), Wide(256, 256))
    model.forward = lambda x: model[1](model[0].layer(x))
    one_by_one, at_once = (
        predict_step_memory(model, {"x": torch.zeros(1, 256)}, device=device)["peak"] for device in ("cpu", "cuda")
    )
    matrix = 4 * 256 * 256
    # weights, gradients, moments; Adam's three of one
    assert one_by_one == pytest.approx((2 * 4 + 3) * matrix, rel=0.01)
    assert at_once == pytest.approx((2 * 4 + 2) * matrix, rel=0.01)  # and √v of all


def test_tied_weights_count_once(tiny_gpt2):
    ids = torch.randint(1, 99, (2, 8))
    model = tiny_gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    tensors = [*model.parameters(), *model.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert predict_step_memory(model, {"input_ids": ids, "labels": ids})["parameters"] == sum(storages.values())


def test_large_vocabulary_shows_as_logits(tiny_gemma):
    """Nothing but the logits grows with the vocabulary, apart from the embedding."""
    ids = torch.randint(1, 99, (4, 32))
    with torch.device("meta"):
        models = [adapters.attach(tiny_gemma(vocab_size=size), "lora", seed=0) for size in (20_000, 40_000)]
    small, large = (predict_step_memory(model, {"input_ids": ids, "labels": ids}) for model in models)
    assert large["logits"] == pytest.approx(2 * small["logits"], rel=1e-3) and small["logits"] >= 4 * 4 * 32 * 20_000
    assert large["activations"] == pytest.approx(small["activations"], rel=1e-3)
    assert large["parameters"] - small["parameters"] == 4 * 32 * 20_000


def test_attention_dropout_keeps_no_square_matrix_on_cuda(tiny_bert):
    def activations(device: str, tokens: int) -> int:
        batch = {"input_ids": torch.ones(4, tokens, dtype=torch.long), "labels": torch.zeros(4, dtype=torch.long)}
        return predict_step_memory(tiny_bert(), batch, device=device)["activations"]

    square = 4 * (4 * 2 * 256 * 256)  # (B, heads, T, T) in fp32
    assert activations("cpu", 256) - activations("cuda", 256) > 2 * square


@pytest.mark.parametrize(
    ("trains", "options", "name"),
    [
        (True, {"optimizer": "adam"}, "optimizer"),
        (True, {"autocast": "fp8"}, "autocast"),
        (True, {"device": "mps"}, "device"),
        (False, {}, "trainable"),
    ],
)
def test_bad_input(trains, options, name):
    with pytest.raises(ParameterError, match=name):
        predict_step_memory(Wide(4, 4).requires_grad_(trains), {"x": torch.zeros(1, 4)}, **options)


class Twice(nn.Module):
    """hidden feeds two products, whose gradients for it are added up."""

    def __init__(self, flat: bool):
        super().__init__()
        self.flat, self.up, self.down = flat, nn.Parameter(torch.randn(8, 256)), nn.Parameter(torch.randn(256, 8))

    def forward(self, x):  # (B, T, 8)
        hidden = torch.relu(x.flatten(0, 1) @ self.up if self.flat else x @ self.up)  # the one large tensor
        return SimpleNamespace(loss=(hidden @ self.down).square().sum() + (hidden @ self.down).square().sum())


@pytest.mark.parametrize("flat", [False, True])
def test_a_second_gradient_is_added_in_place_unless_it_is_a_view(flat):
    batch = {"x": torch.zeros(ROWS, 128, 8)}
    predicted = predict_step_memory(Twice(flat), batch)["peak"]
    measured = measured_step_peak(lambda: training_step(Twice(flat), {"x": batch["x"].clone()}))
    assert predicted == pytest.approx(measured, rel=0.01)


def test_live_bytes_follow_births_views_and_deaths():
    gc.collect()
    with LiveBytes() as live:
        a = torch.empty(100)  # 400
        b = a.view(10, 10)  # the same storage
        b.add_(1)
        c = a + 1  # 800
        del a, b, c
        torch.empty(150)  # 600 after all else is gone
    assert live.peak() == {**dict.fromkeys(KINDS, 0), "activations": 800, "peak": 800}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_no_cuda_no_measurement():
    reset_cuda_peak()
    assert cuda_peak_bytes() is None


@pytest.mark.cuda
def test_cuda_measurement():
    reset_cuda_peak()
    held = torch.empty(1 << 20, device="cuda")
    assert cuda_peak_bytes() >= held.nbytes


@pytest.mark.cuda
def test_prediction_for_cuda_is_near_the_measurement(tiny_gemma):
    ids = torch.randint(1, 99, (16, 64), device="cuda")
    model, batch = tiny_gemma().cuda(), {"input_ids": ids, "labels": ids}
    model.config.use_cache = False
    step = training_step(model, batch)
    step()
    reset_cuda_peak()
    step()
    assert predict_step_memory(model, batch, device="cuda")["peak"] == pytest.approx(cuda_peak_bytes(), rel=0.15)
