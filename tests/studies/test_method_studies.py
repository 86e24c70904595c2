"""What the notebook of one method asks: the figures show the numbers of the record, and say when it has none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from synthetic_records import record

from lorakit.errors import ParameterError
from lorakit.studies import methods

HISTORY = [[0, 0.0, 0.0], [10, 0.25, 0.2], [20, 0.5, 0.5]]
SPARSITY = {"history": HISTORY, "zeros": {"A": 0.5, "B": 0.5, "BA": 0.1, "merged": 0.0}}
SPARSITY["bytes"] = {"dense": 400, "packed": 212, "compacted": 200}
SKIP = {"adapters": ["layer.0.q", "layer.0.k", "layer.1.q", "layer.1.k"], "blocks": [0, 0, 1, 1], "share_skipped": 0.4}
SKIP["history"] = {"step": [5, 10], "active": [[1.0, 1.0, 1.0, 1.0], [0.0, 0.5, 1.0, 1.0]]}
SKIP["history"]["metric"] = [[], [0.1, 0.2, 0.3, 0.4]]  # nothing was measured before the first point


def images(figure):
    meshes = [ax.collections[0].get_array() for ax in figure.axes[:2]]
    return [np.ma.filled(mesh.astype(float), np.nan).reshape(4, 2) for mesh in meshes]


def test_zeros_over_time_draws_what_was_reached_and_what_was_asked_for():
    figure = methods.zeros_over_time([record("sparse", 0, details={"sparsity": SPARSITY})])
    reached, asked = (line.get_xydata().tolist() for line in figure.axes[0].lines)
    assert reached == [[0, 0], [10, 0.2], [20, 0.5]] and asked == [[0, 0], [10, 0.25], [20, 0.5]]
    free = SPARSITY | {"history": [[step, None, value] for step, _, value in HISTORY]}
    figure = methods.zeros_over_time([record("sparse", 0, details={"sparsity": free})])
    assert len(figure.axes[0].lines) == 1

    figure = methods.zeros_over_time([record("sparse", seed, details={"sparsity": SPARSITY}) for seed in (0, 1)])
    assert figure.axes[0].get_legend_handles_labels()[1] == ["Sparse LoRA, seed 0", "Sparse LoRA, seed 1"]


def test_zeros():
    table = methods.zeros(record("sparse", 0, details={"sparsity": SPARSITY}))
    assert table == SPARSITY["zeros"] | {"packed / dense bytes": 0.53, "compacted / dense bytes": 0.5}


def test_spectrum_is_of_the_matrix_and_falls_at_its_rank():
    low = torch.randn(20, 3) @ torch.randn(3, 12)
    figure = methods.spectrum({"lora": low, "hira": torch.randn(20, 12)}, rank=3)
    first, second = (line.get_ydata() for line in figure.axes[0].lines[:2])
    expected = np.linalg.svd(low.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(first[:3], expected[:3] / expected[0])
    assert len(first) == 12 and first[3] < 1e-5 and second.min() > 1e-3


def test_weight_bytes_are_bits_over_all_parameters():
    kinds = (("linear, 4-bit", 52), ("heads", 400))
    rows = [{"kind": kind, "parameters": 100, "bytes": size} for kind, size in kinds]
    figure = methods.weight_bytes({"one": {"rows": rows}, "two": {"rows": rows[1:]}})
    widths = [bar.get_width() for container in figure.axes[0].containers for bar in container]
    assert widths == pytest.approx([52 * 8 / 200, 0, 400 * 8 / 200, 32])


def test_codebook_has_a_line_per_code():
    figure = methods.codebook(torch.linspace(-1, 1, 50), [-1.0, 0.0, 0.5, 1.0])
    assert [line.get_xdata()[0] for line in figure.axes[0].lines] == [-1.0, 0.0, 0.5, 1.0]


def test_skip_map_shows_metric_and_activity_with_adapters_from_below():
    figure = methods.skip_map(record("skip", 0, details={"skip": SKIP}))
    metric, active = images(figure)
    assert np.isnan(metric[:, 0]).all() and metric[:, 1].tolist() == [0.1, 0.2, 0.3, 0.4]
    assert active.T.tolist() == SKIP["history"]["active"]
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["0", "1"]


@pytest.mark.parametrize("figure", [methods.skip_map, lambda r: methods.zeros_over_time([r])])
def test_a_record_without_the_method_is_an_error(figure):
    with pytest.raises(ParameterError, match="has no 'sk|has no 'sp"):
        figure(record("lora", 0))
