"""What choosing tokens saves over the exact loss of all: FLOPs, predicted memory, seconds; and what scoring costs."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from benchmarks._common import NO_TARGET, Claim, interleave, keep_memory, time_claim
from benchmarks._decoders import SHARES, bare, batch_of, exact, gemma, gemma_1b, gemma_270m
from benchmarks.lora import build_ours

DESCRIPTION = "FLoRA: a step on chosen tokens against the exact loss of all, by mode, fraction and score"
TARGET = (
    "Gemma 270M 4x256, all / a quarter of the tokens are targets, fractional 20 % over exact LoRA. Scored by the head: "
    "FLOPs <= 0.64 / 0.55, peak <= 0.65 / 0.60. By the layers: FLOPs <= 0.42 / 0.46, seconds <= 0.55, peak <= 0.62 / "
    "0.53. Gradient at fraction 1 within 1e-5; scoring <= 0.02 of a forward's FLOPs"
)
CHOICES = [(mode, fraction) for mode in ("gather", "fractional") for fraction in (0.1, 0.2, 0.4)]
ROUNDS = 6
SCORES = ("sketch", "gradient_norm", "loss", "entropy", "hidden_gradient")
GOALS = {  # of "fractional 20%", by score and by whether a quarter of the tokens are targets: FLOPs, peak
    ("sketch", False): (0.64, 0.65), ("sketch", True): (0.55, 0.60),
    ("update", False): (0.42, 0.62), ("update", True): (0.46, 0.53),
}  # fmt: skip


def run() -> list[Claim]:
    timed = seconds_claims()  # first, as in a run: what the others leave of the heap slows the larger blocks
    claims = flop_claims() + memory_claims() + scoring_claims()
    return [*claims, gradient_claim(), *timed]


def selection(model: nn.Module, fraction: float, mode: str, score: str = "sketch", method: str = "flora") -> Any:
    from lorakit.settings import Gating
    from lorakit.tokens import build_tokens

    return build_tokens(Gating(method=method, topk_tokens=fraction, mode=mode, score=score), model, "causal")


# FLOPs ---------------------------------------------------------------------------------------------


def choices(model: nn.Module) -> dict[str, Any]:
    """What is held against the exact loss of all tokens."""
    made = {f"{mode} {fraction:.0%}": selection(model, fraction, mode) for mode, fraction in CHOICES}
    made["fractional 20% by update"] = selection(model, 0.2, "fractional", "update")
    return made | {"fractional 20% at random": selection(model, 0.2, "fractional", method="random")}


def goals(name: str, told: str) -> tuple[float, float]:
    score = {"fractional 20%": "sketch", "fractional 20% by update": "update"}.get(name, "")
    return GOALS.get((score, bool(told)), (NO_TARGET, NO_TARGET))


def flop_claims() -> list[Claim]:
    """The step, every token a target and a quarter of them."""
    from lorakit.studies.token_costs import step_flops

    model, claims = bare(gemma_270m), []
    for told, targets in SHARES.items():
        batch = batch_of((4, 256), targets)
        whole = step_flops(model, batch, exact(model)) / 1e9
        claims.append(Claim(f"plain{told}: step FLOPs", step_flops(model, batch) / 1e9, whole, unit="GFLOP"))
        for name, tokens in choices(model).items():
            ours = step_flops(model, batch, tokens) / 1e9
            claims.append(Claim(f"{name}{told}: step FLOPs", ours, whole, goals(name, told)[0], "GFLOP"))
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

    predict = functools.partial(predict_step_memory, autocast="bf16", device="cuda")
    model, mib, claims = bare(gemma_270m), 2**20, []
    for told, targets in SHARES.items():
        batch = batch_of((4, 256), targets)
        whole, plain = (predict(model, batch, tokens=tokens)["peak"] / mib for tokens in (exact(model), None))
        claims.append(Claim(f"plain{told}: predicted peak", plain, whole, unit="MiB"))
        for name, tokens in choices(model).items():
            ours = predict(model, batch, tokens=tokens)["peak"] / mib
            claims.append(Claim(f"{name}{told}: predicted peak", ours, whole, goals(name, told)[1], "MiB"))
    large, long = bare(gemma_1b), batch_of((1, 2048))
    ours, theirs = (
        predict(large, long, gradient_checkpointing=True, tokens=tokens)["peak"] / mib
        for tokens in (selection(large, 0.2, "gather"), exact(large))
    )
    return [*claims, Claim("gather 20%: predicted peak, Gemma 1B 1x2048", ours, theirs, unit="MiB")]


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


# seconds -------------------------------------------------------------------------------------------


def seconds_claims() -> list[Claim]:
    """Forward and backward of Gemma 270M, 4 x 256 tokens, bf16, every token a target."""
    keep_memory()
    torch.manual_seed(0)
    model = build_ours(gemma_270m().bfloat16()).train()
    model.config.use_cache = False
    ids = torch.randint(1, 262_144, (4, 256))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def chosen(tokens: Any) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = tokens.select(model, inputs, ids).finish()
        loss.backward()

    whole, claims = functools.partial(chosen, exact(model)), []
    for name, tokens in ((name, tokens) for name, tokens in choices(model).items() if "20%" in name):
        timing = interleave(functools.partial(chosen, tokens), whole, ROUNDS, warmup=1)
        claims.append(time_claim(f"{name}: step", timing, 0.55 if name.endswith("by update") else NO_TARGET))
    return claims
