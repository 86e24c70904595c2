"""Sketches against what they stand for: an explicit CountSketch of the outer product, the SVD of the whole stream."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gate_streams import explicit_sketch

from lorakit.errors import CheckpointError, ParameterError
from lorakit.sketches import CountSketch, FrequentDirections, TensorSketch
from lorakit.sketches.tensor_sketch import PRIME

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def explicit(sketch: CountSketch) -> torch.Tensor:
    """The sketch as a matrix (m, d)."""
    matrix = torch.zeros(sketch.size, sketch.dim, dtype=torch.float64)
    matrix[sketch.buckets, torch.arange(sketch.dim)] = sketch.signs.double()
    return matrix


# CountSketch ----------------------------------------------------------------------------------------


def test_hashes_are_the_polynomials_in_exact_arithmetic():
    sketch, places = CountSketch(PRIME, 1000, generator=rng()), [0, 1, 262_143, PRIME - 1]
    buckets, signs = sketch.hashed(torch.tensor(places))
    (a, b) = sketch.state_dict()["coefficients"].tolist()
    for place, bucket, sign in zip(places, buckets.tolist(), signs.tolist(), strict=True):
        values = [sum(c * place ** (3 - power) for power, c in enumerate(of)) % PRIME for of in (a, b)]
        assert (bucket, sign) == (values[0] % 1000, 2 * (values[1] % 2) - 1)


def test_count_sketch_is_its_matrix_and_keeps_the_batch_shape():
    sketch, x = CountSketch(30, 7, generator=rng()), normal(2, 5, 30)
    torch.testing.assert_close(sketch(x), x @ explicit(sketch).T, **EXACT)
    assert sketch(x).dtype == torch.float64 and sketch(x.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(sketch(x.half()), sketch(x.half().float()), rtol=0, atol=0)


def test_sparse_count_sketch_is_the_dense_one_and_adds_repeated_indices():
    sketch, indices = CountSketch(30, 7, generator=rng()), torch.tensor([[3, 29, 3], [0, 1, 2]])
    values = normal(2, 3)
    dense = torch.zeros(2, 30, dtype=torch.float64).scatter_add_(1, indices, values)
    torch.testing.assert_close(sketch.sparse(indices, values), sketch(dense), **EXACT)


def test_buckets_and_signs_are_uniform_and_pairs_independent():
    sketches = [CountSketch(6, 4, generator=rng(seed)) for seed in range(3000)]
    buckets = torch.stack([sketch.buckets for sketch in sketches])
    signs = torch.stack([sketch.signs for sketch in sketches])
    counts = torch.stack([(buckets == bucket).float().mean(0) for bucket in range(4)])
    assert (counts - 0.25).abs().max() < 4.5 * math.sqrt(0.25 * 0.75 / 3000)
    products = torch.stack([signs[:, i] * signs[:, j] for i in range(6) for j in range(i)])
    four = (signs[:, 0] * signs[:, 1] * signs[:, 2] * signs[:, 3])[None]
    for mean in (signs.mean(0), products.mean(1), four.mean(1), (signs[:, 0] * (buckets[:, 0] - 1.5)).mean()):
        assert mean.abs().max() < 4.5 * 1.2 / math.sqrt(3000)
    collide = (buckets[:, 0] == buckets[:, 5]).float().mean()
    assert abs(collide - 0.25) < 4.5 * math.sqrt(0.25 * 0.75 / 3000)


def test_state_is_eight_integers_and_restores_the_sketch():
    sketch, other = (CountSketch(262_144, 64, generator=rng(seed)) for seed in (0, 1))
    other(torch.zeros(262_144))  # its own hashes are kept by now
    assert sketch.state_dict()["coefficients"].numel() == 8
    other.load_state_dict(sketch.state_dict())
    assert torch.equal(other.buckets, sketch.buckets) and torch.equal(other.signs, sketch.signs)
    with pytest.raises(CheckpointError, match="dim, size"):
        CountSketch(10, 64, generator=rng()).load_state_dict(sketch.state_dict())


@pytest.mark.parametrize(
    ("dim", "size", "name"), [(0, 4, "dim"), (PRIME + 1, 4, "dim"), (4, 1, "size"), (4, PRIME + 1, "size")]
)
def test_count_sketch_refuses(dim, size, name):
    with pytest.raises(ParameterError, match=f"^{name}="):
        CountSketch(dim, size, generator=rng())
    sketch = CountSketch(1, 2, generator=rng())
    for bad in (torch.ones(3, 5), torch.tensor(1.0)):
        with pytest.raises(ParameterError, match="last dimension must be 1"):
            sketch(bad)
    for indices, values in ((torch.zeros(2, 3), torch.ones(2, 2)), (torch.tensor(0), torch.tensor(1.0))):
        with pytest.raises(ParameterError, match="shaped as indices"):
            sketch.sparse(indices.long(), values)


# TensorSketch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 15, 16, 101])
def test_tensor_sketch_is_the_count_sketch_of_the_outer_product(size):
    sketch, x, y = TensorSketch(9, 12, size, generator=rng()), normal(3, 9), normal(3, 12, seed=1)
    expected = torch.stack([explicit_sketch(sketch, torch.outer(b, a)) for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(sketch(x, y), expected, **EXACT)


def test_sum_of_sketches_is_the_sketch_of_the_sum():
    sketch, x = TensorSketch(9, 40, 33, generator=rng()), normal(6, 9)
    indices = torch.stack([torch.randperm(40, generator=rng(row))[:5] for row in range(6)])
    values = normal(6, 5, seed=1)
    y = torch.zeros(6, 40, dtype=torch.float64).scatter_add_(1, indices, values)
    torch.testing.assert_close(sketch.sparse(x, indices, values), sketch(x, y), **EXACT)
    total = sketch.sum_sparse(x, indices, values)
    torch.testing.assert_close(total, sketch(x, y).sum(0), **EXACT)
    torch.testing.assert_close(total, explicit_sketch(sketch, y.T @ x), **EXACT)


def inner_products(size: int, seeds: int) -> tuple[torch.Tensor, float, float]:
    """⟨T(x, y), T(u, v)⟩ over seeds, its expectation, and the product of the four squared lengths."""
    x, u, y, v = normal(2, 8), normal(2, 8, seed=2), normal(2, 11, seed=3), normal(2, 11, seed=4)
    x, y, u, v = x[0], y[0], x[0] + 0.5 * u[0], y[0] + 0.5 * v[0]
    a, b = torch.stack([x, u]), torch.stack([y, v])
    found = []
    for seed in range(seeds):
        first, second = TensorSketch(8, 11, size, generator=rng(10_000 + seed))(a, b)
        found.append(first @ second)
    return torch.stack(found), float((x @ u) * (y @ v)), float((x @ x) * (y @ y) * (u @ u) * (v @ v))


def test_inner_products_are_unbiased_and_their_variance_falls_with_the_size_under_its_bound():
    seeds, scaled = 1500, []
    for size in (8, 32, 128):
        found, expected, energy = inner_products(size, seeds)
        z = (found.mean() - expected) / (found.std() / math.sqrt(seeds))
        assert abs(z) < 4, (size, z)
        assert found.var() <= (2 + 3**2) / size * energy
        scaled.append(float(found.var() * size))
    assert max(scaled) / min(scaled) < 1.5, scaled


def test_its_flops_by_hand():
    softmax, count_sketches, transforms, product = 4 * 10, 2 * 3 + 2 * 4, 2 * 2.5 * 16 * 4, 3 * 16
    sketch = TensorSketch(3, 10, 16, generator=torch.Generator().manual_seed(0))
    assert sketch.flops(4) == softmax + count_sketches + transforms + product


def test_scikit_learn_makes_the_same_vector_of_the_same_hashes():
    approximation = pytest.importorskip("sklearn.kernel_approximation")
    sketch, x = TensorSketch(9, 9, 16, generator=rng()), normal(4, 9)
    theirs = approximation.PolynomialCountSketch(degree=2, gamma=1.0, coef0=0, n_components=16).fit(x.numpy())
    theirs.indexHash_ = np.stack([sketch.x.buckets.numpy(), sketch.y.buckets.numpy()])
    theirs.bitHash_ = np.stack([sketch.x.signs.numpy(), sketch.y.signs.numpy()])
    np.testing.assert_allclose(sketch(x, x).numpy(), theirs.transform(x.numpy()), atol=1e-10)


def test_tensor_sketch_state_round_trips_and_seeds_decide():
    sketch, other = (TensorSketch(9, 12, 16, generator=rng(seed)) for seed in (0, 1))
    x, y = normal(9), normal(12)
    assert not torch.equal(other(x, y), sketch(x, y))
    other.load_state_dict(sketch.state_dict())
    assert torch.equal(other(x, y), sketch(x, y))
    one, two = (TensorSketch(9, 9, 16, generator=rng(5)) for _ in range(2))
    assert torch.equal(one.x.buckets, two.x.buckets) and not torch.equal(one.x.buckets, one.y.buckets)


# Frequent Directions --------------------------------------------------------------------------------


def low_rank_and_noise(rows: int = 300, dim: int = 24) -> torch.Tensor:
    strengths = torch.logspace(0.5, -1, 6, dtype=torch.float64)
    return normal(rows, 6) * strengths @ normal(6, dim, seed=1) + 0.1 * normal(rows, dim, seed=2)


def drifting(rows: int = 400, dim: int = 24, rank: int = 3) -> torch.Tensor:
    """Directions that turn over time into others, and some noise."""
    first, last = (torch.linalg.qr(normal(dim, rank, seed=seed)).Q.T for seed in (3, 4))
    share = torch.linspace(0, 1, rows, dtype=torch.float64)[:, None]
    return (1 - share) * (normal(rows, rank) @ first) + share * (normal(rows, rank) @ last) + 0.02 * normal(rows, dim)


def starving(rows: int = 400, dim: int = 24) -> torch.Tensor:
    """One direction comes back again and again, each time too weak for the ones kept: truncation never learns it."""
    stream = torch.zeros(rows, dim, dtype=torch.float64)
    stream[:8] = torch.eye(8, dim)
    stream[8::8, 20] = 0.9
    return stream


STREAMS = {"low_rank": low_rank_and_noise(), "drifting": drifting(), "starving": starving()}
STREAMS["isotropic"] = normal(200, 24)
each_stream = pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)


def assert_bound(A: torch.Tensor, B: torch.Tensor, rows: int) -> None:
    """0 ⪯ AᵀA − BᵀB, and its norm is under ‖A − A_k‖²_F / (ℓ − k) for every k < ℓ."""
    gap = torch.linalg.eigvalsh(A.T @ A - B.T @ B)
    slack = 1e-9 * float((A * A).sum())
    assert gap[0] > -slack
    energy = torch.linalg.svdvals(A) ** 2
    for k in range(rows):
        assert gap[-1] <= energy[k:].sum() / (rows - k) + slack, k


@each_stream
@pytest.mark.parametrize("rows", [1, 2, 8, 40])
def test_bound_holds_for_every_k(stream, rows):
    sketch = FrequentDirections(24, rows)
    sketch.insert(stream)
    assert sketch.matrix().shape == (rows, 24)
    assert_bound(stream, sketch.matrix(), rows)


@each_stream
def test_bound_holds_however_often_it_is_read(stream):
    sketch = FrequentDirections(24, 8)
    for place, row in enumerate(stream):
        sketch.insert(row)
        if place % 3 == 0:
            sketch.basis(4)
    assert_bound(stream, sketch.matrix(), 8)


def shrunk(A: torch.Tensor, rows: int) -> torch.Tensor:
    """The published algorithm, with a buffer of 2ℓ rows and a full SVD."""
    buffer = torch.zeros(0, A.shape[1], dtype=A.dtype)
    for row in A:
        if len(buffer) == 2 * rows:
            _, sigma, V = torch.linalg.svd(buffer, full_matrices=False)
            buffer = ((sigma**2 - sigma[rows - 1] ** 2).clamp(min=0).sqrt()[:, None] * V)[: rows - 1]
        buffer = torch.cat([buffer, row[None]])
    return buffer


@each_stream
def test_gram_matrix_is_as_good_as_the_svd(stream):
    sketch, before_rotation = FrequentDirections(24, 8), shrunk(stream, 8)
    sketch.insert(stream)
    buffer = sketch.state_dict()["buffer"]
    scale = float((stream * stream).sum())
    torch.testing.assert_close(buffer.T @ buffer, before_rotation.T @ before_rotation, rtol=0, atol=1e-10 * scale)


def test_nothing_is_lost_while_the_rank_is_below_the_rows():
    A = normal(100, 5) @ normal(5, 24, seed=1)
    sketch = FrequentDirections(24, 6)
    for row in A:
        sketch.insert(row)
    torch.testing.assert_close(sketch.matrix().T @ sketch.matrix(), A.T @ A, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(sketch.singular_values()[:5], torch.linalg.svdvals(A)[:5], rtol=1e-8, atol=0)
    assert sketch.singular_values()[5] == 0 and len(sketch.basis(6)) == 5


@each_stream
def test_basis_is_orthonormal_and_spans_the_top_singular_vectors(stream):
    sketch = FrequentDirections(24, 8)
    sketch.insert(stream)
    W = sketch.basis(4)
    assert W.dtype == torch.float32
    torch.testing.assert_close(W @ W.T, torch.eye(len(W)), rtol=0, atol=1e-6)
    V = torch.linalg.svd(sketch.matrix()).Vh[: len(W)].float()
    torch.testing.assert_close(W.T @ W, V.T @ V, rtol=0, atol=1e-5)


def test_basis_stays_orthonormal_when_singular_values_differ_by_many_powers_of_ten():
    sketch = FrequentDirections(24, 8)
    sketch.insert(torch.logspace(6, 0.5, 8, dtype=torch.float64)[:, None] * normal(8, 24))
    W = sketch.basis(8)
    assert len(W) == 8
    torch.testing.assert_close(W @ W.T, torch.eye(8), rtol=0, atol=1e-6)


def test_an_empty_sketch_has_an_empty_basis():
    sketch = FrequentDirections(24, 8)
    assert sketch.basis(3).shape == (0, 24) and sketch.matrix().abs().sum() == 0
    sketch.insert(torch.zeros(50, 24))
    assert sketch.basis(3).shape == (0, 24)
    sketch.insert(torch.eye(24)[5])
    assert sketch.basis(3).abs().tolist() == torch.eye(24)[5:6].tolist()
    assert sketch.basis(1).shape == (1, 24)


@pytest.mark.parametrize(("length", "rank"), [(1.2e-6, 2), (0.8e-6, 1)])
def test_a_direction_that_is_a_millionth_as_long_is_rounding(length, rank):
    sketch = FrequentDirections(24, 8)
    sketch.insert(torch.eye(24, dtype=torch.float64)[:2] * torch.tensor([[1.0], [length]]))
    assert len(sketch.basis(8)) == rank


def follows(sketch: FrequentDirections, stream: torch.Tensor, k: int = 3) -> float:
    """Share of each row's energy that the basis from the rows before it captures, late in the stream."""
    shares = []
    for place, row in enumerate(stream):
        if place >= len(stream) * 3 // 4:
            shares.append(float((sketch.basis(k).double() @ row).square().sum() / row.square().sum()))
        sketch.insert(row)
    return sum(shares) / len(shares)


def test_decay_follows_a_drifting_stream_better():
    without, with_decay = (follows(FrequentDirections(24, 8, decay=decay), drifting()) for decay in (1.0, 0.97))
    assert with_decay > without + 0.05, (with_decay, without)


def test_decay_is_of_energy_per_insertion_and_keeps_the_bound():
    stream = low_rank_and_noise(90)
    aged = stream * (0.9 ** (torch.arange(89, -1, -1, dtype=torch.float64) / 2))[:, None]
    for rows in (25, 8):  # the first loses nothing
        together, apart = (FrequentDirections(24, rows, decay=0.9) for _ in range(2))
        together.insert(stream)
        for row in stream:
            apart.insert(row)
        B = together.matrix()
        torch.testing.assert_close(apart.matrix().T @ apart.matrix(), B.T @ B, rtol=1e-9, atol=1e-9)
        assert_bound(aged, B, rows)
        if rows == 25:
            torch.testing.assert_close(B.T @ B, aged.T @ aged, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seen", [0, 5, 8, 21, 200])
def test_state_round_trips_to_the_bit(seen):
    sketch, other = (FrequentDirections(24, 8, decay=0.99) for _ in range(2))
    other.insert(normal(11, 24, seed=9))
    stream = low_rank_and_noise()
    sketch.insert(stream[:seen])
    state = sketch.state_dict()
    sketch.insert(stream[seen : seen + 50])  # the state is a copy: what comes after does not reach it
    other.load_state_dict(state)
    other.insert(stream[seen : seen + 50])
    assert torch.equal(sketch.matrix(), other.matrix()) and torch.equal(sketch.basis(4), other.basis(4))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [((0, 4), "dim"), ((4, 0), "rows"), ((4, 2, 0.0), "decay"), ((4, 2, 1.1), "decay"), ((4, 2, math.nan), "decay")],
)
def test_frequent_directions_refuses(arguments, name):
    dim, rows, *decay = arguments
    with pytest.raises(ParameterError, match=f"^{name}="):
        FrequentDirections(dim, rows, **({"decay": decay[0]} if decay else {}))
    assert FrequentDirections(1, 1).matrix().tolist() == [[0]]


def test_frequent_directions_refuses_rows_that_do_not_fit():
    sketch = FrequentDirections(4, 2)
    for bad in (torch.ones(5), torch.ones(2, 2, 4), torch.tensor(1.0)):
        with pytest.raises(ParameterError, match="must be \\(4,\\)"):
            sketch.insert(bad)
    with pytest.raises(ParameterError, match="finite"):
        sketch.insert(torch.tensor([1.0, math.nan, 0, 0]))
    with pytest.raises(ParameterError, match="^k="):
        sketch.basis(0)
    with pytest.raises(CheckpointError, match="rows, decay"):
        sketch.load_state_dict(FrequentDirections(4, 3).state_dict())
    assert sketch.singular_values().tolist() == [0, 0]
