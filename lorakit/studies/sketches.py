"""How good the sketches are: what a sketch says next to the exact value.

A `Batch` is what the last layer of a causal language model leaves: hidden states (B, T, H), logits (B, T, V) and labels
(B, T). Its exact head gradient G = Σ_t h_t ⊗ e_t, (H, V), is only affordable on a small model.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Generator, Tensor

from lorakit.analysis import stats, style
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


class Sketched(NamedTuple):
    """The same numbers exact, (N,), and by the size m of the sketch as it tells them, (seeds, N)."""

    exact: np.ndarray
    sketched: dict[int, np.ndarray]

    def ranks(self) -> pd.DataFrame:
        """A line per m and seed: Spearman's correlation of sketched and exact."""
        found = [(m, stats.spearman(row, self.exact)) for m, rows in self.sketched.items() for row in rows]
        return pd.DataFrame(found, columns=["m", "Spearman"])


def cosine_table(batches: Sequence[Batch], sizes: Sequence[int], seeds: int) -> Sketched:
    """Cosines between the gradients of all pairs of `batches`, sketched to each of `sizes` with seeds 0 … `seeds` − 1.

    The sketched inner product is over the exact lengths, so that only it can err.
    """
    exact = torch.stack([head_gradient(batch).flatten() for batch in batches])
    lengths = exact.norm(dim=1, keepdim=True)
    one, two = torch.triu_indices(len(batches), len(batches), offset=1).tolist()
    width, words = batches[0][0].shape[-1], batches[0][1].shape[-1]

    def cosines(vectors: Tensor) -> np.ndarray:
        return ((vectors / lengths) @ (vectors / lengths).T)[one, two].numpy()

    def sketched(size: int, seed: int) -> np.ndarray:
        sketch = TensorSketch(width, words, size, generator=Generator().manual_seed(seed))
        # topk: the error of every word
        return cosines(torch.stack([sketch_batch(sketch, *batch, "causal", topk=words) for batch in batches]).double())

    return Sketched(cosines(exact), {m: np.stack([sketched(m, seed) for seed in range(seeds)]) for m in sizes})


def error_table(cosines: Sketched) -> pd.DataFrame:
    """By m: the root mean square error of a cosine as "measured", and its "bound: √((2 + 3²) / m)"."""
    measured = {m: np.sqrt(np.mean((found - cosines.exact) ** 2)) for m, found in cosines.sketched.items()}
    table = pd.DataFrame({"bound: √((2 + 3²) / m)": {m: np.sqrt(VARIANCE / m) for m in measured}, "measured": measured})
    return table.rename_axis("m")


@style.captioned
def sketch_error(cosines: Sketched) -> Figure:
    """The error of a sketched cosine against m, under its bound."""
    table = error_table(cosines)
    low, high = table.min(axis=None), table.max(axis=None)
    looks = dict(zip(table, (style.Look("0.4", ".", style.DASHES[1]), style.Look(style.COLORS[1], "o")), strict=True))
    with style.panel(2.8) as ax:
        style.lines(ax, table, looks)
        ax.set(xlabel="size of the sketch, m", ylabel="rms error of a cosine", xscale="log", yscale="log",
               ylim=(low / 1.4, high * 1.4))  # fmt: skip
        style.plain_ticks(ax.yaxis, [tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1) if low <= tick <= high])
        style.plain_ticks(ax.xaxis, [*table.index])
        return style.legend(ax)


@style.captioned
def agreement(values: Sketched, size: int, what: str = "cosine", point: str = "two batches") -> Figure:
    """Left: sketched against exact, at one m and the first seed. Right: their rank correlation against m."""
    import seaborn as sns

    ranks = values.ranks()
    with style.panel(3.0, 2) as (left, right):
        left.axline((0, 0), slope=1, color="0.4", lw=0.9)
        style.points(left, values.exact, values.sketched[size][0])
        left.set(xlabel=f"exact {what}", ylabel=f"sketched, m = {size:,}", title=f"a point: {point}")
        sns.lineplot(ranks, x="m", y="Spearman", errorbar=("pi", 100), color=style.COLORS[1], marker="o", mec="none",
                     ms=style.RC["lines.markersize"], err_kws={"lw": 0}, ax=right)  # fmt: skip
        off = 1 - ranks["Spearman"].min()
        right.set(xlabel="size of the sketch, m", ylabel="Spearman's correlation", xscale="log",
                  ylim=(1 - 1.05 * off, 1 + 0.03 * off), title="band: lowest to highest seed")  # fmt: skip
        style.plain_ticks(right.xaxis, [*values.sketched])
        return right.get_figure()


# The sparse error -----------------------------------------------------------------------------------


def _softmax_of_kept(indices: Tensor, values: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Probabilities as if there were no other words than those kept."""
    kept = logits.gather(1, indices)
    kept[:, :-1].masked_fill_(indices[:, :-1] == labels[:, None], -torch.inf)  # it is the last column's
    error = kept.softmax(dim=1)
    error[:, -1] -= 1
    return error


SPARSE: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "the K most probable words and the label": lambda indices, values, logits, labels: values,
    "without the label": lambda indices, values, logits, labels: torch.cat(
        [values[:, :-1], (values[:, -1] * (indices[:, :-1] == labels[:, None]).any(dim=1))[:, None]], dim=1
    ),  # the gold word's entry is dropped where it is not among the K
    "softmax over these words alone": _softmax_of_kept,
}


def sparse_table(batches: Sequence[Batch], topks: Sequence[int]) -> pd.DataFrame:
    """Each of `topks` by way of leaving words out: ‖Ĝ − G‖ / ‖G‖, the mean over batches."""
    found = []
    for batch in batches:
        h, logits, labels = predicted(*batch, "causal")
        h, logits, exact = h.double(), logits.double(), head_gradient(batch)
        for topk in topks:
            indices, values = sparse_error(logits, labels, topk)
            for change in SPARSE.values():
                error = torch.zeros_like(logits).scatter_add_(1, indices, change(indices, values, logits, labels))
                found.append(float((h.T @ error - exact).norm() / exact.norm()))
    means = np.reshape(found, (len(batches), len(topks), len(SPARSE))).mean(axis=0)
    return pd.DataFrame(means, pd.Index(topks, name="topk"), [*SPARSE])


@style.captioned
def sparse_errors(table: pd.DataFrame) -> Figure:
    """How far a head gradient is off that keeps K words per token.

    Args:
        table: `sparse_table`.
    """
    with style.panel(2.8) as ax:
        style.lines(ax, table)
        ax.set(xlabel="words kept per token, K", ylabel="relative error of the gradient", xscale="log", yscale="log")
        style.plain_ticks(ax.xaxis, [*table.index])
        return style.legend(ax)


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


def captured_table(stream: Tensor, k: int, rows: int, decay: float) -> pd.DataFrame:
    """Share of each row's energy that k directions learned from the rows before it capture; `stream`: (N, d)."""
    past = (stream[:, :, None] * stream[:, None, :]).double().cumsum(0)
    top = torch.linalg.eigh(past).eigenvectors[:, :, -k:].mT.to(stream.dtype)

    def frequent(**options: float) -> Iterator[Tensor]:
        sketch = FrequentDirections(stream.shape[1], rows, **options)
        for row in stream:
            yield sketch.basis(k)
            sketch.insert(row[None])

    seen = range(len(stream))
    bases: dict[str, Iterable[Tensor]] = {  # of the first 0, 1, 2, … rows: orthonormal directions W
        # n rows have n directions at most
        "all rows kept: the k best of the past": (top[n - 1][-n:] if n else stream[:0] for n in seen),
        "Frequent Directions": frequent(),
        f"Frequent Directions, decay {decay:g}": frequent(decay=decay),
        "the first k rows, orthonormalised": (torch.linalg.qr(stream[: min(n, k)].T).Q.T for n in seen),
    }
    captured = {name: [float((W @ row).square().sum() / row.square().sum())
                       for W, row in zip(found, stream, strict=True)] for name, found in bases.items()}  # fmt: skip
    return pd.DataFrame(captured, pd.RangeIndex(1, len(stream) + 1, name="rows seen"))


@style.captioned
def captured_energy(table: pd.DataFrame, window: int) -> Figure:
    """Share of the next row's energy in the directions learned so far, a mean over rows.

    Args:
        table: `captured_table`.
    """
    smooth = table.rolling(window).mean().dropna()
    with style.panel(3.0) as ax:
        style.lines(ax, smooth, dict(zip(table, style.series(table.shape[1], first=0), strict=True)))
        ax.set(xlabel="rows seen", ylabel="share of the next row captured", ylim=(0, 1))
        ax.set_title(f"mean over {window} rows")
        return style.legend(ax)


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
    bounds = torch.stack([energy[k:].sum() / (rows - k) for k in range(rows)])
    own, kept, bounds = ((part / energy.sum()).numpy() for part in (energy, sketch.singular_values() ** 2, bounds))
    return Spectra(own, kept, float(torch.linalg.matrix_norm(A.T @ A - B.T @ B, ord=2) / energy.sum()), bounds)


@style.captioned
def spectrum(spectra: Spectra) -> Figure:
    """Left: energy by direction, of the stream and of the sketch. Right: the error and its bound for every k."""
    energies = {"stream": pd.Series(spectra.stream), "sketch": pd.Series(spectra.sketch)}
    table, rows = pd.DataFrame(energies).rename(index=lambda n: n + 1), len(spectra.sketch)
    with style.panel(3.0, 2) as (left, right):
        style.lines(left, table, dict(zip(table, style.series(2, first=0), strict=True)))
        left.set(xlabel="singular direction, largest first", ylabel="share of the energy", ylim=(0, None))
        left.legend()
        bounds = pd.DataFrame({"bound by k": spectra.bounds})
        style.lines(right, bounds, {"bound by k": style.Look("0.4", ".", style.DASHES[1])})
        right.axhline(spectra.error, color=style.COLORS[1], label="measured")
        right.set(xlabel="k", ylabel="error over ‖A‖²", ylim=(0, None), xticks=range(0, rows, max(1, rows // 5)))
        right.legend()
        return right.get_figure()
