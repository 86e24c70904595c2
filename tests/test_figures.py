"""The numbers behind every figure, and that the figure shows them: whole, readable and outside pyplot."""

from __future__ import annotations

import io
import itertools
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from synthetic_records import MIB, diverged, memory, record, search

from lorakit import figures, style
from lorakit.errors import ParameterError
from lorakit.records import Costs

LONG = "a method name that is much longer than any method name should be, of rank 64 and alpha 128 on all linear layers"
MANY = ["full", "lora", "head", "skip", "slora", "a-rather-long-method-name-rank-64", LONG]


def runs(methods=("full", "lora", "head"), seeds=4, **changes):
    return [record(m, s, floor=0.3 + 0.05 * i, **changes) for i, m in enumerate(methods) for s in range(seeds)]


def searches():
    return [search("lora", 1e-3), search("full", 1e-4), search("head", 1e-2)]


def costing(method: str, measured: int | None, seed: int = 0, **kinds: int):
    return record(method, seed, costs=Costs(predicted_memory=kinds or None, peak_memory_bytes=measured))


# the numbers


def test_curve_is_the_mean_and_range_over_seeds():
    curve = figures.curve_table(runs(["lora"], seeds=3))["lora"]
    assert curve.seeds == (0, 1, 2)
    assert curve.x.tolist() == [0, 10, 20, 30, 40, 50, 60]
    lowest = 0.3 + 0.3 * np.exp(-curve.x / 20)
    np.testing.assert_allclose(curve.low, lowest)
    np.testing.assert_allclose(curve.mean, lowest + 0.01)
    np.testing.assert_allclose(curve.high, lowest + 0.02)


def test_seeds_with_other_x_are_interpolated_within_the_common_range():
    curve = figures.curve_table(runs(["lora"], seeds=2), x="tokens")["lora"]
    first = np.array([500.0 * step for step in range(0, 61, 10)])
    second = np.array([503.0 * step for step in range(0, 61, 10)])
    assert set(curve.x) == {x for x in (*first, *second) if x <= first[-1]}
    losses = 0.3 + 0.3 * np.exp(-np.arange(0, 61, 10) / 20)
    expected = (np.interp(curve.x, first, losses) + np.interp(curve.x, second, losses + 0.01)) / 2
    np.testing.assert_allclose(curve.mean, expected)


def test_runs_that_did_not_finish_stay_out_of_the_mean():
    records = [*runs(["lora"], seeds=2), diverged("lora", 2), record("lora", 3, status="interrupted", points=2)]
    curve = figures.curve_table(records)["lora"]
    assert curve.seeds == (0, 1) and curve.high.max() < 1
    assert [(path.seed, path.status) for path in curve.unfinished] == [(2, "diverged"), (3, "interrupted")]
    assert curve.unfinished[0].y.max() == 1e9 and len(curve.unfinished[1].x) == 3


def test_train_loss_and_metrics_are_curves_too():
    (run,) = records = runs(["lora"], seeds=1)
    train = figures.curve_table(records, y="train loss")["lora"]
    assert train.mean.tolist() == [point.train_loss for point in run.curve[1:]]
    for y in ("accuracy", "validation accuracy"):
        found = figures.curve_table(records, y=y)["lora"].mean
        assert found.tolist() == [point.validation["accuracy"] for point in run.curve]


def test_unknown_axes_are_errors():
    with pytest.raises(ParameterError, match="x='epochs'.*accepted_steps"):
        figures.loss_curve(runs(), x="epochs")
    with pytest.raises(ParameterError, match="y='bleu'.*train loss, validation accuracy, validation loss"):
        figures.loss_curve(runs(), y="bleu")
    with pytest.raises(ParameterError, match="metric='bleu'.*test accuracy"):
        figures.score_table(runs(), "bleu")
    with pytest.raises(ParameterError, match="records=.*lr_search"):
        figures.learning_rate_search(runs())


def test_a_run_leaves_where_it_crosses_the_top_edge():
    path = figures.Path(np.array([0.0, 10.0, 20.0]), np.array([1.0, 2.0, 100.0]), 0, "diverged")
    assert figures.exit_point(path, 1.5) == pytest.approx((5.0, 1.5))
    assert figures.exit_point(path, 0.5) == (0.0, 0.5)
    assert figures.exit_point(path, math.inf) == (20.0, 100.0)


def test_memory_is_the_largest_prediction_and_the_largest_measurement():
    records = [costing("lora", None, 0, parameters=5, peak=7), costing("lora", 11, 1, parameters=6, peak=9)]
    records += [costing("full", 13), record("head", costs=Costs())]
    assert figures.memory_table(records) == {
        "full": {"measured": 13},
        "lora": {"parameters": 6, "peak": 9, "measured": 11},
    }


def test_search_is_the_mean_over_seeds_and_a_rate_fails_with_any_seed():
    one, two = search("lora", 1e-3, seed=0), search("lora", 1e-3, seed=1)
    two.search[3].status = "diverged"  # though its last validation loss was finite
    found = figures.search_table([one, two])["lora"]
    assert found.rates.tolist() == [1e-5, 1e-4, 1e-3]
    assert found.losses == pytest.approx([0.605, 0.455, 0.405])
    assert found.failed == (1e-2, 1e-1, 1.0) and found.best == 1e-3


def test_a_search_in_which_all_failed_has_no_best():
    failed = search("lora")
    failed.search = failed.search[4:]
    assert figures.search_table([failed])["lora"].best is None
    figures.learning_rate_search([failed])._repr_png_()


def test_scores_are_final_values_and_their_estimate():
    table = figures.score_table([*runs(["full", "lora"], seeds=3), diverged("head")], "accuracy")
    assert list(table) == ["full", "lora"]
    seeds, mean = table["full"]
    assert seeds == pytest.approx({0: 0.87, 1: 0.86, 2: 0.85})
    assert (mean.mean, mean.count, mean.how) == (pytest.approx(0.86), 3, "t")


# the drawing shows the numbers


def test_lines_and_bands_are_the_table():
    records = runs()
    ax = figures.loss_curve(records).axes[0]
    for line, curve in zip(ax.lines, figures.curve_table(records).values(), strict=True):
        np.testing.assert_array_equal(line.get_ydata(), curve.mean)
    assert len(ax.collections) == 3
    assert len(figures.loss_curve(runs(seeds=1)).axes[0].collections) == 0  # one seed: no band


def test_a_diverged_run_does_not_flatten_the_others():
    drawn = figures.loss_curve([*runs(["full", "lora"], seeds=3), diverged("lora", 3)])
    low, high = drawn.axes[0].get_ylim()
    assert low > 0.2 and high < 0.8
    crosses = [line for line in drawn.axes[0].lines if line.get_marker() == "x"]
    assert len(crosses) == 1 and crosses[0].get_ydata() == pytest.approx([high])


def test_bars_are_the_table():
    ax = figures.memory_by_kind(runs(["full", "lora"], seeds=1)).axes[0]
    widths = [[bar.get_width() for bar in container] for container in ax.containers]
    kinds = [container.get_label() for container in ax.containers]
    assert kinds == ["parameters", "gradients", "optimizer", "activations", "logits"]
    for place, method in enumerate(["full", "lora"]):
        assert [row[place] * MIB for row in widths] == pytest.approx([memory(method)[kind] for kind in kinds])


def test_a_measurement_is_never_drawn_as_a_prediction():
    without = figures.memory_by_kind(runs()).axes[0]
    assert not without.lines and "predicted" in without.get_xlabel()
    measured = figures.memory_by_kind([costing("lora", 9 * MIB, parameters=5 * MIB, peak=5 * MIB)]).axes[0]
    (diamonds,) = measured.lines
    assert diamonds.get_label() == "measured (CUDA)" and diamonds.get_xdata() == [9.0]


def test_the_star_is_at_the_best_rate_and_failures_at_the_top():
    ax = figures.learning_rate_search([search("lora", 1e-3)]).axes[0]
    (star,) = [line for line in ax.lines if line.get_marker() == "*"]
    (failed,) = [line for line in ax.lines if line.get_marker() == "x"]
    assert star.get_xdata() == [1e-3] and star.get_ydata() == pytest.approx([0.4])
    assert list(failed.get_xdata()) == [0.1, 1.0] and list(failed.get_ydata()) == [1.0, 1.0]
    assert ax.get_xscale() == "log"


def test_intervals_are_drawn_from_three_seeds_on():
    def bars(seeds):
        return [line for line in figures.final_scores(runs(seeds=seeds)).axes[0].lines if line.get_marker() == "|"]

    assert len(bars(2)) == 0 and len(bars(3)) == 3


# whole and readable


def cases():
    for methods, seeds in ((["lora"], 1), (["full", "lora", "head"], 4), (MANY, 4)):
        yield f"curve {len(methods)}x{seeds}", lambda m=methods, s=seeds: figures.loss_curve(runs(m, s), x="flops")
        yield f"memory {len(methods)}", lambda m=methods: figures.memory_by_kind(runs(m, 1))
        yield f"scores {len(methods)}x{seeds}", lambda m=methods, s=seeds: figures.final_scores(runs(m, s))
        yield f"overview {len(methods)}x{seeds}", lambda m=methods, s=seeds: figures.overview(runs(m, s))
    yield "curve 7x1", lambda: figures.loss_curve(runs(MANY, 1))
    yield "scores 3x1", lambda: figures.final_scores(runs(seeds=1))
    measured = {"parameters": 5 * MIB, "peak": 5 * MIB}
    yield "measured", lambda: figures.memory_by_kind([costing(m, 6 * MIB, **measured) for m in ("full", "lora")])
    yield "search", lambda: figures.learning_rate_search(searches())
    yield "tiny", lambda: figures.loss_curve(runs(scale=1e-9), x="seconds")
    yield "large", lambda: figures.loss_curve(runs(scale=1e9), x="tokens", y="train loss")
    yield "diverged only", lambda: figures.loss_curve([diverged()])
    yield "nothing", lambda: figures.overview([record(status="diverged", curve=[], costs=Costs())])


CASES = dict(cases())


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_clipped_overlaps_or_is_too_small(name):
    drawn = CASES[name]()
    drawn.draw_without_rendering()
    page = drawn.bbox
    for legend in drawn.legends:
        box = legend.get_window_extent()
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
        assert not any(box.overlaps(ax.get_tightbbox()) for ax in drawn.axes)
    for ax in drawn.axes:
        box = ax.get_tightbbox()
        assert page.x0 - 1 <= box.x0 and box.x1 <= page.x1 + 1 and page.y0 - 1 <= box.y0 and box.y1 <= page.y1 + 1
        rows = [label.get_window_extent() for label in ax.get_yticklabels() if label.get_text()]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(rows, 2))
        assert ax.get_xlabel()
    sizes = [text.get_fontsize() for text in drawn.findobj(lambda item: hasattr(item, "get_fontsize"))]
    assert min(sizes) >= 8 and drawn.get_figwidth() == style.WIDTH


# style


def test_looks_are_fixed_and_differ_in_marker_or_dash_for_grey_print():
    names = [*style.METHODS, *(f"method-{i}" for i in range(12))]
    found = style.looks(names)
    assert len({(look.marker, str(look.dash)) for look in found.values()}) == len(names)
    assert len({look.color for look in style.METHODS.values()}) == len(style.METHODS)
    assert style.looks(["lora"])["lora"] == style.looks(["zeta", "lora", "full"])["lora"]
    assert style.looks(["zeta"])["zeta"] == style.looks(["zeta", "lora"])["zeta"]


# Machado, Oliveira & Fernandes 2009, severity 1.0, on linear RGB.
BLINDNESS = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("kind", BLINDNESS)
def test_the_three_methods_of_every_setting_differ_for_all_kinds_of_colour_vision(kind):
    from matplotlib.colors import to_rgb

    names = ("full", "lora", "head")
    linear = np.array([to_rgb(style.METHODS[name].color) for name in names]) ** 2.2
    seen = np.clip(linear @ np.array(BLINDNESS[kind]).T, 0, 1) ** (1 / 2.2)
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 0.25


def test_memory_shades_are_told_apart_by_lightness_alone():
    lightness = [np.dot(shade[:3], [0.2126, 0.7152, 0.0722]) for shade in style.shades(5)]
    assert min(np.diff(lightness)) > 0.08


def test_the_readers_own_settings_are_left_alone_and_do_not_reach_the_figure():
    import matplotlib

    with matplotlib.rc_context({"font.size": 3, "axes.facecolor": "red", "legend.fontsize": 3}):
        drawn = figures.loss_curve(runs())
        assert matplotlib.rcParams["font.size"] == 3
    assert drawn.axes[0].get_facecolor() == (1, 1, 1, 1)
    assert drawn._repr_png_() == figures.loss_curve(runs())._repr_png_()


def test_the_readers_backend_is_left_alone():
    import matplotlib

    before = matplotlib.get_backend()
    try:
        matplotlib.use("svg")
        figures.loss_curve(runs())
        assert matplotlib.get_backend() == "svg"
    finally:
        matplotlib.use(before)


# in a notebook and on disk


def test_a_notebook_shows_one_png_whether_or_not_pyplot_is_active():
    from IPython.core.formatters import DisplayFormatter
    from matplotlib.figure import Figure

    drawn = figures.loss_curve(runs())
    shown, _ = DisplayFormatter().format(drawn)
    assert set(shown) == {"text/plain", "image/png"}
    assert shown["image/png"].startswith(b"\x89PNG")
    inline = DisplayFormatter()  # what the inline backend does once pyplot is imported
    inline.formatters["image/png"].for_type(Figure, lambda figure: b"\x89PNG inline")
    assert inline.format(drawn)[0]["image/png"] == b"\x89PNG inline"


def test_the_text_beside_the_png_is_the_same_every_time():
    assert repr(figures.loss_curve(runs())) == repr(figures.loss_curve(runs()))
    assert repr(figures.loss_curve(runs())).startswith("<Figure size 780x")  # no address, which would differ


def test_pyplot_is_never_loaded_and_matplotlib_only_when_drawing():
    code = (
        "import sys; from lorakit import figures, records; assert 'matplotlib' not in sys.modules;"
        "run = records.Record(setting='s', method='lora', seed=0, status='done');"
        "figures.overview([run])._repr_png_(); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error:::lorakit", "-c", code], check=True)


def test_the_png_is_780_pixels_wide():
    from matplotlib.image import imread

    assert imread(io.BytesIO(figures.loss_curve(runs())._repr_png_())).shape[1] == 780


def test_save_writes_whole_or_not_at_all(tmp_path, monkeypatch):
    drawn = figures.loss_curve(runs())
    target = style.save(drawn, tmp_path / "new" / "figure.png")
    before = target.read_bytes()
    assert before.startswith(b"\x89PNG")

    def stop(path, **options):
        pathlib.Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(drawn, "savefig", stop)
    with pytest.raises(KeyboardInterrupt):
        style.save(drawn, target)
    assert target.read_bytes() == before and list(target.parent.iterdir()) == [target]


def test_save_names_the_formats_it_knows(tmp_path):
    with pytest.raises(ParameterError, match="figure=.*must end in one of.*pdf.*png.*svg"):
        style.save(figures.loss_curve(runs()), tmp_path / "figure.docx")
    assert not list(tmp_path.iterdir())
