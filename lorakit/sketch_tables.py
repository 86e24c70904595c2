"""How good the sketches are: what a sketch says next to the exact value, for `sketch_figures` to draw.

A `Batch` is what the last layer of a causal language model leaves: hidden states (B, T, H), logits (B, T, V) and labels
(B, T). Its exact head gradient G = Σ_t h_t ⊗ e_t, (H, V), is only affordable on a small model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from lorakit.sketches import FrequentDirections, TensorSketch, predicted, sketch_batch, sparse_error

Batch = tuple[Tensor, Tensor, Tensor]
VARIANCE = 2 + 3**2  # of an inner product of unit vectors, times m, at most


def head_gradient(batch: Batch) -> Tensor:
    """G = Σ_t h_t ⊗ e_t (H, V), float64, of the summed loss."""
    h, logits, labels = predicted(*batch, "causal")
    error = logits.double().softmax(dim=1)
    error[torch.arange(len(labels)), labels] -= 1
    return h.double().T @ error


# TensorSketch ---------------------------------------------------------------------------------------


class Cosines(NamedTuple):
    """Cosines between the gradients of all pairs of batches: exact (pairs,), and by m as sketched (seeds, pairs)."""

    exact: np.ndarray
    sketched: dict[int, np.ndarray]


def cosine_table(batches: Sequence[Batch], sizes: Sequence[int], seeds: int) -> Cosines:
    """`Cosines` of `batches` for sketches of each of `sizes`, each with seeds 0 … `seeds` − 1.

    The sketched inner product is over the exact lengths, so that only it can err.
    """
    exact = torch.stack([head_gradient(batch).flatten() for batch in batches])
    lengths = exact.norm(dim=1, keepdim=True)
    pairs = torch.triu_indices(len(batches), len(batches), offset=1)
    one, two = pairs.tolist()

    def cosines(vectors: Tensor) -> np.ndarray:
        unit = vectors / lengths
        return (unit @ unit.T)[one, two].numpy()

    sketched = {size: np.stack([cosines(_sketches(batches, size, seed)) for seed in range(seeds)]) for size in sizes}
    return Cosines(cosines(exact), sketched)


def _sketches(batches: Sequence[Batch], size: int, seed: int) -> Tensor:
    """(batches, m) float64, with nothing left out of the errors."""
    width, words = batches[0][0].shape[-1], batches[0][1].shape[-1]
    sketch = TensorSketch(width, words, size, generator=Generator().manual_seed(seed))
    return torch.stack([sketch_batch(sketch, *batch, "causal", topk=words) for batch in batches]).double()


def error_table(cosines: Cosines) -> dict[int, tuple[float, float]]:
    """By m: the root mean square error of a cosine, and its bound √((2 + 3²)/m)."""
    return {
        size: (float(np.sqrt(np.mean((found - cosines.exact) ** 2))), float(np.sqrt(VARIANCE / size)))
        for size, found in cosines.sketched.items()
    }


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two samples (N,) without ties."""
    return float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])


def rank_table(cosines: Cosines) -> dict[int, list[float]]:
    """By m: Spearman's correlation of sketched and exact cosines, a value per seed."""
    return {size: [spearman(row, cosines.exact) for row in found] for size, found in cosines.sketched.items()}


# The sparse error -----------------------------------------------------------------------------------


def _only_top(indices: Tensor, values: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """The gold word's entry is dropped where it is not among the K."""
    inside = (indices[:, :-1] == labels[:, None]).any(dim=1)
    return torch.cat([values[:, :-1], (values[:, -1] * inside)[:, None]], dim=1)


def _softmax_of_kept(indices: Tensor, values: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Probabilities as if there were no other words than those kept."""
    gold = labels[:, None]
    kept = logits.gather(1, indices)
    kept[:, :-1].masked_fill_(indices[:, :-1] == gold, -torch.inf)  # it is the last column's
    error = kept.softmax(dim=1)
    error[:, -1] -= 1
    return error


SPARSE: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "the K most probable words and the label": lambda indices, values, logits, labels: values,
    "without the label": _only_top,
    "softmax over these words alone": _softmax_of_kept,
}


def sparse_table(batches: Sequence[Batch], topks: Sequence[int]) -> dict[str, list[float]]:
    """By way of leaving words out: ‖Ĝ − G‖ / ‖G‖ for each of `topks`, the mean over batches."""
    table: dict[str, list[float]] = {name: [] for name in SPARSE}
    for topk in topks:
        errors = np.mean([_sparse_errors(batch, topk) for batch in batches], axis=0)
        for name, error in zip(SPARSE, errors, strict=True):
            table[name].append(float(error))
    return table


def _sparse_errors(batch: Batch, topk: int) -> list[float]:
    h, logits, labels = predicted(*batch, "causal")
    h, logits, exact = h.double(), logits.double(), head_gradient(batch)
    indices, values = sparse_error(logits, labels, topk)
    found = []
    for change in SPARSE.values():
        error = torch.zeros_like(logits).scatter_add_(1, indices, change(indices, values, logits, labels))
        found.append(float((h.T @ error - exact).norm() / exact.norm()))
    return found


# Frequent Directions --------------------------------------------------------------------------------


def drifting_stream(rows: int, dim: int, rank: int, drift: float, generator: Generator) -> Tensor:
    """Rows (rows, dim) of energy 1 on average, 0.9 of it in a subspace of `rank` directions that turns by `drift`."""
    frame = torch.linalg.qr(torch.randn(dim, rank, generator=generator)).Q
    stream = []
    for _ in range(rows):
        frame = torch.linalg.qr(frame + drift * torch.randn(dim, rank, generator=generator) / dim**0.5).Q
        signal = frame @ torch.randn(rank, generator=generator) * (0.9 / rank) ** 0.5
        stream.append(signal + torch.randn(dim, generator=generator) * (0.1 / dim) ** 0.5)
    return torch.stack(stream)


def captured_table(stream: Tensor, k: int, rows: int, decay: float) -> dict[str, np.ndarray]:
    """Share of each row's energy that k directions learned from the rows before it capture, (N,); `stream`: (N, d)."""
    dim = stream.shape[1]
    return {
        "all rows kept: the k best of the past": _captured(stream, _best_of_past(stream, k)),
        "Frequent Directions": _captured(stream, _frequent(stream, k, FrequentDirections(dim, rows))),
        f"Frequent Directions, decay {decay:g}": _captured(
            stream, _frequent(stream, k, FrequentDirections(dim, rows, decay=decay))
        ),
        "the first k rows, orthonormalised": _captured(stream, lambda n: torch.linalg.qr(stream[: min(n, k)].T).Q.T),
    }


def _captured(stream: Tensor, basis: Callable[[int], Tensor]) -> np.ndarray:
    """‖W x_n‖² / ‖x_n‖² with W = `basis(n)`, orthonormal rows learned from the first n rows."""
    return np.array([float((basis(n) @ row).square().sum() / row.square().sum()) for n, row in enumerate(stream)])


def _best_of_past(stream: Tensor, k: int) -> Callable[[int], Tensor]:
    """Exact top right singular vectors of the first n rows."""
    past = (stream[:, :, None] * stream[:, None, :]).double().cumsum(0)
    top = torch.linalg.eigh(past).eigenvectors[:, :, -k:].mT.to(stream.dtype)
    return lambda n: top[n - 1][-n:] if n else stream[:0]  # n rows have n directions at most


def _frequent(stream: Tensor, k: int, sketch: FrequentDirections) -> Callable[[int], Tensor]:
    """To be asked for n = 0, 1, 2, … in turn."""

    def basis(n: int) -> Tensor:
        sketch.insert(stream[n - 1 : n] if n else stream[:0])
        return sketch.basis(k)

    return basis


class Spectra(NamedTuple):
    """Squared singular values over ‖A‖²_F, of the stream A (d,) and of its sketch B (ℓ,); `error` is ‖AᵀA − BᵀB‖₂
    over ‖A‖²_F, and `bounds` (ℓ,) what it may be by k = 0 … ℓ − 1."""

    stream: np.ndarray
    sketch: np.ndarray
    error: float
    bounds: np.ndarray


def spectrum_table(stream: Tensor, rows: int) -> Spectra:
    """`Spectra` of `stream` (N, d) and of the ℓ = `rows` rows that Frequent Directions keep of it."""
    A, sketch = stream.double(), FrequentDirections(stream.shape[1], rows)
    sketch.insert(A)
    B, energy = sketch.matrix(), torch.linalg.svdvals(A) ** 2
    error = torch.linalg.matrix_norm(A.T @ A - B.T @ B, ord=2)
    bounds = [energy[k:].sum() / (rows - k) for k in range(rows)]
    total = float(energy.sum())
    return Spectra(
        (energy / total).numpy(),
        (sketch.singular_values() ** 2 / total).numpy(),
        float(error) / total,
        (torch.stack(bounds) / total).numpy(),
    )
