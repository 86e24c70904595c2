"""Gradients in few numbers: CountSketch, TensorSketch, Frequent Directions, and the gradient of a linear head."""

from lorakit.sketches.frequent_directions import FrequentDirections
from lorakit.sketches.head_gradient import gradient_norms, predicted, sketch_batch, sparse_error
from lorakit.sketches.tensor_sketch import CountSketch, TensorSketch
