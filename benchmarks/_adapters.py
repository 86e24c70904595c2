"""A training step with a lorakit adapter against PEFT's on the same random base: time, loss gap, predicted memory.

A side is a function from a model to the same model adapted; the two are given the same weights before they are timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks._common import Claim, interleave, time_claim

Build = Callable[[nn.Module], nn.Module]


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


def make_batch(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch_size, case.tokens)
    return {
        "input_ids": torch.randint(1000, 30000, shape, generator=generator),
        "attention_mask": torch.ones(shape, dtype=torch.long),
        "labels": torch.randint(0, 2, (case.batch_size,), generator=generator),
    }


def twins(case: Case) -> tuple[nn.Module, nn.Module]:
    """The case's model twice, with the same random weights."""
    torch.manual_seed(0)
    base, twin = case.base(), case.base()
    twin.load_state_dict(base.state_dict())
    return base, twin


def peft_twin(base: nn.Module, config_class: type, **options: object) -> nn.Module:
    """PEFT on the same layers and the same task head (its own "all-linear" fails on DistilBERT's two-layer head)."""
    from peft import TaskType, get_peft_model

    from lorakit.head import task_head
    from lorakit.modules import resolve_targets

    head = task_head(base)
    targets = resolve_targets(base, "all-linear", head)
    config = config_class(target_modules=targets, modules_to_save=head, task_type=TaskType.SEQ_CLS, **options)
    return get_peft_model(base, config)


def copy_to_peft(ours: nn.Module, theirs: nn.Module, method: str) -> None:
    """Give both the same adapters, with B no longer zero so that the adapters are at work."""
    from peft import set_peft_model_state_dict

    from lorakit.adapters import adapter_layers, adapter_state
    from lorakit.adapters.peft_format import name_in_file

    for layer in adapter_layers(ours).values():
        nn.init.normal_(getattr(layer, f"{method}_B"), std=0.02)
    state = {name_in_file(method, name): tensor for name, tensor in adapter_state(ours).items()}
    unexpected = set_peft_model_state_dict(theirs, state).unexpected_keys
    assert not unexpected, unexpected


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


def step_claims(
    case: Case, build_ours: Build, build_peft: Build, method: str, *, rounds: int, target: float
) -> list[Claim]:
    """Time of a step, at most `target` times PEFT's, and the largest difference of the losses over all steps taken."""
    base, twin = twins(case)
    ours, theirs = build_ours(base), build_peft(twin)
    copy_to_peft(ours, theirs, method)
    batch, my_losses, their_losses = make_batch(case), [], []
    timing = interleave(stepper(ours, batch, my_losses), stepper(theirs, batch, their_losses), rounds=rounds)
    gap = max(abs(a - b) for a, b in zip(my_losses, their_losses, strict=True))
    return [
        Claim(f"{case.name}: loss gap over {len(my_losses)} steps / 1e-5", gap, 1e-5, 1.0, "nats"),
        time_claim(f"{case.name}: step", timing, target),
    ]


def predicted_peak(case: Case, build: Build) -> float:
    """MiB at the peak of a training step."""
    from lorakit.measure.memory import predict_step_memory

    with torch.device("meta"):
        base = case.base()
    return predict_step_memory(build(base), make_batch(case))["peak"] / 2**20
