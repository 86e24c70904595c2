"""Latency, environment and `lorakit plan`."""

from __future__ import annotations

import contextlib
import copy
import getpass
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lorakit import models
from lorakit.adapters import attach, quantize_nf4
from lorakit.base.nf4 import scale_tensors
from lorakit.errors import LorakitError, ParameterError
from lorakit.gates import HeadGradientGate
from lorakit.measure import environment
from lorakit.measure.latency import inference_latency
from lorakit.measure.live import KINDS
from lorakit.measure.memory import predict_step_memory
from lorakit.measure.weights import weight_table
from lorakit.runs import fits, plan
from lorakit.sketches import FrequentDirections, TensorSketch


class Slow(nn.Module):
    """Takes n**2 seconds for its n-th call, by a clock of its own; notes the state it was called in."""

    def __init__(self):
        super().__init__()
        self.inner, self.calls, self.clock = nn.Dropout(), [], 0.0

    def forward(self, x):
        self.calls.append((self.training, self.inner.training, torch.is_inference_mode_enabled()))
        self.clock += len(self.calls) ** 2


def test_latency_is_the_median_after_the_warm_up(monkeypatch):
    model = Slow()
    monkeypatch.setattr("time.perf_counter", lambda: model.clock)
    assert inference_latency(model, {"x": torch.zeros(1)}, repeats=3, warmup=2) == 16_000  # of 9, 16 and 25 s
    assert len(model.calls) == 5


@pytest.mark.parametrize("fails", [False, True])
def test_latency_runs_in_evaluation_and_restores_the_modes(fails):
    model = Slow()
    model.inner.eval()
    with pytest.raises(TypeError) if fails else contextlib.nullcontext():
        inference_latency(model, {"y" if fails else "x": torch.zeros(1)}, repeats=1)
    assert set(model.calls) == (set() if fails else {(False, False, True)})
    assert model.training and not model.inner.training


def test_environment_says_what_and_not_who():
    found = environment.environment()
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["lorakit"]
    text = json.dumps(found)
    assert platform.node() not in text.split() and str(Path.home()) not in text and str(Path.cwd()) not in text
    assert getpass.getuser() not in text.split()


def test_a_clone_says_its_commit_and_whether_code_or_params_are_other(tmp_path):
    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        done = subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    assert environment.checkout(tmp_path) == {}
    git("init")
    assert environment.checkout(tmp_path) == {}  # nothing was committed
    for folder in ("lorakit", "params", "results"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a").write_text("one")
    git("add", ".")
    git("commit", "-m", "x")
    clean = {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "results" / "a").write_text("another")
    assert environment.checkout(tmp_path) == clean
    assert environment.checkout(tmp_path / "lorakit") == {}  # somebody else's repository around an installed package
    for changed in ("params/a", "lorakit/new"):
        (tmp_path / changed).write_text("another")
        assert environment.checkout(tmp_path) == clean | {"dirty": True}
        git("stash", "-u")


def test_environment_imports_none_of_the_packages_it_reports():
    code = (
        "import sys; from lorakit.measure.environment import environment; environment();"
        "print([name for name in ('transformers', 'peft', 'datasets', 'bitsandbytes') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "no-such-package-here"))
    assert environment.environment()["versions"]["no-such-package-here"] is None


def test_code_fingerprint_follows_the_code_and_not_the_place(tmp_path, monkeypatch):
    first, fresh = environment.code_fingerprint(), environment.code_fingerprint.__wrapped__
    copied = tmp_path / "elsewhere"
    shutil.copytree(Path(environment.__file__).parents[1], copied, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(environment, "__file__", str(copied / "measure" / "environment.py"))
    assert fresh() == first
    file = copied / "errors.py"
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert fresh() == first
    file.write_bytes(file.read_bytes() + b"# more\n")
    changed = fresh()
    file.rename(copied / "error.py")
    assert len({first, changed, fresh()}) == 3


@pytest.fixture
def folder(tiny_gpt2, tmp_path):
    """A local folder with a configuration and nothing else."""
    tiny_gpt2().config.save_pretrained(tmp_path)
    return str(tmp_path)


def test_plan_prints_the_prediction_by_kind_and_what_fits(folder, capsys):
    assert fits.main([folder, "--batch", "2", "--seq", "16", "--rank", "4", "--targets", "c_attn,c_proj"]) == 0
    out = capsys.readouterr().out
    predicted = plan.predict(plan.Plan(model=folder, batch=2, seq=16, rank=4, targets=["c_attn", "c_proj"]))
    assert "predicted" in out and "assumed" in out and "measured" not in out
    assert f"{predicted.trainable:,} of {predicted.total:,} parameters" in out
    for kind, size in predicted.memory.items():
        assert f"{kind:12s} {size / 2**30:10.3f} GiB" in out
    assert out.count(" fits ") == len(fits.GPU_SIZES_GB)
    # rank 4 on c_attn (32 -> 96) and two c_proj (32 -> 32, 128 -> 32), twice
    assert predicted.trainable == 2 * 4 * (32 + 96 + 32 + 32 + 128 + 32)


def test_plan_margins():
    def printed(peak):
        memory = dict.fromkeys(KINDS, 0) | {"peak": peak * plan.GIB}
        return fits.report(plan.Plan(model="gpt2"), plan.Prediction(memory, 1, 2, 3, "packaged dimensions", 512, 768))

    assert "predicted need 12.0 GiB" in printed(10)
    table = printed(20).splitlines()[-len(fits.GPU_SIZES_GB) :]  # needs 23 GiB: 24.7 GB
    assert [line.split()[2] for line in table] == ["does"] * 4 + ["fits"] * 4


@pytest.mark.parametrize("kind", ["causal", "classify"])
@pytest.mark.parametrize("method", ["lora", "head", "full"])
def test_plan_builds_every_kind_and_method(folder, kind, method):
    predicted = plan.predict(plan.Plan(model=folder, method=method, batch=2, seq=16, kind=kind))
    assert predicted.memory["parameters"] > 0 and predicted.trainable > 0


def test_plan_options_change_what_they_should(folder):
    def memory(**options):
        return plan.predict(plan.Plan(model=folder, batch=4, seq=64, **options)).memory

    base, wide = memory(), memory(dtype="fp32", method="full")
    assert memory(gradient_checkpointing=True)["peak"] < base["peak"]
    assert wide["parameters"] > 1.7 * memory(method="full")["parameters"]  # the causal masks' buffers stay
    assert memory(optimizer="sgd")["optimizer"] == 0 < base["optimizer"]
    assert memory(dtype="fp32", precision="bf16")["activations"] != memory(dtype="fp32")["activations"]


@pytest.mark.parametrize("kind", ["causal", "classify"])
def test_a_plan_in_4_bits_is_the_prediction_for_a_model_really_quantised(folder, kind):
    """Weights as `weight_table` has them, and the whole peak as of the real packed layers."""

    def planned(quantize):
        return plan.predict(plan.Plan(model=folder, batch=2, seq=16, rank=4, quantize=quantize, kind=kind, loss="nll"))

    config = models.describe(folder).config
    shape, real = plan.build(config, kind, "bf16"), plan.build(config, kind, "bf16").to_empty(device="cpu")
    real.tie_weights()
    for parameter in real.parameters():
        nn.init.normal_(parameter)
    real = attach(quantize_nf4(real), rank=4)
    predicted, plain = planned("nf4"), planned("none")
    assert (predicted.trainable, predicted.total) == (plain.trainable, plain.total)
    assert predicted.memory["parameters"] < plain.memory["parameters"]
    assert predicted.memory == predict_step_memory(real, plan.make_batch(2, 16, kind), device="cuda")
    adapters = next(row["bytes"] for row in weight_table(real)["rows"] if row["kind"] == "adapters")
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in shape.buffers())
    plan.quantize_meta(shape)
    assert predicted.memory["parameters"] == weight_table(shape)["base"]["bytes"] + adapters + buffers


def test_layers_quantised_without_data_have_the_form_of_real_ones_and_leave_those_quantisable(monkeypatch):
    def form(weight):
        state, tensors = weight.quant_state, (weight, *scale_tensors(weight))
        kept = [getattr(state, name) for name in ("shape", "dtype", "blocksize", "quant_type", "nested")]
        return kept, state.state2.blocksize, [(tensor.shape, tensor.dtype) for tensor in tensors]

    real = nn.Sequential(nn.Linear(96, 50), nn.Linear(7, 3, bias=False)).bfloat16()  # neither in whole blocks
    empty = copy.deepcopy(real).to("meta")
    monkeypatch.setattr("bitsandbytes.functional.name2qmap", {})  # as in a process that quantised nothing yet
    plan.quantize_meta(empty)
    for layer, other in zip(quantize_nf4(real), empty, strict=True):
        assert form(layer.weight) == form(other.weight) and type(layer) is type(other)
        assert (layer.compute_dtype, layer.bias is None) == (other.compute_dtype, other.bias is None)
    assert real[0].bias.dtype == empty[0].bias.dtype and empty[0].weight.is_meta


def test_plan_in_4_bits_on_the_command_line(folder, capsys):
    assert fits.main([folder, "--seq", "16", "--quantize", "nf4"]) == 0
    assert "nf4 linear layers, other bf16 weights" in capsys.readouterr().out
    fits.main([folder, "--seq", "16"])
    assert "nf4" not in capsys.readouterr().out


def test_a_plan_with_chosen_tokens_keeps_less_in_memory(folder, capsys):
    def planned(**options):
        return plan.predict(plan.Plan(model="gemma-3-270m", batch=4, seq=128, **options)).memory

    plain, exact = planned(loss="nll"), planned()
    gather, fractional = planned(tokens=0.2), planned(tokens=0.2, mode="fractional")
    rows, few = 508 // 3 + 1, 8  # three chunks in 16 bits, of which few rows at a time are in 32
    assert exact["logits"] == (2 * rows + 4 * few) * 262_144 < 96 * 2**20 < 0.1 * plain["logits"]
    assert exact["activations"] == pytest.approx(plain["activations"], rel=0.05)
    assert gather["logits"] < 0.6 * plain["logits"] and gather["peak"] > exact["peak"]
    assert fractional["activations"] < 0.6 * exact["activations"] and fractional["peak"] < exact["peak"]
    assert fits.main([folder, "--seq", "16", "--tokens", "0.2", "--mode", "fractional"]) == 0
    assert "20 % of the tokens (fractional)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tokens": 0.0}, "tokens=0.0: a share inside"),
        ({"mode": "masked"}, "mode='masked'"),
        ({"tokens": 0.2, "mode": "fractional", "gradient_checkpointing": True}, "gradient_checkpointing=True: drops"),
        ({"tokens": 0.2, "precision": "fp16"}, "precision='fp16'"),
        ({"quantize": "nf4", "method": "full"}, "quantize='nf4'.*'full'"),
        ({"quantize": "nf4", "precision": "fp16"}, "precision='fp16'.*NF4"),
    ],
)
def test_plan_refuses_what_a_run_would(folder, options, named):
    with pytest.raises(ParameterError, match=named):
        plan.Plan(model=folder, **options)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        *(("--batch", "0", None), ("--seq", "0", None), ("--seq", "-1", None), ("--seq", "65", "seq=65: at most 64")),
        *(("--dtype", "nf5", None), ("--precision", "int8", None), ("--quantize", "nf5", None), ("--rank", "0", None)),
        *(("--method", "lara", None), ("--optimizer", "lion", None), ("--kind", "masked", None)),
        *(("--kind", "image", None), ("--targets", "q_proj,x", "target_modules")),
    ],
)
def test_plan_refuses(folder, option, value, message):
    """By the parameter's name and the value as it would be written in Python, where no other message is given."""
    written = value if value.lstrip("-").isdigit() else repr(value)
    with pytest.raises(ParameterError, match=message or f"{option[2:]}={written}"):
        fits.main([folder, "--seq", "16", option, value])


def test_plan_of_an_unknown_model(tmp_path):
    with pytest.raises(LorakitError, match="no-such"):
        fits.main([str(tmp_path / "no-such-model")])


@pytest.mark.parametrize(("model", "seq"), [("toy-encoder", 256), ("bert-base-uncased", 512), ("gemma-3-270m", 512)])
def test_a_plan_without_a_length_is_of_what_the_model_takes(model, seq, capsys):
    assert fits.main([model, "--batch", "1"]) == 0
    assert f"batch 1 x {seq} tokens" in capsys.readouterr().out


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "gpu", "mps"])
@pytest.mark.parametrize("made", [
    lambda device: HeadGradientGate(8, 5, device=device), lambda device: FrequentDirections(8, 4, device=device),
    lambda device: TensorSketch(4, 4, 8, generator=torch.Generator(), device=device),
])  # fmt: skip
def test_a_device_that_is_not_there_is_one_sentence(device, made):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(ParameterError, match=f"^device='{device}': is not there: .*; there are cpu, cuda") as caught:
        made(device)
    assert "\n" not in str(caught.value)
