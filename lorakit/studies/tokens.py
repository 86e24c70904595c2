"""What choosing tokens does to a gradient, in numbers and pictures; for what it costs see `token_costs`.

A batch is what a collator makes: `input_ids`, `attention_mask` and `labels`, (B, T) each; N predictions have a label.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Generator, Tensor, nn

from lorakit.analysis import stats, style
from lorakit.head import HeadInput, find_head, rows
from lorakit.settings import Gating, TokenSettings
from lorakit.sketches import sparse_error
from lorakit.sketches.head_gradient import predicted
from lorakit.studies.sketches import SPARSE, Sketched
from lorakit.tokens import build_tokens
from lorakit.tokens import choice as policies

Batch = Mapping[str, Tensor]
EVERY = 0.9999  # a share that chooses every prediction and yet takes the path of chosen ones: 1 is the plain model
MODES = {"gather": style.Look("#D55E00", "s", style.DASHES[1]), "fractional": style.Look("#0072B2", "o")}


# scores ----------------------------------------------------------------------------------------------


@torch.no_grad()
def head_outputs(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """What the head was given and gave: hidden states (B, T, H), logits (B, T, V), and the labels (B, T)."""
    seen, inputs = HeadInput(find_head(model, "causal")), dict(batch)
    labels = inputs.pop("labels")
    logits = model(**inputs).logits
    hidden = seen.take(logits)
    seen.remove()
    return hidden, logits, labels


def token_scores(model: nn.Module, batches: Sequence[Batch], seed: int = 0, **settings: Any) -> np.ndarray:
    """Scores (N,) of all predictions of `batches`, one after the other; `settings` are keys of `gating`."""
    gate, found = build_tokens(Gating(method="flora", **settings), model, "causal", seed=seed), []
    for batch in batches:
        hidden, _, labels = head_outputs(model, batch)
        found.append(gate.scored(hidden, *rows(labels, "causal"))[0])
    return torch.cat(found).double().numpy()


def sketched_scores(model: nn.Module, batches: Sequence[Batch], sizes: Sequence[int], seeds: int) -> Sketched:
    """Exact scores, and by m = `sketch_dim` those of sketches with seeds 0 … `seeds` − 1: for `sketches.agreement`."""

    def sketched(size: int, seed: int) -> np.ndarray:
        return token_scores(model, batches, seed, score="sketch", sketch_dim=size)

    exact = token_scores(model, batches, score="gradient_norm")
    return Sketched(exact, {m: np.stack([sketched(m, seed) for seed in range(seeds)]) for m in sizes})


def label_table(model: nn.Module, batches: Sequence[Batch], topks: Sequence[int], share: float) -> pd.DataFrame:
    """Each of `topks` by way of leaving words out of e: how many of the top predictions by ‖h‖·‖ê‖ rightly are.

    The right ones are those by the exact score; `share` of the predictions are top.
    """
    parts = [predicted(*head_outputs(model, batch), "causal") for batch in batches]
    h, logits, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    scores, count = torch.from_numpy(token_scores(model, batches, score="gradient_norm")), policies.quota(len(h), share)
    exact, table = {*policies.largest(scores, count).tolist()}, []
    for topk in topks:
        indices, values = sparse_error(logits, labels, topk)
        errors = [change(indices, values, logits, labels).norm(dim=1) for change in SPARSE.values()]
        found = [policies.largest(h.norm(dim=1) * error, count).tolist() for error in errors]
        table.append([len(exact.intersection(top)) / len(exact) for top in found])
    return pd.DataFrame(table, pd.Index(topks, name="topk_logits"), [*SPARSE])


@style.captioned
def label_overlap(table: pd.DataFrame) -> Figure:
    """How many of the top predictions a score rightly chooses that keeps only some words.

    Args:
        table: `label_table`.
    """
    with style.panel(2.6) as ax:
        style.lines(ax, table)
        ax.set(xlabel="words kept per prediction, topk_logits", ylabel="rightly chosen", xscale="log", ylim=(0, 1.04))
        style.plain_ticks(ax.xaxis, [*table.index])
        return style.legend(ax)


# gradients -------------------------------------------------------------------------------------------


def gradient(model: nn.Module, batch: Batch, **settings: Any) -> Tensor:
    """Gradient (P,) of everything trained, as FLoRA's trainer would have it; `settings` are keys of `gating`."""
    tokens, inputs = build_tokens(Gating(**settings), model, "causal", loss=TokenSettings()), dict(batch)
    labels = inputs.pop("labels")
    return _flat(tokens.select(model, inputs, labels).finish() / tokens.divisor(labels), model)


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Losses (N,) of a batch's predictions, with a graph."""
    inputs = dict(batch)
    where, targets = rows(inputs.pop("labels"), "causal")
    return nn.functional.cross_entropy(model(**inputs).logits.flatten(0, 1)[where], targets, reduction="none")


def token_gradients(model: nn.Module, batch: Batch) -> Tensor:
    """Gradient (N, P) of every prediction's own loss: N backwards."""
    return torch.stack([_flat(loss, model, keep=True) for loss in token_losses(model, batch)])


def _flat(loss: Tensor, model: nn.Module, keep: bool = False) -> Tensor:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, trained, retain_graph=keep, materialize_grads=True)
    return torch.cat([part.flatten() for part in found])


def proxy_table(model: nn.Module, batch: Batch, gradients: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Score -> Spearman's correlation with the norms of the adapters' own `gradients` (N, P) of this batch."""
    truth = gradients.norm(dim=1).numpy()
    return {name: stats.spearman(token_scores(model, [batch], score=name), truth) for name in names}


def policy_table(gradients: Tensor, scores: np.ndarray, shares: Sequence[float], draws: int, seed: int) -> pd.DataFrame:
    """How well policies estimate the mean of `gradients` (N, P), keeping a share of the N by `scores` (N,).

    A line per share and policy, in units of the full gradient's length:
        cosine, length, bias: of the mean over draws: its cosine with the full one, its length, its distance from it.
        spread: root mean square distance of one draw's estimate from the mean; error: of the mean, by chance alone.
    """
    sizes, count, inner = torch.from_numpy(scores), len(scores), (gradients @ gradients.T).double()

    def weights(policy: str, k: int, generator: Generator) -> Tensor:
        """(N,) float64: the estimate is their product with the gradients."""
        made = torch.zeros(count, dtype=torch.float64)
        if policy == "PPS":
            index, probabilities = policies.proportional(sizes, k, generator)
            made[index] = 1 / (count * probabilities)
        else:
            made[policies.largest(sizes, k) if policy == "top-k" else policies.uniform(count, k, generator)] = 1 / k
        return made

    lines = []
    for share in shares:
        k, generator = policies.quota(count, share), Generator().manual_seed(seed)
        for policy in ("top-k", "random", "PPS"):
            drawn = torch.stack([weights(policy, k, generator) for _ in range(draws)])
            lines.append({"share": share, "policy": policy, **estimate(drawn, inner)})
    return pd.DataFrame(lines)


def estimate(drawn: Tensor, inner: Tensor) -> dict[str, float]:
    """A line of `policy_table`, of weights (draws, N) and the gradients' inner products (N, N)."""
    full = torch.full_like(drawn[0], 1 / drawn.shape[1])
    mean = drawn.mean(0)
    off, around = mean - full, drawn - mean
    length = (full @ inner @ full).sqrt()
    spread = ((around @ inner) * around).sum(-1).clamp(min=0).mean().sqrt() / length
    longer = (mean @ inner @ mean).sqrt() / length
    cosine = mean @ inner @ full / (longer * length**2)
    bias = (off @ inner @ off).clamp(min=0).sqrt() / length
    found = {"cosine": cosine, "length": longer, "bias": bias, "spread": spread, "error": spread / len(drawn) ** 0.5}
    return {name: float(value) for name, value in found.items()}


@style.captioned
def policy_errors(table: pd.DataFrame) -> Figure:
    """Where the mean estimate points (left), how far one is off (right), by share of chosen tokens.

    Args:
        table: `policy_table`.
    """
    table = table.assign(off=np.hypot(table["bias"], table["spread"]))
    names = table["policy"].unique()
    with style.panel(2.7, 2) as (left, right):
        style.lines(left, table.pivot(index="share", columns="policy", values="cosine")[names])
        style.lines(right, table.pivot(index="share", columns="policy", values="off")[names])
        lowest = table["cosine"].min() - 0.05
        left.set(ylabel="cosine with the full gradient", ylim=(lowest, 1.02), title="the mean estimate")
        right.set(ylabel="rms error, full gradient = 1", ylim=(0, None), title="one estimate")
        for ax in (left, right):
            share_axis(ax, table["share"].unique())
        return style.legend(left)


def share_axis(ax: Any, shares: Sequence[float]) -> None:
    """Shares of chosen predictions along x, in percent."""
    style.plain_ticks(ax.xaxis, shares, factor=100)
    ax.set_xlabel("predictions chosen (%)")


def noise_table(model: nn.Module, batch: Batch, noise: float, share: float, draws: int, seed: int) -> dict[str, float]:
    """Policy -> share of wrong labels among the chosen, after `noise` of all labels were replaced at random."""
    generator = Generator().manual_seed(seed)
    labels = batch["labels"].clone()
    where, _ = rows(labels, "causal")
    wrong = policies.uniform(len(where), policies.quota(len(where), noise), generator)
    words = find_head(model, "causal").outputs
    labels.view(-1)[where[wrong] + 1] = torch.randint(words, (len(wrong),), generator=generator)
    sizes = torch.from_numpy(token_scores(model, [{**batch, "labels": labels}], score="gradient_norm"))
    bad = torch.zeros(len(where), dtype=torch.float64).index_fill(0, wrong, 1)
    k = policies.quota(len(where), share)
    found = {"all labels": bad.mean(), "top-k": bad[policies.largest(sizes, k)].mean()}
    found["PPS"] = torch.stack([bad[policies.proportional(sizes, k, generator)[0]].mean() for _ in range(draws)]).mean()
    return {name: float(share) for name, share in found.items()}


def truncation_table(
    model: nn.Module, batches: Sequence[Batch], fractions: Sequence[float], **settings: Any
) -> pd.DataFrame:
    """By fraction, cosines of two gradients, means over batches, for `settings` of `gating`.

    same: mode "fractional" with mode "gather" on the same tokens; gather, fractional: with the gradient of all tokens.
    A fraction of 1 stands for `EVERY`.
    """
    table, full = [], [gradient(model, batch).double() for batch in batches]
    for fraction in fractions:
        keys = {"method": "flora", "topk_tokens": min(fraction, EVERY)} | settings
        cosines = []
        for batch, whole in zip(batches, full, strict=True):
            gather, fractional = (gradient(model, batch, mode=mode, **keys).double() for mode in MODES)
            one, other = torch.stack([gather, gather, fractional]), torch.stack([fractional, whole, whole])
            cosines.append(nn.functional.cosine_similarity(one, other, dim=1).numpy())
        table.append(np.mean(cosines, axis=0))
    return pd.DataFrame(table, pd.Index(fractions, name="fraction"), ["same", *MODES])


@style.captioned
def truncation(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """How alike two gradients are, by share of chosen tokens; 1: one direction.

    Args:
        tables: name -> `truncation_table`.
    """
    labels = {"same": "fractional with gather, same tokens"} | {mode: f"{mode} with all tokens" for mode in MODES}
    looks = {"same": style.series(1, first=3)[0]} | MODES
    with style.panel(2.8, len(tables), sharey=True, squeeze=False) as axes:
        for ax, (name, table) in zip(axes.flat, tables.items(), strict=True):
            style.lines(ax, table, looks, labels=labels)
            ax.set_title(name)
            share_axis(ax, [*table.index])
        lowest = min(table.min(axis=None) for table in tables.values())
        axes[0, 0].set(ylabel="cosine of two gradients", ylim=(max(0, lowest - 0.05), 1.03))
        return style.legend(axes[0, 0])
