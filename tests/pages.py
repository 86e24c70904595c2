"""What the tests of figures share: a drawing's lines, and that nothing is clipped, overlaps or is too small."""

from __future__ import annotations

import itertools

import numpy as np

from lorakit.analysis import style


def lines(ax) -> dict[str, np.ndarray]:
    return {line.get_label(): line.get_xydata() for line in ax.lines}


def apart(labels) -> bool:
    boxes = [label.get_window_extent() for label in labels if label.get_text()]
    return not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def assert_readable(drawn) -> None:
    """Legends and axes are on the page and apart, and so are labels; text has 8 points."""
    drawn.canvas.draw()
    page, legends = drawn.bbox, [legend.get_window_extent() for legend in drawn.legends]
    axes = [ax.get_tightbbox() for ax in drawn.axes]
    for box in legends + axes:
        assert page.x0 - 1 <= box.x0 and box.x1 <= page.x1 + 1 and page.y0 - 1 <= box.y0 and box.y1 <= page.y1 + 1
    assert not any(legend.overlaps(box) for legend in legends for box in axes)
    for ax in drawn.axes:
        assert not ax.axison or apart(ax.get_yticklabels()) and apart(ax.get_xticklabels())
    sizes = [text.get_fontsize() for text in drawn.findobj(lambda item: hasattr(item, "get_fontsize"))]
    assert min(sizes) >= 8 and drawn.get_figwidth() == style.WIDTH
