"""Measured live bytes on the CPU: the allocations and frees that torch's profiler sees in its allocator."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_STEP = "measured step"


def measured_step_peak(prepare: Callable[[], Callable[[], object]]) -> int:
    """Peak bytes allocated on the CPU during one training step in steady state.

    Args:
        prepare: makes model, inputs and optimizer and returns the step. All of it runs under the profiler, so that
            everything alive is counted; the step runs once unmeasured (the optimizer makes its state), then measured.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step = prepare()
        step()
        gc.collect()
        with record_function(_STEP):
            step()
    return _peak(_events(profiled))


def _events(profiled: profile) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        return json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]


def _peak(events: list[dict[str, Any]]) -> int:
    step = next(event for event in events if event.get("name") == _STEP and "dur" in event)
    memory = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    # the allocator's total goes on over earlier profiles of this process
    before = memory[0]["args"]["Total Allocated"] - memory[0]["args"]["Bytes"]
    during = [event for event in memory if step["ts"] <= event["ts"] <= step["ts"] + step["dur"]]
    return max(event["args"]["Total Allocated"] for event in during) - before


def training_step(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], autocast: str | None = None, tokens: Any = None
) -> Callable[[], None]:
    """One step as the Trainer does it: forward, backward, AdamW, gradients set to None.

    Args:
        tokens: makes the loss (`TokenSelection`); None: the model does.
    """
    from accelerate.utils import convert_outputs_to_fp32

    model.train()
    optimizer = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    half = torch.autocast(next(iter(batch.values())).device.type, torch.bfloat16, enabled=autocast is not None)
    forward = convert_outputs_to_fp32(half(model.forward)) if autocast else model
    inputs = {name: value for name, value in batch.items() if name != "labels"}

    def loss() -> torch.Tensor:
        if tokens is None:
            return forward(**batch).loss
        with half:
            return tokens.select(model, inputs, batch["labels"]).finish()

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
