"""What a row is called, which rows come first, and what they look like in every figure."""

from collections.abc import Iterable, Sequence

from lorakit.records import Record

# A row's key, its name, and its look: colour, marker and the place of its dash in `style.DASHES`. In the order of
# tables, what others are compared with first. A new row takes a look that is free and changes no other.
ROWS = """
full: full fine-tuning: #000000 o 0
lora: LoRA: #0072B2 s 1
baseline: LoRA, equal steps: #222222 o 2
full_length: LoRA, full length: #4477AA s 3
same_flops: LoRA, equal FLOPs: #179FCD ^ 0
head: head only: #D55E00 ^ 2
sparse: Sparse LoRA: #009E73 D 3
hira: HiRA: #CC79A7 v 0
qlora: QLoRA: #209CE2 P 1
skip: SkipLoRA: #C58800 X 2
random: random batches: #777777 ^ 1
slora: SLoRA: #882255 o 3
flora: FLoRA: #999933 s 0
sparse_ranks: Sparse LoRA (ranks): #332288 D 2
sparse_l1: Sparse LoRA (L1): #AA4499 v 3
skip_adapter: SkipLoRA (per adapter): #41A393 P 0
dora: DoRA (PEFT): #7A5230 X 1
loss_floor: loss floor: #228833 D 1
gradient_norm: gradient norm: #A4952D v 2
novelty_loss: novelty + loss floor: #6F4FA8 P 3
least_novel: least novel: #ED7029 X 0
random50: random batches (50 %): #949494 o 1
slora50: SLoRA (50 %): #D4709A s 2
random_tokens: random tokens: #8C6D31 ^ 3
random20: random tokens (20 %): #4D4D4D D 0
flora20: FLoRA (20 %): #C4420B v 1
flora40: FLoRA (40 %): #5E3C99 P 2
pps20: FLoRA, PPS (20 %): #01665E X 3
random20_gather: random tokens (20 %), gather: #8A8F99 < 0
flora20_gather: FLoRA (20 %), gather: #DD7554 > 1
flora40_gather: FLoRA (40 %), gather: #9E88D4 p 2
pps20_gather: FLoRA, PPS (20 %), gather: #3C9F7A * 3
targets_only: all targets, gather: #1F4E8C h 0
flora_fractional: FLoRA, fractional: #7F3B08 d 1
random_tokens_fractional: random tokens, fractional: #6B7A2E 8 2
pps: FLoRA, PPS: #B0456B < 3
pps_fractional: FLoRA, PPS, fractional: #2E6E8E > 0
"""
_LINES = [line.split(": ") for line in ROWS.strip().split("\n")]
LABELS = {row: label for row, label, _ in _LINES}
LOOKS = {row: look.split() for row, _, look in _LINES}


def order(rows: Iterable[str]) -> list[str]:
    """Distinct rows, known ones first in the order of `LABELS`, then by name."""
    known = [*LABELS]
    return sorted(set(rows), key=lambda row: (known.index(row) if row in LABELS else len(known), row))


def label(row: str, records: Sequence[Record] = ()) -> str:
    """The name of a row in tables and figures: its own, where its params file says one, else `LABELS`'."""
    own = (record.resolved.get("label") for record in records if record.row == row)
    return next(filter(None, own), LABELS.get(row, row))


def labels(records: Sequence[Record]) -> dict[str, str]:
    """Row -> its name, in the order of tables."""
    return {row: label(row, records) for row in order(record.row for record in records)}
