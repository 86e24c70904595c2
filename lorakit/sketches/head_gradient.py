"""A linear head's gradient at a token is h ⊗ e, e = softmax(logits) − onehot(y): norm ‖h‖·‖e‖, sum Σ h_t ⊗ e_t.

Logits are taken as the loss sees them. If the model caps them, logit = c·tanh(raw/c), then e is the derivative by the
raw ones, e·(1 − (logit/c)²). Everything works on chunks of tokens: with 262k words the logits set the peak memory.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from lorakit.errors import require, require_finite
from lorakit.head import require_words, rows
from lorakit.sketches.tensor_sketch import TensorSketch, as_float

BLOCK = 2**25  # logits in a chunk, 128 MiB in fp32: fewer would read a large head's weights too often
NOT_FINITE = "must be finite where a label is predicted"
GAPS = 3  # in a chunk's positions, up to which its parts are worked on one by one rather than copied together
GROUP = {0: 64, 2**17: 128}  # neighbours of which first only the largest logit is looked at, from how many words on


def chunk_of(words: int) -> int:
    """Predictions over `words` words in a chunk."""
    return max(16, BLOCK // words)


def predicted(hidden: Tensor, logits: Tensor, labels: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (N, H), logits (N, V) and labels (N,) of all predictions at once: a copy; the rest takes chunks."""
    positions, targets = _checked(hidden, logits, labels, kind)
    return hidden.flatten(0, -2)[positions], logits.flatten(0, -2)[positions], targets


@torch.no_grad()
def error_norms(logits: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
    """‖e‖ (N,) of `logits` (N, V) and `labels` (N,), exact: √(Σp² − 2p_y + 1) where nothing is capped.

    Raises:
        ParameterError: a row of logits has no softmax (NaN, +∞).
    """
    error, scale, _ = error_in_place(as_float(logits).clone(), labels, softcap)
    require_finite(bool(torch.isfinite(scale).all()), "logits", "non-finite values", NOT_FINITE)
    return error.norm(dim=1) / scale


@torch.no_grad()
def error_in_place(logits: Tensor, labels: Tensor, softcap: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Turns `logits` (N, V) float32 into s·e; returns that, s (N,) and the losses −log p_y (N,), in one exponential.

    A row that has no softmax (NaN, +∞) gets an s that is not finite.
    """
    factor = None if softcap is None else _capped(logits, softcap)
    gold = labels[:, None]
    largest = logits.amax(dim=1, keepdim=True)
    chosen = logits.gather(1, gold) - largest
    error = logits.sub_(largest).exp_()
    scale = error.sum(dim=1, keepdim=True)
    losses = scale.log() - chosen
    error.scatter_add_(1, gold, -scale)  # p_y − 1 by itself: as Σp² − 2p_y + 1 the norm of a small error cancels
    if factor is not None:
        error *= factor
    return error, scale.squeeze(1), losses.squeeze(1)


@torch.no_grad()
def gradient_norms(hidden: Tensor, logits: Tensor, labels: Tensor, kind: str, softcap: float | None = None) -> Tensor:
    """‖h_t ⊗ e_t‖ (N,) of every prediction, exact, in the order of `rows`.

    Args:
        hidden: (B, T, H), what the head was given; (B, H) for "classify".
        logits: (B, T, V), or (B, V).
        labels: (B, T), or (B,).
        kind: see `rows`.
        softcap: the model's cap on its logits, if it has one.
    """
    norms = [as_float(h).norm(dim=1) * error_norms(z, y, softcap) for h, z, y in _chunks(hidden, logits, labels, kind)]
    return torch.cat(norms) if norms else as_float(hidden).new_zeros(0)


@torch.no_grad()
def sparse_error(
    logits: Tensor,
    labels: Tensor,
    topk: int,
    softcap: float | None = None,
    log_normaliser: Tensor | None = None,
    maxima: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The K most probable words' entries of e and the gold one's: indices (N, K + 1), values (N, K + 1).

    The gold entry is the last; where the gold word is among the K as well, its value there is 0, so that it counts
    once. Probabilities are those of the whole vocabulary. From topk = V on nothing is left out.

    Args:
        logits: (N, V).
        labels: (N,).
        topk: K; V if that is less.
        softcap: see `gradient_norms`.
        log_normaliser: log Σ exp(logits) (N,) if it is at hand.
        maxima: `group_maxima` of the logits if they are at hand.

    Raises:
        ParameterError: `topk` is below 1, or a row of logits has no softmax.
    """
    require(topk >= 1, "topk", topk, "must be at least 1")
    if log_normaliser is None:
        log_normaliser = as_float(logits).logsumexp(dim=1)  # a word of logit −∞ has probability 0
        require_finite(bool(torch.isfinite(log_normaliser).all()), "logits", "non-finite values", NOT_FINITE)
    gold = labels[:, None]
    indices = torch.cat([top_indices(logits, topk, maxima), gold], dim=1)
    chosen = as_float(logits.gather(1, indices))
    values = (chosen - log_normaliser[:, None]).exp_()
    values[:, :-1].masked_fill_(indices[:, :-1] == gold, 0)
    values[:, -1] -= 1
    return indices, values if softcap is None else values * _capped(chosen, softcap)


def top_indices(logits: Tensor, topk: int, maxima: Tensor | None = None) -> Tensor:
    """Places (N, K) of each row's K largest of `logits` (N, V), exact, in no order; all V from topk = V on.

    The K largest lie in the K groups with the largest `maxima`, and those cost one pass; `torch.topk` over a large
    vocabulary costs many times that.
    """
    count, words = logits.shape
    if topk >= words:
        return torch.arange(words, device=logits.device).expand(count, words)
    size = group_of(words)
    if words <= 2 * size * topk:
        return logits.topk(topk, dim=1, sorted=False).indices
    maxima = group_maxima(logits) if maxima is None else maxima
    groups = maxima.topk(topk, dim=1, sorted=False).indices
    best = _members(logits, groups, size).topk(topk, dim=1, sorted=False).indices
    return groups.gather(1, best // size).mul_(size).add_(best % size)


def group_of(words: int) -> int:
    """How many neighbouring words of a vocabulary make a group."""
    return max(size for least, size in GROUP.items() if least <= words)


def group_maxima(logits: Tensor) -> Tensor:
    """The largest of each group of `logits` (N, V), (N, ⌈V / size⌉), without a padded copy."""
    whole = (words := logits.shape[1]) // (size := group_of(words)) * size
    maxima = logits[:, :whole].unflatten(1, (whole // size, size)).amax(dim=2)
    return maxima if whole == words else torch.cat([maxima, logits[:, whole:].amax(dim=1, keepdim=True)], dim=1)


def _members(logits: Tensor, groups: Tensor, size: int) -> Tensor:
    """Logits of each row's `groups` (N, K), one group after the other: (N, K · size); −∞ beyond the last word."""
    count, words = logits.shape
    if words % size == 0 and logits.is_contiguous():  # a group is a row of its own: copied as a block
        first = torch.arange(count, device=logits.device)[:, None] * (words // size)
        return logits.view(-1, size).index_select(0, (first + groups).flatten()).view(count, -1)
    members = (groups[:, :, None] * size + torch.arange(size, device=logits.device)).flatten(1)
    beyond = members >= words
    return logits.gather(1, members.clamp_(max=words - 1)).masked_fill_(beyond, -torch.inf)


@torch.no_grad()
def sketch_batch(
    sketch: TensorSketch,
    hidden: Tensor,
    logits: Tensor,
    labels: Tensor,
    kind: str,
    topk: int,
    softcap: float | None = None,
    losses: Tensor | None = None,
    maxima: Tensor | None = None,
) -> Tensor:
    """Σ_t T(h_t, e_t) (m,) float32: the sketch of the head's gradient of the summed loss; 0 without a prediction.

    Arguments and errors are those of `gradient_norms` and `sparse_error`.

    Args:
        losses: negative log-likelihood at every position, (B·T,) or (B,), if it is at hand: log Σ exp(logits) is then
            its sum with the gold logit, and no pass over the vocabulary has to find it.
        maxima: `group_maxima` at every position, if they are at hand: the words they are of are found without another.
    """
    total = torch.zeros(sketch.size, device=hidden.device)
    for h, z, y, loss, largest in _chunks(hidden, logits, labels, kind, losses, maxima):
        normaliser = None
        if loss is not None:
            require_finite(bool(torch.isfinite(loss).all()), "logits", "non-finite loss", NOT_FINITE)
            normaliser = as_float(loss) + as_float(z.gather(1, y[:, None])).squeeze(1)
        total += sketch.sum_sparse(h, *sparse_error(z, y, topk, softcap, normaliser, largest))
    return total


def _chunks(
    hidden: Tensor, logits: Tensor, labels: Tensor, kind: str, *beside: Tensor | None
) -> Iterator[tuple[Tensor, ...]]:
    """(hidden, logits, labels, *beside) of at most `chunk_of` predictions at a time; neighbours are not copied."""
    chunk = chunk_of(logits.shape[-1])
    positions, targets = _checked(hidden, logits, labels, kind)
    hidden, logits = hidden.flatten(0, -2), logits.flatten(0, -2)
    for where, y in zip(positions.split(chunk), targets.split(chunk), strict=True):
        for part, taken in _neighbours(where):
            yield hidden[taken], logits[taken], y[part], *(each if each is None else each[taken] for each in beside)


def _neighbours(where: Tensor) -> Iterator[tuple[slice, slice | Tensor]]:
    """Which of `where` (n,), ascending, and how to take them: by slices while they have few gaps, else all at once."""
    if not len(where):
        return
    gaps = (where.diff() > 1).nonzero().squeeze(1) + 1
    if len(gaps) > GAPS:
        yield slice(0, len(where)), where
        return
    for start, end in pairwise([0, *gaps.tolist(), len(where)]):
        first = int(where[start])
        yield slice(start, end), slice(first, first + end - start)


def _checked(hidden: Tensor, logits: Tensor, labels: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """`rows`, once the shapes and the labels fit."""
    positions, targets = rows(labels, kind)
    for name, tensor in (("hidden", hidden), ("logits", logits)):
        fits = tensor.shape[:-1] == labels.shape
        require(fits, name, tuple(tensor.shape), f"must be {tuple(labels.shape)} and one dimension more")
    require_words(targets, logits.shape[-1])
    return positions, targets


def _capped(logits: Tensor, softcap: float) -> Tensor:
    """d logit / d raw = 1 − (logit/c)² for logit = c·tanh(raw/c)."""
    require(softcap > 0, "softcap", softcap, "must be above 0")
    return 1 - (logits / softcap) ** 2
