"""The gates' figures show the numbers of the records: rates, novelty, compute, and what novelty is worth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pages import apart, assert_readable
from synthetic_records import gated, record

from lorakit.analysis import curves, gate_figures
from lorakit.errors import ParameterError

ROWS = {
    "baseline": (1, 120), "full_length": (1, 353), "same_flops": (1, 224), "random": (0.3, 120), "slora": (0.3, 120),
    "loss_floor": (0.3, 120), "gradient_norm": (0.3, 120), "novelty_loss": (0.3, 120), "least_novel": (0.3, 120),
    "random50": (0.5, 200), "slora50": (0.5, 200),
}  # fmt: skip


def runs(*rows: str, seeds: int = 3):
    return [gated(r, s, rate=ROWS[r][0], accepted=ROWS[r][1]) for r in rows or ROWS for s in range(seeds)]


def logging(method: str, seed: int, key: str, points: dict[int, float | None], **changes):
    run = gated(method, seed, **changes)
    run.details["gate"]["log"] = [{"step": step, key: value} for step, value in points.items()]
    return run


def redundant(share: float, gaps: list[float], **changes):
    pairs = [("slora", 0.4 + gap, s) for s, gap in enumerate(gaps)] + [("random", 0.4, s) for s in range(len(gaps))]
    return [gated(m, s, floor=f, redundancy=share, setting=f"at {share}", **changes) for m, f, s in pairs]


def texts(ax):
    return [text.get_text() for text in ax.texts]


def bars(ax):
    """Intervals: lines up at one x."""
    lines = [line.get_xydata() for line in ax.lines]
    return [line for line in lines if len(line) == 2 and line[0, 0] == line[1, 0] and np.isfinite(line).all()]


# over candidate steps


def test_a_log_becomes_its_mean_and_range_over_the_seeds_that_finished():
    records = [
        logging("slora", 0, "gate/novelty", {10: 0.8, 20: 0.6}),
        logging("slora", 1, "gate/novelty", {10: 0.6, 20: 0.2}),
        logging("slora", 2, "gate/novelty", {10: 0.9}, status="diverged"),
        *runs("baseline"),
    ]
    points = gate_figures.log_points(records, "gate/novelty")
    assert set(points["row"]) == {"slora"} and set(points["status"]) == {"done", "diverged"}
    curve = curves.over_seeds(points)
    assert [curve[name].tolist() for name in ("x", "low", "high")] == [[10, 20], [0.6, 0.2], [0.8, 0.6]]
    assert curve["mean"].tolist() == pytest.approx([0.7, 0.4])
    line = gate_figures.novelty(records).axes[0].lines[0]
    assert line.get_xydata() == pytest.approx(np.array([[10, 0.7], [20, 0.4]]))


def test_rates_of_the_burn_in_and_of_few_decisions_are_left_out():
    key = "gate/acceptance_rate"
    run = logging("slora", 0, key, {20: 1.0, 29: 0.9, 30: 0.5, 40: None, 50: 0.3}, burn_in=20)
    assert gate_figures.log_points([run], key, after_burn_in=True)["x"].tolist() == [30, 50]
    assert gate_figures.log_points([run], key)["x"].tolist() == [20, 29, 30, 50]


def test_acceptance_is_drawn_against_every_target():
    ax = gate_figures.acceptance(runs("baseline", "random", "slora", "random50")).axes[0]
    assert texts(ax) == ["target 30 %", "target 50 %"]
    flat = [line.get_ydata()[0] for line in ax.lines if len(set(line.get_ydata())) == 1]
    assert flat == [0.3, 0.5] and len(ax.lines) == 5
    low, high = ax.get_ylim()
    assert 0 <= low < 0.3 and high > 0.5


def test_only_gates_that_score_novelty_are_in_its_figure():
    ax = gate_figures.novelty(runs("slora", "loss_floor", "gradient_norm", "least_novel", "random")).axes[0]
    labels = ax.get_legend_handles_labels()[1]
    assert labels == ["SLoRA (3 seeds)", "least novel (3 seeds)"]
    assert ax.lines[-1].get_ydata()[0] == 1 - 64 / 512 and texts(ax) == ["1 − k/m:\nunrelated\nbatches"]


@pytest.mark.parametrize("figure", [gate_figures.acceptance, gate_figures.novelty])
def test_records_without_a_gate_are_an_error(figure):
    with pytest.raises(ParameterError, match=r"records=\['lora'\]: none of them has a gate"):
        figure([record("lora")])


# what it cost


def test_the_ledger_is_the_mean_over_finished_runs():
    slora = runs("slora", seeds=2)
    slora[0].costs.flops_gate, slora[1].costs.flops_gate = 1e9, 3e9
    slora.append(gated("slora", 2, status="diverged", accepted=60))
    table = gate_figures.ledger_table([*slora, *runs("baseline")])
    expected = {"forward": 3.53e12, "backward": 1.2e12, "gate": 2e9, "accepted": 120 / 353}
    assert table.loc["slora"].to_dict() == expected
    assert table.loc["baseline"].to_dict() == {"forward": 1.2e12, "backward": 1.2e12, "gate": 0, "accepted": 1}


def test_bars_are_the_ledger():
    records = runs("baseline", "slora")
    ax = gate_figures.ledger(records).axes[0]
    widths = [[bar.get_width() for bar in container] for container in ax.containers]
    np.testing.assert_allclose(widths, [[1.2, 3.53], [1.2, 1.2], [0, 0]])
    assert [container.get_label() for container in ax.containers] == ["forward", "backward", "gate"]
    assert texts(ax) == ["2.4, 100 % accepted", "4.73, 34 % accepted"]
    with pytest.raises(ParameterError, match="needs a finished run"):
        gate_figures.ledger([gated(status="diverged")])


# when it pays


def test_the_gain_is_novelty_minus_random_share_by_share():
    records = redundant(0.8, [-0.03, -0.02, -0.01]) + redundant(0.0, [0.01, -0.01, 0.0])
    table = gate_figures.redundancy_table(records)
    assert list(table) == [0.0, 0.8]
    gap = table[0.8]
    assert gap.differences == pytest.approx((-0.03, -0.02, -0.01)) and gap.verdict == "within noise"
    half = 4.302653 * 0.01 / math.sqrt(3)
    assert (gap.estimate.low, gap.estimate.high) == pytest.approx((-0.02 - half, -0.02 + half))
    ax = gate_figures.gain_by_redundancy(records).axes[0]
    assert bars(ax)[1] == pytest.approx(np.array([[0.8, -0.02 - half], [0.8, -0.02 + half]]))
    assert ax.collections[1].get_offsets()[:, 1].tolist() == pytest.approx([-0.03, -0.02, -0.01])
    assert ax.lines[-1].get_xydata() == pytest.approx(np.array([[0, 0], [0.8, -0.02]]))

    records = redundant(0.5, [-0.02, -0.01]) + [gated("slora", 0, redundancy=0.9, setting="at 0.9")]
    assert list(gate_figures.redundancy_table(records)) == [0.5]
    assert not bars(gate_figures.gain_by_redundancy(records).axes[0])


def test_other_rows_can_be_compared_and_missing_ones_are_an_error():
    records = redundant(0.5, [-0.02] * 3)
    assert gate_figures.redundancy_table(records, "random", "slora")[0.5].differences == pytest.approx([0.02] * 3)
    with pytest.raises(ParameterError, match="no pair of finished runs of 'flora' and 'random'"):
        gate_figures.gain_by_redundancy(records, "flora")
    with pytest.raises(ParameterError, match="one setting"):
        gate_figures.redundancy_table([*records, gated("slora", 3, redundancy=0.5, setting="another")])


# whole and readable

CASES = {
    "acceptance": lambda: gate_figures.acceptance(runs()),
    "novelty": lambda: gate_figures.novelty(runs()),
    "ledger": lambda: gate_figures.ledger(runs()),
    "one run": lambda: gate_figures.acceptance(runs("slora", seeds=1)),
    "gain": lambda: gate_figures.gain_by_redundancy(redundant(0.0, [0.01, -0.01, 0]) + redundant(0.8, [-0.02] * 3)),
    "one share": lambda: gate_figures.gain_by_redundancy(redundant(0.8, [-0.02])),
}


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_clipped_or_overlaps(name):
    drawn = CASES[name]()
    assert_readable(drawn)
    (_,), (ax,) = drawn.legends, drawn.axes
    assert apart(ax.texts) and ax.get_xlabel() and (ax.get_ylabel() or name == "ledger")
