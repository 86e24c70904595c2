"""What gating a batch costs: a rejected one against its forward, an accepted one against the plain step; rates kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from benchmarks._adapters import minilm
from benchmarks._common import NO_TARGET, Claim, interleave, keep_memory, time_claim
from benchmarks._decoders import bare, batch_of, exact, gemma, gemma_270m
from benchmarks._profiled import measured_step_peak
from benchmarks.lora import build_ours
from lorakit.gates import HeadGradientGate, build_gate
from lorakit.gates.look import GateLook
from lorakit.head import HeadInput, find_head
from lorakit.measure.dry import fake, fake_mode, faked, training_state
from lorakit.measure.flops import FlopCount
from lorakit.seams import Candidate
from lorakit.settings import GateSettings
from lorakit.training.loss import MeanLoss

DESCRIPTION = "SLoRA's gate: rejected and accepted batches against plain ones, state, memory, acceptance rate"
TARGET = (
    "one forward a batch; rejected <= 1.03 x its own chunked forward's seconds, <= 1.005 x its FLOPs; accepted <= 1.03 "
    "x the step; FLOPs a candidate at rate 0.3 over exact LoRA's step <= 0.66 with logits kept, 0.76 made again; state "
    "<= 1 MB; peak <= 1.02 x; rate within 0.02"
)
OVER = ("rejected batch over its forward", "accepted batch over the plain step")
RATES, STEPS, BURN_IN = (0.1, 0.2, 0.3, 0.5), 2000, 50


@dataclass(frozen=True)
class Case:
    """A model with random weights of a real one's dimensions, its batches, and what its head predicts."""

    name: str
    base: Callable[[], nn.Module]
    shape: tuple[int, int]
    words: int
    kind: str
    rounds: int  # of steps
    bf16: bool = False
    warmup: int = 3
    looks: int = 0  # rounds of rejected batches; 0: as many. One per cent shows in some forty only
    targets: float = 1.0  # share of the tokens that is predicted: a row's last


MINILM = Case("MiniLM 32x28", minilm, (32, 28), 30_000, "classify", 20)
PRETRAINING = Case("Gemma 270M 4x256 bf16", gemma_270m, (4, 256), 262_144, "causal", 7, bf16=True, warmup=1, looks=45)
# chats, as in instruct-gemma3-270m: there 130 of a batch's 1,024 places are answers' tokens
CHATS = replace(PRETRAINING, name=f"{PRETRAINING.name}, 25 % targets", targets=0.25)


class Gated:
    """One model with and without its gate: the forward, what the gate adds to it, and the step."""

    def __init__(self, case: Case, device: str = "cpu"):
        from accelerate.utils import convert_outputs_to_fp32

        torch.manual_seed(0)
        base = case.base()
        self.case, self.model = case, build_ours((base.bfloat16() if case.bf16 else base).to(device)).train()
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1, case.words, case.shape, generator=generator)
        classes = torch.randint(0, 2, case.shape[:1], generator=generator)
        self.labels = classes if case.kind == "classify" else ids.clone()
        self.labels[..., : round((1 - case.targets) * ids.shape[1])] = -100
        ids, self.labels = ids.to(device), self.labels.to(device)
        self.measured: torch.Tensor | None = None
        self.batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        self.gate = build_gate(GateSettings(gate="novelty", gate_burn_in=10**9), self.model, case.kind)
        self.head = HeadInput(find_head(self.model, case.kind))
        self.loss_of = MeanLoss(case.kind)
        self.tokens = exact(self.model) if case.kind != "classify" else None
        # as accelerate wraps a model for bf16: autocast inside, fp32 logits outside
        half = convert_outputs_to_fp32(torch.autocast(device, torch.bfloat16)(self.model.forward))
        self.call = half if case.bf16 else self.model
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-6)

    def forward(self, gate: Any = None) -> Any:
        """The forward as a gate finds it, with the losses; with `gate` all that it does before its decision.

        A classifier's logits are there at once; of a language model each chunk is looked at and given up, or kept.
        """
        if self.case.kind != "classify":
            seen = GateLook(gate, 1.0, self.tokens.head) if gate else no_gate
            selected = self.tokens.select(self.call, self.batch, self.labels, seen)
            self.measured = seen.measured() if gate else None
            return selected
        outputs = self.call(**self.batch)
        loss = self.loss_of(outputs, self.labels)
        if gate:
            logits = outputs.logits.detach()
            kept = {"kind": self.case.kind, "token_losses": self.loss_of.token_losses}
            self.measured = gate.measure(Candidate(loss.detach(), logits, self.labels, self.head.take(logits), **kept))
        return loss

    def step(self) -> Any:
        """The forward of an ungated step."""
        if self.case.kind == "classify":
            return self.forward()
        return self.tokens.select(self.call, self.batch, self.labels)

    def look(self, accept: bool) -> Any:
        """The forward and everything the gate does with a batch it accepts or rejects."""
        made = self.forward(self.gate)
        score = self.gate.score(self.measured)
        if accept:
            self.gate.learn(self.measured)
        self.gate.controller.observe(score, accept)
        return made

    def finish(self, made: Any) -> None:
        (made if torch.is_tensor(made) else made.finish()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def no_gate(*_: Any) -> None:
    """Looks at the losses only, whose sum is what a plain forward gives."""


no_gate.rate = GateSettings().gate_rate  # so that it makes no gradient that a gate's forward would not


def sides(gated: Gated) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """What is compared -> a gated batch, its basis full, and the same one without a gate."""
    for _ in range(2 * gated.gate.k):
        gated.gate.update(torch.randn(gated.gate.m))
    accepted = (lambda: gated.finish(gated.look(True))), (lambda: gated.finish(gated.step()))
    return dict(zip(OVER, ((lambda: gated.look(False), gated.forward), accepted), strict=True))


def time_claims(case: Case) -> list[Claim]:
    rounds, pairs = (case.looks or case.rounds, case.rounds), sides(Gated(case))
    return [
        time_claim(f"{case.name}: {what}", interleave(*pairs[what], count, case.warmup), 1.03)
        for what, count in zip(OVER, rounds, strict=True)
    ]


def forward_claim() -> Claim:
    """Backbone forwards per candidate batch in SLoRATrainer's own loop, half of them rejected.

    Beside them is one of a single row, once a run: whether the model's own loss is the mean over labels.
    """
    import tempfile

    from datasets import Dataset
    from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

    from lorakit.training import SLoRATrainer

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = build_ours(BertForSequenceClassification(BertConfig(vocab_size=99, **sizes)))
    rows = Dataset.from_list([{"input_ids": [i % 98 + 1] * 8, "labels": i % 2} for i in range(64)])
    forwards: list[int] = []
    model.bert.register_forward_hook(lambda module, given, out: forwards.append(1) if len(out[0]) > 1 else None)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=60, per_device_train_batch_size=4, report_to="none", use_cpu=True, disable_tqdm=True
        )
        config = {"m": 64, "k": 8, "target_novelty": 0.5, "burn_in": 5}
        trainer = SLoRATrainer(model, arguments, train_dataset=rows, gate_config=config)
        trainer.train()
    assert trainer.ledger.accepted_steps < 60
    return Claim("forwards per candidate batch, some rejected", len(forwards) / 60, 1.0, 1.0, "")


def flop_claims() -> list[Claim]:
    """Gemma 3 270M's dimensions, 4 x 256 tokens, all of them predicted, counted without data; the gate by formula."""
    from lorakit.studies.token_costs import step_flops

    model, batch, rate, claims = bare(gemma_270m), batch_of((4, 256)), 0.3, []
    gate = HeadGradientGate(model.config.hidden_size, model.config.vocab_size)
    extra = gate.flops(Candidate(torch.zeros(()), None, batch["labels"], kind="causal"))
    for told, mib, goal in (("kept", 384, 0.66), ("made again", 96, 0.76)):
        tokens = exact(model, mib)
        step = step_flops(model, batch, tokens)
        looked, accepted = looked_flops(model, batch, tokens, rate)
        if told == "kept":
            claims.append(Claim("rejected batch: FLOPs", (looked + extra) / 1e9, looked / 1e9, 1.005, "GFLOP"))
        candidate = (looked + extra + rate * accepted) / 1e9
        claims.append(Claim(f"a candidate at rate 0.3, logits {told}: FLOPs", candidate, step / 1e9, goal, "GFLOP"))
    return claims


def looked_flops(model: nn.Module, batch: dict[str, torch.Tensor], tokens: Any, rate: float) -> tuple[float, float]:
    """Of the forward whose logits a gate has seen, and of the rest of the step, where that is accepted."""
    mode, look = fake_mode(), lambda *_: None
    look.rate = rate
    real = dict(batch)
    labels = real.pop("labels")
    with faked(model, mode), training_state(model, False):
        inputs = {name: fake(mode, value) for name, value in real.items()}
        with tokens.dry(real, labels), mode:
            with FlopCount() as looked:
                selected = tokens.select(model, inputs, labels, look)
            with FlopCount() as accepted:
                selected.finish().backward()
    return float(looked.total), float(accepted.total)


def memory_claims() -> list[Claim]:
    """Measured peaks of a gated and a plain step, 1 x 256 tokens of a 4-layer Gemma with the whole vocabulary."""
    case = Case("Gemma 640x4 1x256", lambda: gemma(640, 2048, 4), (1, 256), 262_144, "causal", 0)

    def prepared(gated: bool) -> Callable[[], Callable[[], None]]:
        def prepare() -> Callable[[], None]:
            run = Gated(case)
            return lambda: run.finish(run.look(True) if gated else run.step())

        return prepare

    ours, theirs = (measured_step_peak(prepared(gated)) / 2**20 for gated in (True, False))
    state = Gated(case).gate
    for _ in range(2 * state.k):
        state.update(torch.randn(state.m))
    return [
        Claim(f"{case.name}: peak of an accepted step", ours, theirs, 1.02, "MiB"),
        Claim("gate state, m=512, k=64, V=262144", state.state_bytes() / 1e6, 1.0, 1.0, "MB"),
    ]


def rate_claims() -> list[Claim]:
    """Share accepted after the burn-in over 2,000 batches whose gradients drift slowly through many directions."""
    claims = []
    for rate in RATES:
        gate = HeadGradientGate(
            8, 8, m=128, k=16, target_novelty=rate, novelty_ema_rate=0.05, burn_in=BURN_IN, reorth_every=4, seed=1
        )
        decisions = [gate.decide(z).accept for z in drifting(gate.m, BURN_IN + STEPS)]
        share = sum(decisions[BURN_IN:]) / STEPS
        claims.append(Claim(f"acceptance at {rate}: |share - target|", abs(share - rate), 0.02, 1.0, "share"))
    return claims


def drifting(size: int, count: int) -> list[torch.Tensor]:
    """Sketches (size,) around a low-rank subspace that turns, with noise that grows."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(size, 16, generator=generator, dtype=torch.float64))[0]
    found = []
    for step in range(count):
        angle = math.pi * step / count
        turned = math.cos(angle) * directions[:, :8] + math.sin(angle) * directions[:, 8:]
        noise = 0.3 * (1 + step / count) * torch.randn(size, generator=generator, dtype=torch.float64) / size**0.5
        found.append(turned @ torch.randn(8, generator=generator, dtype=torch.float64) / 8**0.5 + noise)
    return found


def run() -> list[Claim]:
    claims = [forward_claim(), *flop_claims(), *memory_claims(), *rate_claims()]
    keep_memory()
    for case in (MINILM, CHATS):
        claims += time_claims(case)
    rejected, accepted = time_claims(PRETRAINING)  # every token predicted: what is accepted is made again
    return [*claims, rejected, replace(accepted, target=NO_TARGET)]
