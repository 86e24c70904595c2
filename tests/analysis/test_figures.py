"""The numbers behind every figure, and that the figure shows them: whole, readable and outside pyplot."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pages import assert_readable
from synthetic_records import MIB, diverged, memory, record, search

from lorakit.analysis import curves, figures, stats
from lorakit.errors import ParameterError
from lorakit.records import Costs

LONG = "a method name that is much longer than any method name should be, of rank 64 and alpha 128 on all linear layers"
MANY = ["full", "lora", "head", "skip", "slora", "a-rather-long-method-name-rank-64", LONG]


def runs(methods=("full", "lora", "head"), seeds=4, **changes):
    return [record(m, s, floor=0.3 + 0.05 * i, **changes) for i, m in enumerate(methods) for s in range(seeds)]


def over(records, **axes):
    return curves.over_seeds(curves.curve_points(records, **axes))


def searches():
    return [search("lora", 1e-3), search("full", 1e-4), search("head", 1e-2)]


def costing(method: str, measured: int | None, seed: int = 0, **kinds: int):
    return record(method, seed, costs=Costs(predicted_memory=kinds or None, peak_memory_bytes=measured))


# the numbers


def test_curve_is_the_mean_and_range_over_seeds():
    curve = over(runs(["lora"], seeds=3))
    assert set(curve["seeds"]) == {3} and set(curve["row"]) == {"lora"}
    assert curve["x"].tolist() == [0, 10, 20, 30, 40, 50, 60]
    lowest = 0.3 + 0.3 * np.exp(-curve["x"] / 20)
    for name, above in (("low", 0), ("mean", 0.01), ("high", 0.02)):
        np.testing.assert_allclose(curve[name], lowest + above)


def test_seeds_with_other_x_are_interpolated_within_the_common_range():
    curve = over(runs(["lora"], seeds=2), x="tokens")
    first = np.array([500.0 * step for step in range(0, 61, 10)])
    second = np.array([503.0 * step for step in range(0, 61, 10)])
    assert set(curve["x"]) == {x for x in (*first, *second) if x <= first[-1]}
    losses = 0.3 + 0.3 * np.exp(-np.arange(0, 61, 10) / 20)
    expected = (np.interp(curve["x"], first, losses) + np.interp(curve["x"], second, losses + 0.01)) / 2
    np.testing.assert_allclose(curve["mean"], expected)


def test_runs_that_did_not_finish_stay_out_of_the_mean():
    records = [*runs(["lora"], seeds=2), diverged("lora", 2), record("lora", 3, status="interrupted", points=2)]
    curve, points = over(records), curves.curve_points(records)
    assert set(curve["seeds"]) == {2} and curve["high"].max() < 1
    rest = points[points["status"] != "done"].groupby(["seed", "status"])["y"]
    assert [*rest.groups] == [(2, "diverged"), (3, "interrupted")]
    assert rest.max().iloc[0] == 1e9 and rest.count().iloc[1] == 3


def test_train_loss_and_metrics_are_curves_too():
    (run,) = records = runs(["lora"], seeds=1)
    assert over(records, y="train loss")["mean"].tolist() == [point.train_loss for point in run.curve[1:]]
    for y in ("accuracy", "validation accuracy"):
        assert over(records, y=y)["mean"].tolist() == [point.validation["accuracy"] for point in run.curve]


def test_of_points_at_one_x_the_last_counts():
    (run,) = records = runs(["lora"], seeds=1)
    run.curve[3].accepted_steps = run.curve[2].accepted_steps
    points = curves.curve_points(records)
    assert points.loc[points["x"] == 20, "y"].tolist() == [run.curve[3].validation["loss"]]


def test_unknown_axes_are_errors():
    for draw, options, says in (
        (figures.loss_curve, {"x": "epochs"}, "x='epochs'.*accepted_steps"),
        (figures.loss_curve, {"y": "bleu"}, "y='bleu'.*train loss, validation accuracy, validation loss"),
        (figures.score_table, {"metric": "bleu"}, "metric='bleu'.*test accuracy"),
        (figures.learning_rate_search, {}, "records=.*lr_search"),
    ):
        with pytest.raises(ParameterError, match=says):
            draw(runs(), **options)


DRAWN = (figures.loss_curve, figures.memory_by_kind, figures.final_scores, figures.overview)


@pytest.mark.parametrize("figure", DRAWN)
def test_records_of_several_models_are_refused_or_the_title_says_so(figure):
    records = [record("lora", resolved={"model": "one"}), record("full", resolved={"model": "two"})]
    with pytest.raises(ParameterError, match="one.*two.*must be of one model"):
        figure(records)
    titles = [ax.get_title(loc="left") for ax in figure(records, mixed=True).axes]
    assert titles[0] == "made-up (not comparable: model differ)"


def test_a_run_leaves_where_it_crosses_the_top_edge():
    path = np.array([0.0, 10.0, 20.0]), np.array([1.0, 2.0, 100.0])
    assert curves.exit_point(*path, 1.5) == pytest.approx((5.0, 1.5))
    assert curves.exit_point(*path, 0.5) == (0.0, 0.5)
    assert curves.exit_point(*path, math.inf) == (20.0, 100.0)


def test_memory_is_the_largest_prediction_and_the_largest_measurement():
    records = [costing("lora", None, 0, parameters=5, peak=7), costing("lora", 11, 1, parameters=6, peak=9)]
    records += [costing("full", 13), record("head", costs=Costs())]
    found = {row: line.dropna().to_dict() for row, line in figures.memory_table(records).iterrows()}
    assert found == {"full": {"measured": 13}, "lora": {"parameters": 6, "peak": 9, "measured": 11}}


def test_search_is_the_mean_over_seeds_and_a_rate_fails_with_any_seed():
    one, two = search("lora", 1e-3, seed=0), search("lora", 1e-3, seed=1)
    two.search[3].status = "diverged"  # though its last validation loss was finite
    found = figures.search_table([one, two]).set_index("learning_rate")["loss"]
    assert found.dropna().to_dict() == pytest.approx({1e-5: 0.605, 1e-4: 0.455, 1e-3: 0.405})
    assert found[found.isna()].index.tolist() == [1e-2, 1e-1, 1.0]


def test_scores_are_final_values():
    table = figures.score_table([*runs(["full", "lora"], seeds=3), diverged("head")], "accuracy")
    assert [*dict.fromkeys(table["row"])] == ["full", "lora"]
    full = table[table["row"] == "full"].set_index("seed")["value"]
    assert full.to_dict() == pytest.approx({0: 0.87, 1: 0.86, 2: 0.85})


# the drawing shows the numbers


def test_lines_and_bands_are_the_table():
    records = runs()
    ax, table = figures.loss_curve(records).axes[0], over(records)
    for line, band, row in zip(ax.lines, ax.collections, ("full", "lora", "head"), strict=True):
        curve = table[table["row"] == row]
        np.testing.assert_array_equal(line.get_xydata(), curve[["x", "mean"]])
        edges = np.concatenate([curve[["x", edge]].to_numpy() for edge in ("low", "high")])
        assert {*map(tuple, edges)} == {*map(tuple, band.get_paths()[0].vertices)}
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
    edges = {bar.get_edgecolor()[:3] for container in ax.containers for bar in container}
    assert edges == {(1, 1, 1)}  # white lines between neighbours
    for place, method in enumerate(["full", "lora"]):
        assert [row[place] * MIB for row in widths] == pytest.approx([memory(method)[kind] for kind in kinds])


def test_a_measurement_is_never_drawn_as_a_prediction():
    sizes = {"lora": 1434.2, "full": 99.94, "head": 100.4}
    large = figures.memory_by_kind(
        [costing(m, None, parameters=round(n * MIB), peak=round(n * MIB)) for m, n in sizes.items()]
    )
    assert [text.get_text() for text in large.axes[0].texts] == ["99.9", "1,434", "100"]
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
    assert ax.get_ylim()[1] > 0.6  # at 1e-5, half as high again as the best
    far = search("lora")
    far.search[0].validation["loss"] = 40.0
    low, top = figures.learning_rate_search([far, search("full", 1e-4)]).axes[0].get_ylim()
    assert top == pytest.approx(1.5 * 0.4) and low < 0.4
    bad = search("lora")
    bad.search = bad.search[4:]  # all failed: there is no best
    assert not [line for line in figures.learning_rate_search([bad]).axes[0].lines if line.get_marker() == "*"]


def test_intervals_are_drawn_from_three_seeds_on():
    def bars(seeds):
        places = [line.get_xdata() for line in figures.final_scores(runs(seeds=seeds)).axes[0].lines]
        return [x for x in places if len(x) == 2 and np.isfinite(x).all()]

    assert len(bars(2)) == 0 and len(bars(3)) == 3
    found = stats.estimate([0.87, 0.86, 0.85])
    assert sorted(bars(3)[0]) == pytest.approx([found.low, found.high])


def test_points_are_the_seeds_and_the_mean():
    ax = figures.final_scores(runs(seeds=3)).axes[0]
    points = ax.collections[0].get_offsets()
    means = [line.get_xdata() for line in ax.lines if len(line.get_xdata()) == 1]
    assert sorted(points[:, 0]) == pytest.approx([0.85, 0.86, 0.87]) and len(ax.collections) == 3
    assert means[0] == pytest.approx([0.86])


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
    early = record(status="diverged", points=1)
    for point in early.curve:
        point.validation = {}
    yield "never evaluated", lambda: figures.loss_curve([early])
    yield "diverged only", lambda: figures.loss_curve([diverged()])
    yield "nothing", lambda: figures.overview([record(status="diverged", curve=[], costs=Costs())])


def test_a_panel_a_row_shows_it_beside_the_reference_on_one_scale():
    records = runs(("full", "lora", "head", "skip", "hira"), seeds=3)
    drawn = figures.loss_panels(records, "lora")
    shown = drawn.axes
    assert [ax.get_title("left") for ax in shown] == ["full fine-tuning", "head only", "HiRA", "SkipLoRA"]
    table = over(records)
    for ax, row in zip(shown, ("full", "head", "hira", "skip"), strict=True):
        expected = {name: table[table["row"] == name]["mean"].to_numpy() for name in (row, "lora")}
        found = [line.get_ydata() for line in ax.lines if len(line.get_ydata())]
        assert len(found) == 2 and all(any(np.allclose(y, e) for y in found) for e in expected.values())
        assert ax.get_ylim() == shown[0].get_ylim() and ax.get_ylim()[1] > table["high"].max()
    assert_readable(drawn)
    alone = figures.loss_panels(runs(["lora"]), "lora").axes[0]
    assert sum(len(line.get_ydata()) > 0 for line in alone.lines) == 1
    assert len(figures.loss_panels(records, "flora").axes) == 5  # nothing to be beside
    missing = [*runs(("lora", "full"), seeds=2), record("head", status="diverged", curve=[], costs=Costs())]
    kept = figures.loss_panels(missing, "full").axes
    assert all(len(ax.get_yticks()) > 2 for ax in kept)
    with pytest.raises(ParameterError, match="must be of one model"):
        figures.loss_panels([record(resolved={"model": "a"}), record(seed=1, resolved={"model": "b"})])


CASES = dict(cases())


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_clipped_overlaps_or_is_too_small(name):
    drawn = CASES[name]()
    assert_readable(drawn)
    assert all(ax.get_xlabel() for ax in drawn.axes)
