"""One look a row, readable in grey and by every eye, the same on screen, in a notebook and on disk."""

from __future__ import annotations

import datetime
import io
import itertools
import pickle
import re
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from IPython.core.formatters import DisplayFormatter
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread
from synthetic_records import record

from lorakit import files
from lorakit.analysis import figures, names, style
from lorakit.errors import ParameterError


def runs():
    return [record(m, s, floor=0.3 + 0.05 * i) for i, m in enumerate(("full", "lora", "head")) for s in range(2)]


def test_looks_are_fixed_and_differ_in_marker_or_dash_for_grey_print():
    rows = [*style.PALETTE, *(f"method-{i}" for i in range(12))]
    found = style.looks(rows)
    assert [*found] == rows
    assert len({(look.marker, str(look.dash)) for look in found.values()}) == len(rows)
    assert len({look.color for look in style.PALETTE.values()}) == len(style.PALETTE)
    assert style.looks(["lora"])["lora"] == style.looks(["zeta", "lora", "full"])["lora"]
    assert style.looks(["zeta"])["zeta"] == style.looks(["zeta", "lora"])["zeta"]


def test_a_new_row_of_the_palette_changes_no_other_rows_look(monkeypatch):
    rows = [*style.PALETTE, *(f"method-{i}" for i in range(12))]
    before = style.looks(rows)
    new = {"brand-new": style.Look("#123456", "8", style.DASHES[3])}
    monkeypatch.setattr(style, "PALETTE", new | style.PALETTE)
    assert style.looks(rows) == before
    assert style.looks(["brand-new", "lora"]) == new | {"lora": before["lora"]}
    assert style.looks(["method-1", "brand-new"])["brand-new"] == new["brand-new"]


def test_every_known_row_has_a_look_and_a_label():
    assert {*names.LABELS} == {*style.PALETTE}
    assert len({names.label(row) for row in style.PALETTE}) == len(style.PALETTE)
    of_gates = {"baseline", "full_length", "same_flops", "random", "slora", "loss_floor", "gradient_norm"}
    of_gates |= {"novelty_loss", "least_novel", "random50", "slora50"}
    chosen = {f"{name}{mode}" for name in ("random20", "flora20", "flora40", "pps20") for mode in ("", "_gather")}
    assert of_gates | chosen | {"random_tokens", "targets_only"} <= {*style.PALETTE}


def luminance(color) -> float:
    """Relative luminance of WCAG 2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("colors", [[look.color for look in style.PALETTE.values()], style.COLORS, style.shades(5)])
def test_every_colour_stands_out_on_white(colors):
    assert min(1.05 / (luminance(color) + 0.05) for color in colors) >= 3


# Machado, Oliveira & Fernandes 2009, severity 1.0, on linear RGB.
BLINDNESS = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("kind", BLINDNESS)
def test_the_three_methods_of_every_setting_differ_for_all_kinds_of_colour_vision(kind):
    rows = ("full", "lora", "head")
    linear = np.array([to_rgb(style.PALETTE[name].color) for name in rows]) ** 2.2
    seen = np.clip(linear @ np.array(BLINDNESS[kind]).T, 0, 1) ** (1 / 2.2)
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 0.25


def test_memory_shades_are_told_apart_by_lightness_alone():
    lightness = [np.dot(shade[:3], [0.2126, 0.7152, 0.0722]) for shade in style.shades(5)]
    assert min(np.diff(lightness)) > 0.08


def test_the_readers_own_settings_are_left_alone_and_do_not_reach_the_figure():
    before = matplotlib.get_backend()
    with matplotlib.rc_context({"font.size": 3, "axes.facecolor": "red", "legend.fontsize": 3}):
        drawn = figures.loss_curve(runs())
        assert matplotlib.rcParams["font.size"] == 3
    assert drawn.axes[0].get_facecolor() == (1, 1, 1, 1)
    assert drawn._repr_png_() == figures.loss_curve(runs())._repr_png_()
    try:
        matplotlib.use("svg")
        figures.loss_curve(runs())
        assert matplotlib.get_backend() == "svg"
    finally:
        matplotlib.use(before)


# in a notebook and on disk


def shown_by(drawn, monkeypatch):
    """What a notebook is given to show, and what is said of it."""
    shown = []
    monkeypatch.setattr(
        "IPython.display.display", lambda data, metadata=None, raw=False: shown.append((data, metadata))
    )
    formatter = DisplayFormatter()
    formatter.ipython_display_formatter.enabled = True  # as in a kernel
    # what the inline backend does once pyplot is imported; its picture would have no alternative text
    formatter.formatters["image/png"].for_type(Figure, lambda figure: b"\x89PNG inline")
    assert formatter.format(drawn) == ({}, {})
    return shown


def test_a_notebook_shows_one_png_whether_or_not_pyplot_is_active(monkeypatch):
    drawn = figures.loss_curve(runs())
    (picture, _), _ = shown_by(drawn, monkeypatch)
    assert set(picture) == {"text/plain", "image/png"}
    assert imread(io.BytesIO(picture["image/png"])).shape[1] == 780
    assert repr(drawn) == repr(figures.loss_curve(runs()))
    assert repr(drawn).startswith("<Drawn size 780x")  # no address, which would differ


def test_who_does_not_see_a_figure_is_told_what_it_shows_and_its_caption_stands_under_it(monkeypatch):
    (_, said), (caption, _) = shown_by(figures.loss_curve(runs(), x="flops"), monkeypatch)
    alt = said["image/png"]["alt"]
    for part in ("validation loss (nats) against training compute (FLOPs)", *names.labels(runs()).values()):
        assert part in alt, alt
    assert caption["text/markdown"].startswith("*What was reached against what was spent: a line per row")
    (_, said), (caption, _) = shown_by(figures.overview(runs()), monkeypatch)
    assert "memory at the peak of a training step, predicted" in said["image/png"]["alt"]
    assert "\n" not in caption["text/plain"] and caption["text/plain"] in " ".join(figures.overview.__doc__.split())


def test_every_function_that_draws_for_a_notebook_has_a_caption():
    for path in sorted((files.PROJECT / "lorakit").glob("[as]*/*.py")):
        drawing = r"(?m)^(.*)\ndef ([a-z]\w*)\((?:[^()]|\([^()]*\))*\) -> Figure:"
        bare = [name for before, name in re.findall(drawing, path.read_text()) if before != "@style.captioned"]
        assert set(bare) <= {"figure", "legend"}, path


def test_what_draws_and_takes_long_to_load_is_loaded_when_drawing():
    code = (
        "import sys, lorakit; assert not {'matplotlib', 'seaborn', 'pandas', 'scipy', 'torch'} & {*sys.modules};"
        "from lorakit import figures, records; assert not {'matplotlib.pyplot', 'seaborn', 'torch'} & {*sys.modules};"
        "run = records.Record(setting='s', method='lora', seed=0, status='done');"
        "figures.overview([run])._repr_png_(); assert not {'torch'} & {*sys.modules};"
        "assert sys.modules['matplotlib.pyplot'].get_fignums() == []"
    )
    subprocess.run([sys.executable, "-W", "error:::lorakit", "-c", code], check=True)


def test_save_writes_whole_or_not_at_all(tmp_path, monkeypatch):
    drawn = figures.loss_curve(runs())
    target = style.save(drawn, tmp_path / "new" / "figure.png")
    before = target.read_bytes()
    assert before.startswith(b"\x89PNG")

    def stop(buffer, **options):
        buffer.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(drawn, "savefig", stop)
    with pytest.raises(KeyboardInterrupt):
        style.save(drawn, target)
    assert target.read_bytes() == before and list(target.parent.iterdir()) == [target]


def test_save_names_the_formats_it_knows(tmp_path):
    with pytest.raises(ParameterError, match="figure=.*must end in one of.*pdf.*png.*svg"):
        style.save(figures.loss_curve(runs()), tmp_path / "figure.docx")
    assert not list(tmp_path.iterdir())


def _panel(line=(0.848, 0.8, 0.7), units=1.0, dots=(1.0, 2.0), cells=((1, 2), (3, float("nan"))), said="3 seeds"):
    with style.panel(3, 3) as axes:
        axes[0].plot([1, 2, 3], [units * y for y in line])
        axes[0].fill_between([1, 2, 3], 0, [units * y for y in line])
        axes[1].scatter([0, 1], dots)
        axes[1].bar([0, 1], dots)
        axes[2].imshow(cells)
        axes[2].set_title(said, loc="left")
    return axes[0].figure


@pytest.mark.parametrize(
    "change",
    [
        {"line": (0.948, 0.8, 0.7)},
        {"line": (0.8, 0.848, 0.7)},
        {"units": 1000.0},
        {"dots": (1.0, 2.2)},
        {"cells": ((1, 2), (3, 1))},
        {"said": "2 seeds"},
    ],
    ids=str,
)
def test_a_figures_text_tells_what_is_drawn(change):
    assert repr(_panel(**change)) != repr(_panel())


def test_a_figures_text_holds_after_drawing_and_for_another_processors_last_bits(monkeypatch):
    figure = _panel()
    before = repr(figure)
    assert figure._repr_png_() and repr(figure) == before
    assert "nan" not in before
    assert repr(_panel(line=tuple(y * (1 + 1e-6) for y in (0.848, 0.8, 0.7)))) == before
    assert shown_by(figure, monkeypatch)[0][0]["text/plain"] == before


def test_a_figure_of_words_and_days_has_a_text_and_may_be_pickled():
    with style.panel(2, 2) as axes:
        axes[0].plot(["a", "b"], [1, 2])
        axes[1].plot([datetime.date(2026, 1, 1), datetime.date(2026, 1, 2)], [1, 2])
    again = pickle.loads(pickle.dumps(axes[0].figure))
    assert repr(again) == repr(axes[0].figure) and "4 numbers" in repr(again)
