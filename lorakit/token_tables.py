"""What choosing tokens does to a gradient, in numbers for `token_figures` to draw; for what it costs see `token_costs`.

A batch is what a collator makes: `input_ids`, `attention_mask` and `labels`, (B, T) each; N predictions have a label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor, nn

from lorakit.head import HeadInput, find_head, rows
from lorakit.settings import Gating
from lorakit.sketch_tables import SPARSE, spearman
from lorakit.sketches import sparse_error
from lorakit.sketches.head_gradient import predicted
from lorakit.tokens import build_tokens
from lorakit.tokens import choice as policies

Batch = Mapping[str, Tensor]
EVERY = 0.9999  # a share that chooses every prediction and yet takes the path of chosen ones: 1 is the plain model
MODES = ("gather", "fractional")


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


def rank_table(
    model: nn.Module, batches: Sequence[Batch], sizes: Sequence[int], seeds: int
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Exact scores (N,), and by m = `sketch_dim` those of sketches with seeds 0 … `seeds` − 1, (seeds, N)."""
    exact = token_scores(model, batches, score="gradient_norm")
    sketched = {
        size: np.stack([token_scores(model, batches, seed, score="sketch", sketch_dim=size) for seed in range(seeds)])
        for size in sizes
    }
    return exact, sketched


def correlations(exact: np.ndarray, sketched: Mapping[int, np.ndarray]) -> dict[int, list[float]]:
    """By m: Spearman's correlation of sketched and exact scores, a value per seed."""
    return {size: [spearman(row, exact) for row in found] for size, found in sketched.items()}


def label_table(
    model: nn.Module, batches: Sequence[Batch], topks: Sequence[int], share: float
) -> dict[str, list[float]]:
    """By way of leaving words out of e: how many of the top-k predictions by ‖h‖·‖ê‖ are those by the exact score.

    A list per way, a value for each of `topks`; `share` of the predictions are top.
    """
    table: dict[str, list[float]] = {name: [] for name in SPARSE}
    parts = [predicted(*head_outputs(model, batch), "causal") for batch in batches]
    h, logits, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    exact = _top(torch.from_numpy(token_scores(model, batches, score="gradient_norm")), share)
    for topk in topks:
        indices, values = sparse_error(logits, labels, topk)
        for name, change in SPARSE.items():
            found = _top(h.norm(dim=1) * change(indices, values, logits, labels).norm(dim=1), share)
            table[name].append(len(found & exact) / len(exact))
    return table


def _top(scores: Tensor, share: float) -> set[int]:
    return set(policies.largest(scores, policies.quota(len(scores), share)).tolist())


# gradients -------------------------------------------------------------------------------------------


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def gradient(model: nn.Module, batch: Batch, **settings: Any) -> Tensor:
    """Gradient (P,) of everything trained, as FLoRA's trainer would have it; `settings` are keys of `gating`."""
    tokens = build_tokens(Gating(**settings), model, "causal")
    inputs = dict(batch)
    labels = inputs.pop("labels")
    if tokens.selective:
        loss = tokens.select(model, inputs, labels).finish() / tokens.divisor(labels)
    else:
        loss = token_losses(model, batch).mean()
    return _flat(loss, trained_parameters(model))


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Losses (N,) of a batch's predictions, with a graph."""
    inputs = dict(batch)
    where, targets = rows(inputs.pop("labels"), "causal")
    return nn.functional.cross_entropy(model(**inputs).logits.flatten(0, 1)[where], targets, reduction="none")


def token_gradients(model: nn.Module, batch: Batch) -> Tensor:
    """Gradient (N, P) of every prediction's own loss: N backwards."""
    trained = trained_parameters(model)
    return torch.stack([_flat(loss, trained, keep=True) for loss in token_losses(model, batch)])


def _flat(loss: Tensor, parameters: Sequence[nn.Parameter], keep: bool = False) -> Tensor:
    found = torch.autograd.grad(loss, parameters, retain_graph=keep, materialize_grads=True)
    return torch.cat([part.flatten() for part in found])


def proxy_table(model: nn.Module, batch: Batch, gradients: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Score -> Spearman's correlation with the norms of the adapters' own `gradients` (N, P) of this batch."""
    truth = gradients.norm(dim=1).numpy()
    return {name: spearman(token_scores(model, [batch], score=name), truth) for name in names}


class Estimate(NamedTuple):
    """An estimate of the full gradient over draws, in units of the full one's length.

    cosine, length, bias: of the mean estimate: its cosine with the full gradient, its length, its distance from it.
    spread: root mean square distance of one draw's estimate from the mean one; error: of the mean, by chance alone.
    """

    cosine: float
    length: float
    bias: float
    spread: float
    error: float


def policy_table(gradients: Tensor, scores: np.ndarray, share: float, draws: int, seed: int) -> dict[str, Estimate]:
    """Policy -> its `Estimate` of the mean of `gradients` (N, P), keeping `share` of the N by `scores` (N,)."""
    sizes, count = torch.from_numpy(scores), len(scores)
    k, inner = policies.quota(count, share), (gradients @ gradients.T).double()
    generator = Generator().manual_seed(seed)

    def weights(policy: str) -> Tensor:
        """(N,) float64: the estimate is their product with the gradients."""
        made = torch.zeros(count, dtype=torch.float64)
        if policy == "PPS":
            index, probabilities = policies.proportional(sizes, k, generator)
            made[index] = 1 / (count * probabilities)
        else:
            made[policies.largest(sizes, k) if policy == "top-k" else policies.uniform(count, k, generator)] = 1 / k
        return made

    found = {policy: torch.stack([weights(policy) for _ in range(draws)]) for policy in ("top-k", "random", "PPS")}
    return {policy: _estimate(drawn, inner) for policy, drawn in found.items()}


def _estimate(drawn: Tensor, inner: Tensor) -> Estimate:
    """Of weights (draws, N), with the gradients' inner products (N, N): nothing of a gradient's length is needed."""
    full = torch.full_like(drawn[0], 1 / drawn.shape[1])
    mean = drawn.mean(0)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return ((a @ inner) * b).sum(-1)

    length = product(full, full).sqrt()
    off, around = mean - full, drawn - mean
    spread = product(around, around).clamp(min=0).mean().sqrt() / length
    longer = product(mean, mean).sqrt() / length
    cosine = product(mean, full) / (longer * length**2)
    bias = product(off, off).clamp(min=0).sqrt() / length
    chance = float(spread) / len(drawn) ** 0.5
    return Estimate(float(cosine), float(longer), float(bias), float(spread), chance)


def noise_table(model: nn.Module, batch: Batch, noise: float, share: float, draws: int, seed: int) -> dict[str, float]:
    """Policy -> share of wrong labels among the chosen, after `noise` of all labels were replaced at random."""
    generator = Generator().manual_seed(seed)
    labels = batch["labels"].clone()
    where, _ = rows(labels, "causal")
    wrong = policies.uniform(len(where), policies.quota(len(where), noise), generator)
    words = find_head(model, "causal").outputs
    flat = labels.view(-1)
    flat[where[wrong] + 1] = torch.randint(words, (len(wrong),), generator=generator)
    sizes = torch.from_numpy(token_scores(model, [{**batch, "labels": labels}], score="gradient_norm"))
    bad = torch.zeros(len(where), dtype=torch.float64)
    bad[wrong] = 1
    k = policies.quota(len(where), share)
    drawn = [policies.proportional(sizes, k, generator)[0] for _ in range(draws)]
    return {
        "all labels": float(bad.mean()),
        "top-k": float(bad[policies.largest(sizes, k)].mean()),
        "PPS": float(torch.stack([bad[index].mean() for index in drawn]).mean()),
    }


class Truncation(NamedTuple):
    """Cosines at one fraction, means over batches.

    same: mode "fractional" with mode "gather" on the same tokens; gather, fractional: with the gradient of all tokens.
    """

    same: float
    gather: float
    fractional: float


def truncation_table(
    model: nn.Module, batches: Sequence[Batch], fractions: Sequence[float], **settings: Any
) -> dict[float, Truncation]:
    """Fraction -> `Truncation`, for `settings` of `gating`; a fraction of 1 stands for `EVERY`."""
    full = [gradient(model, batch) for batch in batches]
    table = {}
    for fraction in fractions:
        keys = {"method": "flora", "topk_tokens": min(fraction, EVERY)} | settings
        pairs = [[gradient(model, batch, mode=mode, **keys) for mode in MODES] for batch in batches]
        cosines = [(_cosine(*pair), *(_cosine(g, f) for g in pair)) for pair, f in zip(pairs, full, strict=True)]
        table[fraction] = Truncation(*np.mean(cosines, axis=0).tolist())
    return table


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


# one text --------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """A token of a text: how it is written, its prediction's score (None where nothing is predicted), and if chosen."""

    text: str
    score: float | None
    chosen: bool


SHOWN = {"<start_of_turn>": "⟨", "<end_of_turn>": "⟩", "<bos>": "⊢", "<eos>": "⊣", "\n": "↵", " ": "·"}


def text_table(
    model: nn.Module, tokenizer: Any, row: Batch, share: float, policy: str = "topk", seed: int = 0
) -> list[Piece]:
    """The tokens of a batch with one row (1, T), as FLoRA scores and chooses them by the exact score."""
    gate = build_tokens(
        Gating(method="flora", score="gradient_norm", topk_tokens=share, policy=policy), model, "causal", seed=seed
    )
    hidden, _, labels = head_outputs(model, row)
    where, targets = rows(labels, "causal")
    scores, _ = gate.scored(hidden, where, targets)
    kept = set(gate.choose(hidden, labels).where.tolist())
    by_token = {place + 1: score for place, score in zip(where.tolist(), scores.tolist(), strict=True)}
    real = int(row["attention_mask"].sum())  # padding is on the right
    words = [tokenizer.decode([token]) for token in row["input_ids"][0, :real].tolist()]
    return [Piece(SHOWN.get(word, word), by_token.get(t), t - 1 in kept) for t, word in enumerate(words)]


def share_of_chosen(model: nn.Module, batches: Sequence[Batch], share: float) -> dict[str, float]:
    """What the `share` of predictions with the largest exact scores holds of: the sums of scores and of losses."""
    scores = token_scores(model, batches, score="gradient_norm")
    losses = token_scores(model, batches, score="loss")
    kept = policies.largest(torch.from_numpy(scores), policies.quota(len(scores), share)).numpy()
    return {name: float(v[kept].sum() / v.sum()) for name, v in {"gradient norm": scores, "loss": losses}.items()}
