"""What choosing tokens saves by mode and fraction: FLOPs, predicted memory, seconds of a step; what scoring costs."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from benchmarks._common import NO_TARGET, Claim, interleave, keep_memory, time_claim
from benchmarks.gate import gemma, gemma_1b, gemma_270m
from benchmarks.lora import build_ours
from lorakit.studies.token_costs import step_flops

DESCRIPTION = "FLoRA: a step on chosen tokens against a step on all, by mode and fraction"
TARGET = (
    "Gemma 270M 4x256, every token a target, fractional: FLOPs <= 0.70 at 20 %, <= 0.62 at 10 %; activations <= 0.35; "
    "seconds <= 0.75; gradient at fraction 1 within 1e-5. gather: peak on Gemma 1B T=2048 <= 0.45; bitwise at fraction "
    "1. scoring <= 0.02 of a forward's FLOPs"
)
CHOICES = [(mode, fraction) for mode in ("gather", "fractional") for fraction in (0.1, 0.2, 0.4)]
ROUNDS = 6
SCORES = ("sketch", "gradient_norm", "loss", "entropy", "hidden_gradient")


def run() -> list[Claim]:
    timed = seconds_claims()  # first, as in a run: what the others leave of the heap slows the larger blocks
    claims = flop_claims() + memory_claims() + scoring_claims()
    return [*claims, gradient_claim(), bitwise_claim(), *timed]


def selection(model: nn.Module, fraction: float, mode: str, score: str = "sketch", method: str = "flora") -> Any:
    from lorakit.settings import Gating
    from lorakit.tokens import build_tokens

    return build_tokens(Gating(method=method, topk_tokens=fraction, mode=mode, score=score), model, "causal")


def batch_of(shape: tuple[int, int], targets: float = 1.0) -> dict[str, torch.Tensor]:
    """Ids, mask and labels (B, T); the first tokens of a row are a prompt, so that `targets` of all are predicted."""
    ids = torch.ones(shape, dtype=torch.long)
    labels = ids.clone()
    labels[:, : round((1 - targets) * shape[1])] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@functools.cache
def bare(build: Callable[[], nn.Module]) -> nn.Module:
    """The adapted model without data, weights in bfloat16."""
    with torch.device("meta"):
        return build_ours(build().bfloat16()).train()


# FLOPs ---------------------------------------------------------------------------------------------


def flop_claims() -> list[Claim]:
    """The step, every token a target and a quarter of them; without a choice the head still leaves the others out."""
    model, claims = bare(gemma_270m), []
    for targets, told in ((1.0, ""), (0.25, ", 25 % targets")):
        batch = batch_of((4, 256), targets)
        plain = step_flops(model, batch) / 1e9
        choices = {f"{mode} {fraction:.0%}": selection(model, fraction, mode) for mode, fraction in CHOICES}
        for name, tokens in {"no choice": selection(model, 0.9999, "gather", method="random"), **choices}.items():
            goal = {"fractional 20%": 0.70, "fractional 10%": 0.62}.get(name + told, NO_TARGET)
            claims.append(
                Claim(f"{name}{told}: step FLOPs", step_flops(model, batch, tokens) / 1e9, plain, goal, "GFLOP")
            )
    return claims


def scoring_claims() -> list[Claim]:
    """What a score adds to the forward pass that has made the logits."""
    from lorakit.measure.dry import fake, fake_mode, faked
    from lorakit.measure.flops import FlopCount

    model, batch = bare(gemma_270m), batch_of((4, 256))
    count = batch["labels"][:, 1:].numel()
    mode = fake_mode()
    with faked(model, mode), torch.no_grad():
        inputs = {name: fake(mode, value) for name, value in batch.items()}
        with mode, FlopCount() as forward:
            model(**inputs)
    extra = {}
    for score in SCORES:
        head = model.get_output_embeddings().weight
        product = 2 * head.numel() * count if score == "hidden_gradient" else 0
        extra[score] = product + selection(model, 0.2, "gather", score).score.flops(count)
    goals = dict.fromkeys(SCORES, 1.02) | {"hidden_gradient": NO_TARGET}
    forwards = forward.total / 1e9
    return [Claim(f"scoring by {s}", forwards + extra[s] / 1e9, forwards, goals[s], "GFLOP") for s in SCORES]


# memory --------------------------------------------------------------------------------------------


def memory_claims() -> list[Claim]:
    """Predicted peaks in MiB, bf16 weights and autocast."""
    from lorakit.measure.memory import predict_step_memory

    model = bare(gemma_270m)
    large, long = bare(gemma_1b), batch_of((1, 2048))
    predict = functools.partial(predict_step_memory, autocast="bf16", device="cuda")
    plain, mib, claims = predict(model, batch_of((4, 256))), 2**20, []
    for mode, fraction in CHOICES:
        name = f"{mode} {fraction:.0%}"
        made = predict(model, batch_of((4, 256)), tokens=selection(model, fraction, mode))
        goal = 0.35 if name == "fractional 20%" else NO_TARGET
        ours, theirs = _activations(made) / mib, _activations(plain) / mib
        claims.append(Claim(f"{name}: predicted activations", ours, theirs, goal, "MiB"))
        claims.append(Claim(f"{name}: predicted peak", made["peak"] / mib, plain["peak"] / mib, unit="MiB"))
    whole = predict(large, long, gradient_checkpointing=True)
    part = predict(large, long, gradient_checkpointing=True, tokens=selection(large, 0.2, "gather"))
    ours, theirs = part["peak"] / mib, whole["peak"] / mib
    return [*claims, Claim("gather 20%: predicted peak, Gemma 1B 1x2048", ours, theirs, 0.45, "MiB")]


def _activations(memory: Mapping[str, int]) -> int:
    return memory["activations"] + memory["logits"]


# gradients -----------------------------------------------------------------------------------------


def gradient_claim() -> Claim:
    """All tokens chosen, one by one through both passes: largest relative difference of an adapter's gradient, fp32."""
    from lorakit.training.loss import MeanLoss

    torch.manual_seed(0)
    model = build_ours(gemma(640, 2048, 18, vocabulary=4096)).train()  # windows of 512, one layer in six sees all
    model.config.use_cache = False
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.02)  # at 0 every gradient of A is 0
    ids = torch.randint(1, 4096, (1, 640))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    MeanLoss("causal")(model(**inputs), ids).backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    tokens = selection(model, 0.9999, "fractional")
    (tokens.select(model, inputs, ids).finish() / tokens.divisor(ids)).backward()
    worst = max(
        ((p.grad - plain[n]).norm() / plain[n].norm()).item() for n, p in model.named_parameters() if p.requires_grad
    )
    return Claim("fractional, all chosen: gradient off by (1e-5)", worst * 1e5, 1.0, 1.0, "1e-5")


def bitwise_claim() -> Claim:
    """Weights after 10 steps of the toy decoder at fraction 1 against the plain trainer's: how many differ."""
    from lorakit.adapters import adapter_state
    from lorakit.params import resolve
    from lorakit.runs.assembly import assemble, build_trainer
    from lorakit.runs.experiment import new_record

    states = []
    for gating in ({"method": "flora", "topk_tokens": 1.0, "mode": "gather"}, {"method": "baseline"}):
        given = {"model": "toy-decoder", "task": "toy-instruct", "budget": 10, "gating": gating}
        params = resolve(given)
        assembled = assemble(params)
        with tempfile.TemporaryDirectory() as folder:
            build_trainer(assembled, new_record(params, given), folder).train()
        states.append(adapter_state(assembled.model))
    different = sum(int((a != b).sum()) for a, b in zip(states[0].values(), states[1].values(), strict=True))
    return Claim("gather, fraction 1: weights that differ + 1", different + 1, 1.0, 1.0, "")


# seconds -------------------------------------------------------------------------------------------


def seconds_claims() -> list[Claim]:
    """Forward and backward of Gemma 270M, 4 x 256 tokens, bf16, every token a target."""
    from lorakit.training.loss import MeanLoss

    keep_memory()
    torch.manual_seed(0)
    model = build_ours(gemma_270m().bfloat16()).train()
    model.config.use_cache = False
    ids = torch.randint(1, 262_144, (4, 256))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def plain() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(**inputs)
        MeanLoss("causal")(outputs, ids).backward()

    def chosen(tokens: Any) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = tokens.select(model, inputs, ids).finish()
        loss.backward()

    choices: dict[str, dict[str, Any]] = {f"{m} {f:.0%}": {"mode": m, "fraction": f} for m, f in CHOICES}
    choices["fractional 20% by loss"] = choices["fractional 20%"] | {"score": "loss"}
    choices["fractional 20% at random"] = choices["fractional 20%"] | {"method": "random"}
    claims = []
    for name, how in choices.items():
        timing = interleave(functools.partial(chosen, selection(model, **how)), plain, ROUNDS, warmup=2)
        claims.append(time_claim(f"{name}: step", timing, 0.75 if name == "fractional 20%" else NO_TARGET))
    return claims
