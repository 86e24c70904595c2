"""What choosing tokens saves by mode and fraction: FLOPs, predicted memory, seconds of a step; what scoring costs."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from benchmarks._common import Claim, interleave, keep_memory, time_claim
from benchmarks.gate import gemma, gemma_1b, gemma_270m
from benchmarks.lora import build_ours
from lorakit.studies.token_costs import step_flops

DESCRIPTION = "FLoRA: a step on chosen tokens against a step on all, by mode and fraction"
TARGET = (
    "Gemma 270M 4x256, every token a target, fractional: FLOPs <= 0.70 at 20 %, <= 0.62 at 10 %; activations <= 0.35; "
    "seconds <= 0.75; gradient at fraction 1 within 1e-5. gather: peak on Gemma 1B T=2048 <= 0.45; bitwise at fraction "
    "1. scoring <= 0.02 of a forward's FLOPs"
)
FRACTIONS, ROUNDS = (0.1, 0.2, 0.4), 6
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
    model, shape = bare(gemma_270m), (4, 256)
    print("step FLOPs over the plain step's, Gemma 270M 4x256    " + "   ".join(f"{f:.0%}" for f in FRACTIONS))
    for targets in (1.0, 0.25):
        batch = batch_of(shape, targets)
        plain = step_flops(model, batch)
        unchosen = step_flops(model, batch, selection(model, 0.9999, "gather", method="random")) / plain
        print(f"  no choice, but the head on targets only, {targets:.0%} of the tokens: {unchosen:.3f}")
        for mode in ("gather", "fractional"):
            shares = [step_flops(model, batch, selection(model, f, mode)) / plain for f in FRACTIONS]
            label = f"  {mode}, {targets:.0%} of the tokens are targets"
            print(f"{label:54s} " + "  ".join(f"{share:.3f}" for share in shares))
    batch = batch_of(shape)
    plain = step_flops(model, batch)
    claims = []
    for fraction, target in ((0.2, 0.70), (0.1, 0.62)):
        ours = step_flops(model, batch, selection(model, fraction, "fractional"))
        claims.append(Claim(f"fractional {fraction:.0%}: step FLOPs", ours / 1e9, plain / 1e9, target, "GFLOP"))
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
    print("scoring over the forward, FLOPs: " + ", ".join(f"{s} {extra[s] / forward.total:.4f}" for s in SCORES))
    return [
        Claim(f"scoring by {s}", (forward.total + extra[s]) / 1e9, forward.total / 1e9, 1.02, "GFLOP")
        for s in ("sketch", "gradient_norm", "loss", "entropy")
    ]


# memory --------------------------------------------------------------------------------------------


def memory_claims() -> list[Claim]:
    """Predicted peaks in MiB, bf16 weights and autocast."""
    from lorakit.measure.memory import predict_step_memory

    model = bare(gemma_270m)
    large, long = bare(gemma_1b), batch_of((1, 2048))
    predict = functools.partial(predict_step_memory, autocast="bf16", device="cuda")
    plain = predict(model, batch_of((4, 256)))
    print("predicted activations and logits over the plain step's, Gemma 270M 4x256; in brackets the whole peak")
    shares = {}
    for mode in ("gather", "fractional"):
        for fraction in FRACTIONS:
            made = predict(model, batch_of((4, 256)), tokens=selection(model, fraction, mode))
            shares[mode, fraction] = _activations(made)
            print(f"  {mode} {fraction:.0%}: {_activations(made) / _activations(plain):.3f} ({_peak(made, plain):.3f})")
    whole = predict(large, long, gradient_checkpointing=True)
    part = predict(large, long, gradient_checkpointing=True, tokens=selection(large, 0.2, "gather"))
    mib = 2**20
    return [
        Claim(
            "fractional 20%: predicted activations",
            shares["fractional", 0.2] / mib,
            _activations(plain) / mib,
            0.35,
            "MiB",
        ),
        Claim("gather 20%: predicted peak, Gemma 1B 1x2048", part["peak"] / mib, whole["peak"] / mib, 0.45, "MiB"),
    ]


def _activations(memory: Mapping[str, int]) -> int:
    return memory["activations"] + memory["logits"]


def _peak(memory: Mapping[str, int], plain: Mapping[str, int]) -> float:
    return memory["peak"] / plain["peak"]


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

    timings = {}
    for mode in ("gather", "fractional"):
        for fraction in FRACTIONS:
            step = functools.partial(chosen, selection(model, fraction, mode))
            timings[mode, fraction] = interleave(step, plain, ROUNDS, warmup=2)
            print(f"seconds over the plain step's, {mode} {fraction:.0%}: {timings[mode, fraction].ratio:.3f}")
    for name, changes in {"by loss": {"score": "loss"}, "at random": {"method": "random"}}.items():
        step = functools.partial(chosen, selection(model, 0.2, "fractional", **changes))
        ratio = interleave(step, plain, ROUNDS, warmup=2).ratio
        print(f"seconds over the plain step's, fractional 20%, chosen {name}: {ratio:.3f}")
    return [time_claim("fractional 20%: step", timings["fractional", 0.2], 0.75)]
