"""The pictures of what flows where: every method has one, and nothing in it lies on anything else."""

from __future__ import annotations

from itertools import combinations

import pytest

from lorakit.analysis.dataflow import FILLS, FLOWS, WAYS, dataflow
from lorakit.analysis.names import LABELS
from lorakit.errors import ParameterError

each = pytest.mark.parametrize("method", FLOWS)


@each
def test_arrows_join_boxes_and_a_method_is_called_as_in_tables(method):
    flow = FLOWS[method]
    assert flow["says"].startswith(LABELS[method]) and flow["forward"]
    assert {kind for *_, kind, _ in flow["boxes"].values()} <= FILLS.keys()
    for pair in (pair for way in WAYS for pair in flow[way]):
        assert {*pair.split(" ")} <= flow["boxes"].keys()


@each
def test_no_box_lies_on_another_and_every_text_in_its_own(method):
    drawn = dataflow(method)
    renderer = drawn.canvas.get_renderer()
    drawn.canvas.draw()
    (ax,) = drawn.axes
    count = len(FLOWS[method]["boxes"])
    boxes = [patch.get_window_extent(renderer) for patch in ax.patches[:count]]
    for one, other in combinations(boxes, 2):
        assert not one.overlaps(other)
    for box, text in zip(boxes, ax.texts, strict=True):
        inner = text.get_window_extent(renderer)
        assert box.x0 < inner.x0 and inner.x1 < box.x1 and box.y0 < inner.y0 and inner.y1 < box.y1, text.get_text()
        assert drawn.bbox.x0 < box.x0 and box.x1 < drawn.bbox.x1
    arrows = ax.patches[count:]
    assert len(arrows) == sum(len(FLOWS[method][way]) for way in WAYS)
    assert ax.get_title("left").replace("\n", " ") == FLOWS[method]["says"]


def test_a_method_without_a_picture_is_refused():
    with pytest.raises(ParameterError, match="method='dora': must be one of lora, sparse, hira, qlora, skip, slora"):
        dataflow("dora")
