"""Half of a LoRA's ranks or entries pruned: bytes of the saved adapter, and seconds of inference beside the weights."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks._adapters import Case, distilbert, make_batch, minilm
from benchmarks._common import Claim, interleave, time_claim

DESCRIPTION = "Sparse LoRA at 50 % against dense LoRA of rank 32: files without task head, unmerged inference, fp32"
TARGET = "structured and compacted: bytes <= 0.55 x, latency < 1.0 x; unstructured and packed: bytes <= 0.55 x"
RANK, SPARSITY, ROUNDS = 32, 0.5, 40
CASES = (Case("MiniLM 8x28", minilm, 8, 28), Case("DistilBERT 4x32", distilbert, 4, 32))


def dense_lora(case: Case) -> nn.Module:
    """Rank 32 on every linear layer, no task head trained, B as after training: not zero."""
    from lorakit.adapters import adapter_layers, attach

    torch.manual_seed(0)
    model = attach(case.base(), "sparse", rank=RANK, trainable=(), seed=0).eval()
    for layer in adapter_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.02)
    return model


def pruned(model: nn.Module, kind: str) -> nn.Module:
    """`model` with half of its ranks or entries zero: new factors on the same frozen weights in the same memory."""
    from lorakit.adapters.sparsify import Sparsifier
    from lorakit.settings import SparseSettings

    shared = {id(tensor): tensor for tensor in model.parameters() if not tensor.requires_grad}
    model = copy.deepcopy(model, shared)
    Sparsifier(model, SparseSettings(sparsify=kind, sparsity=SPARSITY)).prune_to(SPARSITY)
    return model


def file_bytes(model: nn.Module, packed: bool = False) -> int:
    """Bytes of the file of tensors `save_adapter` writes, header included."""
    from lorakit.adapters import save_adapter

    with tempfile.TemporaryDirectory() as folder:
        (file,) = save_adapter(model, Path(folder) / "adapter", packed=packed).glob("*.safetensors")
        return file.stat().st_size


def forward(model: nn.Module, case: Case) -> Callable[[], object]:
    batch = make_batch(case)
    del batch["labels"]
    return torch.inference_mode()(lambda: model(**batch))


def claims_of(case: Case) -> list[Claim]:
    from lorakit.adapters.zeros import compact

    dense = dense_lora(case)
    compacted, unstructured = compact(pruned(dense, "structured")), pruned(dense, "magnitude")
    size = file_bytes(dense) / 2**10
    timing = interleave(forward(compacted, case), forward(dense, case), rounds=ROUNDS)
    zeros = interleave(forward(unstructured, case), forward(dense, case), rounds=ROUNDS // 4)
    # no claim: zeros inside a dense matrix are multiplied like any other number
    print(f"{case.name}: unstructured latency {zeros.ratio:.4f} x dense, its file unpacked "
          f"{file_bytes(unstructured) / 2**10 / size:.4f} x dense")  # fmt: skip
    return [
        Claim(f"{case.name}: structured, compacted file", file_bytes(compacted) / 2**10, size, 0.55, "KiB"),
        Claim(f"{case.name}: unstructured, packed file", file_bytes(unstructured, True) / 2**10, size, 0.55, "KiB"),
        time_claim(f"{case.name}: structured, compacted latency", timing, 1.0),
    ]


def run() -> list[Claim]:
    return [claim for case in CASES for claim in claims_of(case)]
