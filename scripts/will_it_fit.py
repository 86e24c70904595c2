"""Predict the peak memory and FLOPs of a training step, model by model and way by way: `results/will_it_fit.csv`.

    python scripts/will_it_fit.py
    python scripts/will_it_fit.py google/gemma-3-270m --again

The package's own planner predicts, from packaged dimensions: no weights, no network. Each way differs in what it says
from the reference: LoRA of rank 8 on all linear layers, bf16 weights, no autocast, one row of 2,048 tokens (DistilBERT
512), the exact loss. The file is written after every line, and a line that is there is not made again unless asked for.
What the planner has no word for, layers that rest, is put together here from what it is made of.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before the first import that reads them: no hub, nothing from its local cache
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": tempfile.gettempdir() + "/no-models"}

from lorakit import adapters, models
from lorakit.errors import LorakitError, require
from lorakit.files import write_text
from lorakit.measure.flops import FlopCount
from lorakit.measure.live import KINDS
from lorakit.measure.memory import predict_step_memory
from lorakit.runs import plan
from lorakit.settings import Gating, SkipSettings, TokenSettings
from lorakit.skip.controller import SkipLoRA
from lorakit.tokens import build_tokens

FILE = Path(__file__).resolve().parents[1] / "results" / "will_it_fit.csv"
NUMBERS = ("batch", "seq", *KINDS, "peak", "flops", "trainable", "total")  # bytes, FLOPs, counts
COLUMNS = ("model", "way", *NUMBERS)
MODELS = (
    "distilbert-base-uncased", "google/gemma-3-270m", "google/gemma-3-1b-pt", "google/gemma-3-4b-pt",
    "google/gemma-3-12b-pt", "google/gemma-3-27b-pt", "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-3B",
    "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B", "huggyllama/llama-65b", "Qwen/Qwen3-0.6B-Base",
    "Qwen/Qwen3-1.7B-Base", "Qwen/Qwen3-4B-Base", "Qwen/Qwen3-8B-Base", "Qwen/Qwen3-14B-Base", "Qwen/Qwen3-32B",
)  # fmt: skip
SHORT, LONG = 512, 2048  # tokens
QLORA, FULL, AGAIN = {"quantize": "nf4"}, {"method": "full"}, {"gradient_checkpointing": True}
WAYS: dict[str, dict[str, Any]] = {  # of every model
    "LoRA": {},
    "LoRA, checkpointing": AGAIN,
    "QLoRA": QLORA,
    "QLoRA, checkpointing": QLORA | AGAIN,
    "full": FULL,
    "full, checkpointing, fused AdamW": FULL | AGAIN | {"optimizer": "adamw_torch_fused"},
}
CLOSER = {  # of some models
    "LoRA, bf16 autocast": {"precision": "bf16"},
    "LoRA, batch 4": {"batch": 4},
    "LoRA, 512 tokens": {"seq": SHORT},
    "LoRA, all logits": {"loss": "nll"},
    "FLoRA 20 %, fractional": {"tokens": 0.2, "mode": "fractional"},
    "SkipLoRA, half rests": {"skip_share": 0.5},
    "QLoRA, checkpointing, batch 4": QLORA | AGAIN | {"batch": 4},
    "full, checkpointing": FULL | AGAIN,
}
LOOKED_AT = ("distilbert-base-uncased", "google/gemma-3-270m", "meta-llama/Llama-3.1-8B", "huggyllama/llama-65b")
OF_CAUSAL = ("LoRA, 512 tokens", "LoRA, all logits", "FLoRA 20 %, fractional")  # DistilBERT's rows are of 512 tokens
AS_LITGPT = {"rank": 32, "targets": ["q_proj", "v_proj"], "precision": "bf16", "loss": "nll", "seq": SHORT}
MOST = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OF_64 = {"rank": 64, "targets": MOST, "precision": "bf16"}
TORCHTUNE = {"batch": 2, "seq": 4096, "optimizer": "adamw_torch_fused"}
MORE: dict[str, dict[str, dict[str, Any]]] = {  # of one model only
    "huggyllama/llama-65b": {  # what QLoRA's paper says of it
        "full, checkpointing, fp32 moments": FULL | AGAIN | {"optimizer": "paged_adamw_32bit"},
        "full, checkpointing, all in fp32": FULL | AGAIN | {"dtype": "fp32", "precision": "bf16"},
        "QLoRA, checkpointing, 512 tokens": QLORA | AGAIN | {"seq": SHORT},
    },
    "meta-llama/Llama-3.1-8B": {  # what others have measured
        "as LitGPT's LoRA": AS_LITGPT,
        "as LitGPT's QLoRA": AS_LITGPT | QLORA | {"batch": 2},
    },
    "meta-llama/Llama-3.2-3B": {
        "as torchtune's full, all logits": FULL | TORCHTUNE | {"loss": "nll"},
        "as torchtune's full, checkpointing": FULL | TORCHTUNE | AGAIN,
        "as torchtune's LoRA": OF_64 | TORCHTUNE | AGAIN,
        "as torchtune's QLoRA": OF_64 | TORCHTUNE | AGAIN | QLORA,
    },
}


def grid() -> dict[tuple[str, str], dict[str, Any]]:
    """(model, way) -> what the planner is told, in the order of the file."""
    asked = {}
    for model in MODELS:
        causal = models.family(model) == "decoder"
        for way, told in (WAYS | (CLOSER if model in LOOKED_AT else {}) | MORE.get(model, {})).items():
            if causal or way not in OF_CAUSAL:
                asked[model, way] = {"batch": 1, "seq": LONG if causal else SHORT} | told
    return asked


def predicted(model: str, **told: Any) -> dict[str, int]:
    """`NUMBERS` of one step."""
    if "skip_share" in told:
        return resting(model, **told)
    found = plan.predict(plan.Plan(model=model, **told))
    require(found.source == "packaged dimensions", "model", model, f"is read from {found.source}; wanted: packaged")
    counts = {name: getattr(found, name) for name in ("flops", "trainable", "total", "seq")}
    return found.memory | counts | {"batch": told["batch"]}


def resting(model: str, batch: int, seq: int, skip_share: float) -> dict[str, int]:
    """`NUMBERS` of a LoRA step in which that share of the blocks, the first ones, gets no backward.

    As the planner does it: two models of few blocks, and a line through them to the depth of the whole.
    """
    asked = plan.Plan(model=model, batch=batch, seq=seq)
    config, kind = models.config(model), plan.kind_of(asked)
    settings = SkipSettings(skip="prefix", skip_share=skip_share, skip_warmup=0.0, skip_explore=0.0)
    steps = []
    for blocks in plan.DEPTHS:
        shallow = plan.build(plan.shortened(config, blocks), kind, asked.dtype)
        adapted = adapters.attach(shallow, asked.method, rank=asked.rank, target_modules=asked.targets)
        if skip_share:
            skip = SkipLoRA(adapted, settings=settings)
            skip.bind_two_passes()  # the share alone decides, nothing is measured
            skip.begin()
            skip.begin_step(1.0)
        count, stats = FlopCount(), adapters.parameter_stats(adapted)
        tokens = build_tokens(Gating(), adapted, kind, loss=TokenSettings())
        rows = plan.make_batch(batch, seq, kind)
        memory = predict_step_memory(adapted, rows, tokens=tokens, count=count, device="cuda")
        steps.append(memory | {"flops": count.total, "trainable": stats.trainable, "total": stats.total})
    near, far = plan.DEPTHS
    times = (config.num_hidden_layers - near) / (far - near)
    found = {name: round(low + (steps[1][name] - low) * times) for name, low in steps[0].items()}
    return found | {"batch": batch, "seq": seq}


def read(file: Path = FILE) -> dict[tuple[str, str], dict[str, str]]:
    """(model, way) -> the line in the file, as it is written there."""
    if not file.exists():
        return {}
    with file.open(encoding="utf-8", newline="") as lines:
        return {(line["model"], line["way"]): line for line in csv.DictReader(lines)}


def write(lines: Mapping[tuple[str, str], Mapping[str, Any]], file: Path = FILE) -> None:
    """The lines that belong to the grid, in its order; whole or not at all."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(lines[key] for key in grid() if key in lines)
    write_text(text.getvalue(), file)


def line_of(model: str, way: str, told: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the file."""
    found = predicted(model, **told)
    return {"model": model, "way": way} | {name: found[name] for name in NUMBERS}


def main(argv: list[str] | None = None, file: Path = FILE) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("models", nargs="*", metavar="MODEL", help="of the grid (default: all)")
    options.add_argument("--again", action="store_true", help="make lines that are there, too")
    asked = options.parse_args(argv)
    try:
        for name in asked.models:
            require(name in MODELS, "model", name, f"one of {', '.join(MODELS)}")
        there = read(file)
        for (model, way), told in grid().items():
            if model in (asked.models or MODELS) and (asked.again or (model, way) not in there):
                there[model, way] = line_of(model, way, told)
                write(there, file)
                print(f"{there[model, way]['peak'] / 1e9:8.2f} GB  {model}: {way}", flush=True)
    except LorakitError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
