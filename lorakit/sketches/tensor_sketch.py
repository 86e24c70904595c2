"""TensorSketch: T(x, y) = irfft(rfft(C₁x)·rfft(C₂y)), a CountSketch of vec(x ⊗ y) never formed (Pham and Pagh 2013)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from lorakit.sketches.count_sketch import CountSketch, as_float


class TensorSketch:
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

    def __init__(self, dim_x: int, dim_y: int, size: int, *, generator: Generator, device: torch.device | str = "cpu"):
        self.x = CountSketch(dim_x, size, generator=generator, device=device)
        self.y = CountSketch(dim_y, size, generator=generator, device=device)
        self.size, self.device = size, self.x.device

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Sketch (..., m) of x (..., dim_x) ⊗ y (..., dim_y), row by row."""
        return self._convolved(self.x(x), self.y(y))

    def sparse(self, x: Tensor, indices: Tensor, values: Tensor) -> Tensor:
        """Sketch (..., m) of x (..., dim_x) ⊗ y, y given by its `values` (..., K) at `indices` (..., K)."""
        return self._convolved(self.x(x), self.y.sparse(indices, values))

    def sum_sparse(self, x: Tensor, indices: Tensor, values: Tensor) -> Tensor:
        """Σ_n T(x_n, y_n), (m,): `sparse` summed over rows x (N, dim_x) before the one inverse transform."""
        product = torch.fft.rfft(self.x(x)) * torch.fft.rfft(self.y.sparse(indices, values))
        return torch.fft.irfft(product.sum(0), n=self.size)

    def _convolved(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(as_float(a)) * torch.fft.rfft(as_float(b)), n=self.size)

    def state_dict(self) -> dict[str, Any]:
        return {"x": self.x.state_dict(), "y": self.y.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become the sketch whose state this is.

        Raises:
            CheckpointError: it is of other lengths.
        """
        self.x.load_state_dict(state["x"])
        self.y.load_state_dict(state["y"])
