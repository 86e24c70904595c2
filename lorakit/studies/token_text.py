"""One text, token by token: what FLoRA scores and chooses in it, and what the chosen tokens hold of the whole."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import nn

from lorakit.analysis import style
from lorakit.head import rows
from lorakit.settings import Gating
from lorakit.studies.tokens import Batch, head_outputs, token_scores
from lorakit.tokens import build_tokens
from lorakit.tokens import choice as policies

SHOWN = {"<start_of_turn>": "⟨", "<end_of_turn>": "⟩", "<bos>": "⊢", "<eos>": "⊣", "\n": "↵", " ": "·"}
LINE = 62  # characters of a text in a row of the picture


class Piece(NamedTuple):
    """A token of a text: how it is written, its prediction's score (None where nothing is predicted), and if chosen."""

    text: str
    score: float | None
    chosen: bool


def text_table(model: nn.Module, tokenizer: Any, row: Batch, share: float, policy: str = "topk") -> list[Piece]:
    """The tokens of a batch with one row (1, T), as FLoRA scores and chooses them by the exact score."""
    gating = Gating(method="flora", score="gradient_norm", topk_tokens=share, policy=policy)
    gate = build_tokens(gating, model, "causal")
    hidden, _, labels = head_outputs(model, row)
    where, targets = rows(labels, "causal")
    scores, _ = gate.scored(hidden, where, targets)
    kept = set(gate.choose(hidden, labels).where.tolist())
    by_token = {place + 1: score for place, score in zip(where.tolist(), scores.tolist(), strict=True)}
    # padding is on the right
    words = [tokenizer.decode([token]) for token in row["input_ids"][0, : row["attention_mask"].sum()].tolist()]
    return [Piece(SHOWN.get(word, word), by_token.get(t), t - 1 in kept) for t, word in enumerate(words)]


@style.captioned
def text(pictures: Mapping[str, Sequence[Piece]]) -> Figure:
    """A text token by token: the darker, the larger the score; chosen tokens framed."""
    shade, frame = matplotlib.colormaps["Blues"], style.COLORS[2]
    placed = {name: _placed(pieces) for name, pieces in pictures.items()}
    heights = [pieces[-1][0] + 1 for pieces in placed.values()]
    height = 0.3 * len(heights) + 0.2 * sum(heights) + 0.1
    with style.panel(height, rows=len(heights), height_ratios=heights, squeeze=False) as axes:
        for ax, (name, pieces) in zip(axes.flat, placed.items(), strict=True):
            top = max((piece.score for piece in pictures[name] if piece.score is not None), default=1.0) or 1.0
            for row, start, (word, score, chosen) in pieces:
                fill = "0.93" if score is None else shade(0.02 + 0.88 * score / top)
                edge = {"ec": frame, "lw": 1.6, "zorder": 3} if chosen else {"ec": "none"}
                ax.add_patch(Rectangle((start + 0.05, row - 0.42), len(word) - 0.1, 0.84, fc=fill, **edge))
                ax.text(start + len(word) / 2, row, word, ha="center", va="center", family="DejaVu Sans Mono",
                        size=8, color="white" if score and score > 0.6 * top else "black", zorder=4)  # fmt: skip
            ax.set(xlim=(-0.3, LINE + 0.3), ylim=(pieces[-1][0] + 0.6, -0.6))
            ax.axis("off")
            ax.set_title(name, pad=4)
        keys = [Patch(fc=shade(0.9), ec="none"), Patch(fc="0.93", ec="none"), Patch(fc="none", ec=frame, lw=1.6)]
        return style.legend(ax, key=(keys, ["largest score", "nothing is predicted", "chosen"]))


def _placed(pieces: Sequence[Piece]) -> list[tuple[int, int, Piece]]:
    """Each with its line and where it starts there."""
    line, start, placed = 0, 0, []
    for piece in pieces:
        if start + len(piece.text) > LINE:
            line, start = line + 1, 0
        placed.append((line, start, piece))
        start += len(piece.text)
    return placed


def share_of_chosen(model: nn.Module, batches: Sequence[Batch], share: float) -> dict[str, float]:
    """What the `share` of predictions with the largest exact scores holds of: the sums of scores and of losses."""
    scores = token_scores(model, batches, score="gradient_norm")
    losses = token_scores(model, batches, score="loss")
    kept = policies.largest(torch.from_numpy(scores), policies.quota(len(scores), share)).numpy()
    return {name: float(v[kept].sum() / v.sum()) for name, v in {"gradient norm": scores, "loss": losses}.items()}
