"""Gradients in few numbers: CountSketch, TensorSketch, Frequent Directions, and the gradient of a linear head."""

from lorakit.head import rows
from lorakit.sketches.frequent_directions import FrequentDirections
from lorakit.sketches.head_gradient import (
    error_norms,
    gradient_norms,
    group_maxima,
    predicted,
    sketch_batch,
    sparse_error,
    top_indices,
)
from lorakit.sketches.tensor_sketch import CountSketch, TensorSketch
