"""CountSketch, and TensorSketch which is made of two.

C(x)_b = Σ_{i: h(i) = b} s(i)·x_i, R^d → R^m, linear, E⟨C(x), C(y)⟩ = ⟨x, y⟩ (Charikar et al. 2002).
T(x, y) = irfft(rfft(C₁x)·rfft(C₂y)): a CountSketch of vec(x ⊗ y) that is never formed (Pham and Pagh 2013).
"""

import math
from typing import Any

import torch
from torch import Generator, Tensor

from lorakit.errors import CheckpointError, require
from lorakit.modules import usable_device
from lorakit.seams import Stateful

PRIME = 2**31 - 1  # the product of two residues fits into int64
DEGREE = 3  # of both polynomials; degree 3 makes them 4-wise independent, which the bounds of the variance need


class CountSketch:
    """Hashes h: [d] → [m] and signs s: [d] → ±1 are polynomials over the field of `PRIME` elements.

    They are evaluated where they are needed, so the state is 8 integers for any d and the same on every device.

    Args:
        dim: d, length of what is sketched.
        size: m, length of the sketch.
        generator: draws the coefficients; on the CPU, so that a seed means the same sketch everywhere.
        device: where dense vectors to be sketched live.

    Raises:
        ParameterError: `dim` is below 1 or above `PRIME`, or `size` is below 2.
    """

    def __init__(self, dim: int, size: int, *, generator: Generator, device: torch.device | str = "cpu"):
        require(1 <= dim <= PRIME, "dim", dim, f"must be from 1 to {PRIME}")
        require(2 <= size <= PRIME, "size", size, f"must be from 2 to {PRIME}")
        self.dim, self.size, self.device = dim, size, usable_device(device)
        self._coefficients = torch.randint(PRIME, (2, DEGREE + 1), generator=generator).tolist()
        self._dense: tuple[Tensor, Tensor] | None = None

    def hashed(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Buckets (...) int64 in [0, m) and signs (...) float32 of `indices` (...), on their device."""
        values = []
        for highest, *others in self._coefficients:  # Σ c_j x^j mod `PRIME` by Horner's rule
            value = torch.full_like(indices, highest, dtype=torch.int64)
            for coefficient in others:
                value = value.mul_(indices).add_(coefficient).remainder_(PRIME)
            values.append(value)
        buckets, signs = values
        return buckets.remainder_(self.size), signs.bitwise_and_(1).mul_(2).sub_(1).float()

    @property
    def buckets(self) -> Tensor:
        """(d,) int64; made at the first dense sketch and kept."""
        return self._table()[0]

    @property
    def signs(self) -> Tensor:
        """(d,) float32; made at the first dense sketch and kept."""
        return self._table()[1]

    def _table(self) -> tuple[Tensor, Tensor]:
        if self._dense is None:
            self._dense = self.hashed(torch.arange(self.dim, device=self.device))
        return self._dense

    def __call__(self, x: Tensor) -> Tensor:
        """Sketch (..., m) of `x` (..., d): float64 if `x` is, else float32.

        Raises:
            ParameterError: the last dimension is not d.
        """
        require(x.ndim > 0 and x.shape[-1] == self.dim, "x", tuple(x.shape), f"the last dimension must be {self.dim}")
        signed = (as_float(x) * self.signs).reshape(-1, self.dim)
        out = signed.new_zeros(len(signed), self.size).scatter_add_(1, self.buckets.expand_as(signed), signed)
        return out.reshape(*x.shape[:-1], self.size)

    def sparse(self, indices: Tensor, values: Tensor) -> Tensor:
        """Sketch (..., m) of vectors with `values` (..., K) at `indices` (..., K); an index may occur repeatedly.

        Raises:
            ParameterError: the shapes differ.
        """
        same = indices.shape == values.shape and indices.ndim > 0
        require(same, "values", tuple(values.shape), f"must be shaped as indices, {tuple(indices.shape)}")
        values = as_float(values)
        buckets, signs = self.hashed(indices)
        return values.new_zeros(*indices.shape[:-1], self.size).scatter_add_(-1, buckets, values * signs)

    def state_dict(self) -> dict[str, Any]:
        return {"dim": self.dim, "size": self.size, "coefficients": torch.tensor(self._coefficients)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become the sketch whose state this is.

        Raises:
            CheckpointError: it is of another d or m.
        """
        if (found := (state["dim"], state["size"])) != (self.dim, self.size):
            raise CheckpointError(f"sketch: saved with (dim, size) = {found}, this one has {(self.dim, self.size)}")
        self._coefficients, self._dense = state["coefficients"].tolist(), None


def as_float(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 if it is that: halves would lose what a bucket sums up."""
    return x if x.dtype == torch.float64 else x.float()


class TensorSketch(Stateful):
    """It equals the CountSketch of vec(x ⊗ y) with hash (h₁(i) + h₂(j)) mod m and sign s₁(i)·s₂(j).

    Unbiased without a factor: E⟨T(x, y), T(u, v)⟩ = ⟨x, u⟩⟨y, v⟩, variance ≤ (2 + 3²)/m·‖x‖²‖y‖²‖u‖²‖v‖². The
    product of two discrete Fourier transforms of length m is the circular convolution of length m whatever m is, so
    any size works; the transform is fastest for powers of two.

    Args:
        dim_x, dim_y: lengths of x and y.
        size: m, length of the sketch.
        generator: draws both CountSketches.
        device: where x and y live.

    Raises:
        ParameterError: a length is below 1 or `size` below 2.
    """

    kept = ("x", "y")

    def __init__(self, dim_x: int, dim_y: int, size: int, *, generator: Generator, device: torch.device | str = "cpu"):
        self.x = CountSketch(dim_x, size, generator=generator, device=device)
        self.y = CountSketch(dim_y, size, generator=generator, device=device)
        self.size, self.device = size, self.x.device

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Sketch (..., m) of x (..., dim_x) ⊗ y (..., dim_y), row by row."""
        return torch.fft.irfft(torch.fft.rfft(self.x(x)) * torch.fft.rfft(self.y(y)), n=self.size)

    def sparse(self, x: Tensor, indices: Tensor, values: Tensor) -> Tensor:
        """Sketch (..., m) of x (..., dim_x) ⊗ y, y given by its `values` (..., K) at `indices` (..., K)."""
        return torch.fft.irfft(torch.fft.rfft(self.x(x)) * torch.fft.rfft(self.y.sparse(indices, values)), n=self.size)

    def sum_sparse(self, x: Tensor, indices: Tensor, values: Tensor) -> Tensor:
        """Σ_n T(x_n, y_n), (m,): `sparse` summed over rows x (N, dim_x) before the one inverse transform."""
        product = torch.fft.rfft(self.x(x)) * torch.fft.rfft(self.y.sparse(indices, values))
        return torch.fft.irfft(product.sum(0), n=self.size)

    def flops(self, kept: int) -> float:
        """Of one h ⊗ error: softmax (4 per logit), CountSketches, of `kept` entries of the error, FFTs, product."""
        return 4 * self.y.dim + 2 * (self.x.dim + kept) + self.size * (5 * math.log2(self.size) + 3)
