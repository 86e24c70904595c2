"""Frequent Directions: B (ℓ × d) with 0 ⪯ AᵀA − BᵀB and ‖AᵀA − BᵀB‖₂ ≤ ‖A − A_k‖²_F/(ℓ − k) for every k < ℓ.

Liberty 2013; Ghashami, Liberty, Phillips and Woodruff 2016. A is everything inserted, a row a vector; A_k its best
approximation of rank k.
"""

import math
from typing import Any

import torch
from torch import Tensor

from lorakit.errors import CheckpointError, require, require_finite
from lorakit.modules import usable_device

TOLERANCE = 1e-12  # of the largest squared singular value: what is below is rounding


class FrequentDirections:
    """Rows gather in a buffer of 2ℓ; when it is full, σ_ℓ² is taken off every squared singular value.

    Each time ℓ directions lose σ_ℓ² together, hence the bound. The buffer is float64: it is small, and the Gram
    matrix that stands in for the SVD squares its condition number. With ℓ > d nothing is ever lost.

    Args:
        dim: d, length of a row.
        rows: ℓ, rows that are kept.
        decay: every insertion multiplies the energy (squared length) of older rows by this; 1 forgets nothing. The
            bound then holds for A decayed alike.
        device: where the buffer lives.

    Raises:
        ParameterError: `dim` or `rows` is below 1, or `decay` outside (0, 1].
    """

    def __init__(self, dim: int, rows: int, *, decay: float = 1.0, device: torch.device | str = "cpu"):
        require(dim >= 1, "dim", dim, "must be at least 1")
        require(rows >= 1, "rows", rows, "must be at least 1")
        require(0 < decay <= 1, "decay", decay, "must be above 0 and at most 1")
        self.dim, self.rows, self.decay = dim, rows, decay
        self._buffer = torch.zeros(2 * rows, dim, dtype=torch.float64, device=usable_device(device))
        self._filled, self._rotated = 0, True

    def insert(self, x: Tensor) -> None:
        """Add rows `x` (n, d) or one row (d,), in order.

        Raises:
            ParameterError: the last dimension is not d, or a value is not finite.
        """
        fits = 1 <= x.ndim <= 2 and x.shape[-1] == self.dim
        require(fits, "x", tuple(x.shape), f"must be ({self.dim},) or (n, {self.dim})")
        require_finite(bool(torch.isfinite(x).all()), "x", "non-finite values")
        x = x.detach().reshape(-1, self.dim).to(self._buffer)
        while len(x):
            if self._filled == len(self._buffer):
                self.rotate()
            block = x[: len(self._buffer) - self._filled]
            x = x[len(block) :]
            end = self._filled + len(block)
            self._buffer[self._filled : end] = block
            if self.decay < 1:  # a row is scaled once for each row after it
                age = torch.arange(end - 1, -1, -1, device=block.device, dtype=block.dtype)
                age[: self._filled] = len(block)  # what these had aged before is in them already
                self._buffer[:end] *= (math.sqrt(self.decay) ** age)[:, None]
            self._filled, self._rotated = end, False

    def rotate(self) -> None:
        """Make the rows orthogonal, longest first, and at most ℓ: above that many, shrink by σ_ℓ²."""
        if self._rotated:
            return
        rows = self._buffer[: self._filled]
        energy, directions = torch.linalg.eigh(rows @ rows.T)  # squared singular values, left singular vectors
        energy, directions = energy.clamp(min=0).flip(0), directions.flip(1)  # largest first
        left = energy - energy[self.rows - 1] if self._filled > self.rows else energy
        count = min(self.rows, int((left > TOLERANCE * energy[0]).sum()))
        self._buffer[:count] = (directions[:, :count] * (left[:count] / energy[:count]).sqrt()).T @ rows
        self._filled, self._rotated = count, True

    def matrix(self) -> Tensor:
        """B (ℓ, d) float64, after `rotate`; rows that are not needed are 0."""
        self.rotate()
        out = torch.zeros_like(self._buffer[: self.rows])
        out[: self._filled] = self._buffer[: self._filled]
        return out

    def singular_values(self) -> Tensor:
        """Of B, (ℓ,) float64, largest first."""
        return self.matrix().norm(dim=1)

    def basis(self, k: int) -> Tensor:
        """Top right singular vectors (k', d) float32, orthonormal; k' is k or the rank of B if that is less.

        Raises:
            ParameterError: `k` is below 1.
        """
        require(k >= 1, "k", k, "must be at least 1")
        self.rotate()
        # dividing by the length would do, but for a small σ next to a large one the Gram matrix left some of that
        return torch.linalg.qr(self._buffer[: min(k, self._filled)].T).Q.T.float()

    def state_dict(self) -> dict[str, Any]:
        rows = self._buffer[: self._filled].clone()
        return {"buffer": rows, "rotated": self._rotated, "rows": self.rows, "decay": self.decay}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become the sketch whose state this is, to the bit.

        Raises:
            CheckpointError: it is of another d, ℓ or decay.
        """
        own = (self.dim, self.rows, self.decay)
        if (found := (state["buffer"].shape[1], state["rows"], state["decay"])) != own:
            raise CheckpointError(f"sketch: saved with (dim, rows, decay) = {found}, this one has {own}")
        self._filled, self._rotated = len(state["buffer"]), state["rotated"]
        self._buffer[: self._filled] = state["buffer"]
