"""What a row is called, and which rows come first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lorakit.records import Record

LABELS = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "baseline": "LoRA, equal steps",
    "full_length": "LoRA, full length",
    "same_flops": "LoRA, equal FLOPs",
    "head": "head only",
    "sparse": "Sparse LoRA",
    "hira": "HiRA",
    "qlora": "QLoRA",
    "skip": "SkipLoRA",
    "random": "random batches",
    "slora": "SLoRA",
    "flora": "FLoRA",
    "sparse_ranks": "Sparse LoRA (ranks)",
    "sparse_l1": "Sparse LoRA (L1)",
    "skip_adapter": "SkipLoRA (per adapter)",
    "dora": "DoRA (PEFT)",
    "loss_floor": "loss floor",
    "gradient_norm": "gradient norm",
    "novelty_loss": "novelty + loss floor",
    "least_novel": "least novel",
    "random50": "random batches (50 %)",
    "slora50": "SLoRA (50 %)",
    "random_tokens": "random tokens",
    "random20": "random tokens (20 %)",
    "flora20": "FLoRA (20 %)",
    "flora40": "FLoRA (40 %)",
    "pps20": "FLoRA, PPS (20 %)",
    "random20_gather": "random tokens (20 %), gather",
    "flora20_gather": "FLoRA (20 %), gather",
    "flora40_gather": "FLoRA (40 %), gather",
    "pps20_gather": "FLoRA, PPS (20 %), gather",
    "targets_only": "all targets, gather",
    "flora_fractional": "FLoRA, fractional",
    "random_tokens_fractional": "random tokens, fractional",
    "pps": "FLoRA, PPS",
    "pps_fractional": "FLoRA, PPS, fractional",
}  # in the order of tables: what others are compared with comes first


def order(rows: Iterable[str]) -> list[str]:
    """Distinct rows, known ones first in the order of `LABELS`, then by name."""
    places = {row: place for place, row in enumerate(LABELS)}
    return sorted(set(rows), key=lambda row: (places.get(row, len(places)), row))


def label(row: str, records: Sequence[Record] = ()) -> str:
    """The name of a row in tables and figures: its own, where its params file says one, else `LABELS`'."""
    own = (record.resolved.get("label") for record in records if record.row == row)
    return next(filter(None, own), LABELS.get(row, row))


def labels(records: Sequence[Record]) -> dict[str, str]:
    """Row -> its name, in the order of tables."""
    return {row: label(row, records) for row in order(record.row for record in records)}
