"""A LoRA training step against PEFT's: same weights, same batch, same loss; time and predicted peak memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks._common import Claim, interleave, time_claim

DESCRIPTION = "LoRA step (forward, backward, AdamW) with lorakit against PEFT, MiniLM and DistilBERT dimensions, fp32"
TARGET = "time and predicted peak memory <= 1.0 x PEFT's at the same loss to 1e-5"
RANK, ALPHA = 8, 16.0


@dataclass(frozen=True)
class Case:
    """A classifier with random weights of a real model's dimensions, and the shape of its batches."""

    name: str
    base: Callable[[], nn.Module]
    batch_size: int
    tokens: int


def minilm() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    return BertForSequenceClassification(config)


def distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    return DistilBertForSequenceClassification(DistilBertConfig())


CASES = (Case("MiniLM 32x28", minilm, 32, 28), Case("DistilBERT 16x32", distilbert, 16, 32))


def build_ours(base: nn.Module) -> nn.Module:
    from lorakit.adapters import attach

    return attach(base, "lora", rank=RANK, alpha=ALPHA, seed=0)


def build_peft(base: nn.Module) -> nn.Module:
    """PEFT on the same layers and the same task head (its own "all-linear" fails on DistilBERT's two-layer head)."""
    from peft import LoraConfig, TaskType, get_peft_model

    from lorakit.adapters.targets import resolve_targets, task_head

    head = task_head(base)
    targets = resolve_targets(base, "all-linear", head)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=targets, modules_to_save=head, task_type=TaskType.SEQ_CLS
    )
    return get_peft_model(base, config)


def copy_to_peft(ours: nn.Module, theirs: nn.Module) -> None:
    """Give both the same adapters, with B no longer zero so that the adapters are at work."""
    from peft import set_peft_model_state_dict

    from lorakit.adapters import adapter_layers, adapter_state

    for layer in adapter_layers(ours).values():
        nn.init.normal_(layer.lora_B, std=0.02)
    state = {f"base_model.model.{name}": tensor for name, tensor in adapter_state(ours).items()}
    missing = set_peft_model_state_dict(theirs, state).unexpected_keys
    assert not missing, missing


def make_batch(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch_size, case.tokens)
    return {
        "input_ids": torch.randint(1000, 30000, shape, generator=generator),
        "attention_mask": torch.ones(shape, dtype=torch.long),
        "labels": torch.randint(0, 2, (case.batch_size,), generator=generator),
    }


def stepper(model: nn.Module, batch: dict[str, Tensor], losses: list[float]) -> Callable[[], None]:
    """One training step; the i-th step of either side draws the same dropout masks."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        torch.manual_seed(len(losses))
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    return step


def step_claims(case: Case) -> list[Claim]:
    """Time of a step, and the largest difference between the two sides' losses over all steps taken."""
    torch.manual_seed(0)
    base, twin = case.base(), case.base()
    twin.load_state_dict(base.state_dict())
    ours, theirs = build_ours(base), build_peft(twin)
    copy_to_peft(ours, theirs)
    batch, my_losses, their_losses = make_batch(case), [], []
    timing = interleave(stepper(ours, batch, my_losses), stepper(theirs, batch, their_losses), rounds=30)
    gap = max(abs(a - b) for a, b in zip(my_losses, their_losses, strict=True))
    return [
        Claim(f"{case.name}: loss gap over {len(my_losses)} steps / 1e-5", gap, 1e-5, 1.0, "nats"),
        time_claim(f"{case.name}: step", timing, 1.0),
    ]


def memory_claim(case: Case) -> Claim:
    from lorakit.measure.memory import predict_training_memory

    def peak(build: Callable[[nn.Module], nn.Module]) -> float:
        def on_meta() -> nn.Module:
            with torch.device("meta"):
                base = case.base()
            return build(base)

        return predict_training_memory(on_meta, lambda: make_batch(case))["peak"] / 2**20

    return Claim(f"{case.name}: predicted peak memory", peak(build_ours), peak(build_peft), 1.0, "MiB")


def run() -> list[Claim]:
    return [claim for case in CASES for claim in (memory_claim(case), *step_claims(case))]
