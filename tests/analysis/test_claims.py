"""Claims and their verdicts against scipy, simulated power and cases whose answer is known."""

from __future__ import annotations

import os
import subprocess
from datetime import UTC, datetime

import numpy as np
import pytest
import yaml
from scipy import stats as scipy_stats
from synthetic_records import record

from lorakit import cli
from lorakit.analysis import claims, stats
from lorakit.analysis.claims import Claim, Finding
from lorakit.errors import DataError, LorakitError
from lorakit.files import PROJECT
from lorakit.records import write

SAMPLE = np.array([0.03, -0.01, 0.02, 0.05, 0.00, 0.04])
LOSS, ACCURACY = "test loss, nats, lower is better", "test accuracy, share, higher is better"


def claim(test: str = "superiority", margin: float = 0.0, metric: str = LOSS, **changes) -> Claim:
    said = {"id": "a-claim", "source": "a paper", "setting": "made-up", "row": "hira", "against": "lora"}
    return Claim(**said | {"metric": metric, "test": test, "margin": margin, "seeds": [*range(6)]} | changes)


def runs(row: str, values, metric: str = "loss", **changes):
    return [record(row, seed, final={"test": {metric: float(v)}}, **changes) for seed, v in enumerate(values)]


def verdict(one: Claim, values, others=None, metric: str = "loss") -> str:
    """Of a claim that is its setting's only one."""
    found = runs(one.row, values, metric) + runs(one.against, np.ones(6) if others is None else others, metric)
    return claims.verdicts([claims.find(one, found)])[0]


@pytest.mark.parametrize(
    ("one", "limit"),
    [
        (claim(), 0.0),
        (claim(margin=0.02), -0.02),
        (claim("non-inferiority", 0.03), 0.03),
        (claim("non-inferiority", 0.03, ACCURACY), -0.03),
        (claim("superiority", 0.02, ACCURACY), 0.02),
    ],
)
def test_p_values_are_scipys_about_the_limit(one, limit):
    found = Finding(one, tuple(SAMPLE))
    sides = ("less", "greater") if one.metric == LOSS else ("greater", "less")
    expected = [scipy_stats.ttest_1samp(SAMPLE, limit, alternative=side).pvalue for side in sides]
    assert found.limit == limit and found.p_values() == pytest.approx(expected, rel=1e-12)
    assert found.distance() == (pytest.approx(abs(SAMPLE.mean() - limit)), np.inf)


@pytest.mark.parametrize(("margin", "metric"), [(0.04, LOSS), (0.04, ACCURACY)])
def test_equivalence_is_two_one_sided_tests(margin, metric):
    found = Finding(claim("equivalence", margin, metric), tuple(SAMPLE))
    tests = [(margin, "less"), (-margin, "greater"), (margin, "greater"), (-margin, "less")]
    low, high, above, under = (scipy_stats.ttest_1samp(SAMPLE, at, alternative=side).pvalue for at, side in tests)
    assert found.p_values() == pytest.approx((max(low, high), min(above, under)))
    assert found.distance() == pytest.approx((margin - abs(SAMPLE.mean()), 2 * margin))
    assert Finding(claim("equivalence", 0.01), tuple(SAMPLE)).distance() == (
        pytest.approx(SAMPLE.mean() - 0.01),
        np.inf,
    )


NOISE = np.array([-0.012, 0.008, -0.004, 0.011, 0.002, -0.005])


@pytest.mark.parametrize(
    ("one", "shift", "expected"),
    [
        (claim(), -0.1, "holds"),
        (claim(), 0.1, "refuted"),
        (claim(), 0.001, "not resolvable"),
        (claim(margin=0.2), -0.1, "refuted"),  # better, but not by as much
        (claim("non-inferiority", 0.05), 0.02, "holds"),
        (claim("non-inferiority", 0.05), 0.1, "refuted"),
        (claim("non-inferiority", 0.05), 0.05, "not resolvable"),
        (claim("equivalence", 0.05), 0.01, "holds"),
        (claim("equivalence", 0.05), -0.1, "refuted"),
        (claim("equivalence", 0.05), -0.05, "not resolvable"),
        (claim("ratio", 0.8), -0.3, "holds"),
        (claim("ratio", 0.8), -0.1, "refuted"),
        (claim(metric=ACCURACY), 0.1, "holds"),
        (claim(metric=ACCURACY), -0.1, "refuted"),
        (claim("non-inferiority", 0.05, ACCURACY), -0.02, "holds"),
        (claim("non-inferiority", 0.05, ACCURACY), -0.1, "refuted"),
        (claim("ratio", 1.2, ACCURACY), 0.3, "holds"),
        (claim("ratio", 1.2, ACCURACY), 0.1, "refuted"),
    ],
)
def test_the_verdict_is_the_side_of_the_limit_the_seeds_are_on(one, shift, expected):
    metric = one.column.removeprefix("test ")
    assert expected in verdict(one, 1 + shift + NOISE, metric=metric)


@pytest.mark.parametrize(
    ("one", "value", "expected"),
    [
        (claim("ratio", 0.5), 0.5, "**holds**"),
        (claim("ratio", 0.5), 0.51, "**refuted**"),
        (claim(), 1.0, "**refuted**"),  # equal is not better
        (claim(metric=ACCURACY), 1.0, "**refuted**"),
        (claim("non-inferiority", 0.01, ACCURACY), 1.0 - 0.01, "**holds**"),  # which is more than 0.01 to a computer
        (claim("equivalence", 0.01), 1.01, "**holds**"),
        (claim("equivalence", 0.01), 1.011, "**refuted**"),
    ],
)
def test_what_is_counted_needs_no_spread_and_what_is_measured_does(one, value, expected):
    same = one.model_copy(update={"metric": one.metric.replace(one.column, "adapter_bytes")})
    held = [record(row, seed, adapter_bytes=round(1000 * at)) for row, at in (("hira", value), ("lora", 1.0))
            for seed in range(6)]  # fmt: skip
    counted = same.model_copy(update={"margin": same.margin * (1 if same.test == "ratio" else 1000)})
    assert claims.verdicts([claims.find(counted, held)]) == [expected]
    told = verdict(one, [value] * 6, metric=one.column.removeprefix("test "))
    assert told.startswith("not resolvable here (every seed says the same")


def test_a_learning_rate_is_of_one_search_whatever_the_seeds():
    one = claim("ratio", 5, "learning_rate, of the search, higher is better")
    found = [record(row, seed, resolved={"learning_rate": rate}) for row, rate in (("hira", 1e-2), ("lora", 1e-3))
             for seed in range(6)]  # fmt: skip
    told = claims.find(one, found)
    assert told.values == pytest.approx((10.0,)) and claims.verdicts([told]) == ["too few seeds"]


def test_a_second_record_of_a_run_is_refused():
    done = runs("hira", np.ones(6)) + runs("lora", np.ones(6))
    with pytest.raises(LorakitError, match="one record per row and seed"):
        claims.find(claim(), [*done, done[0]])


def test_a_claim_without_a_date_is_told_so():
    done = runs("hira", 0.5 + NOISE) + runs("lora", np.ones(6))
    assert claims.claims_table([claim()], done)["verdict"][0] == "**holds**"
    assert claims.claims_table([claim()], done, {})["verdict"][0] == "**holds** (without a date)"


def test_holm_is_by_hand_and_counts_claims_not_run_yet():
    assert stats.holm([0.01, 0.04, 0.03], 3) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.01, 0.04, 0.03], 5) == pytest.approx([0.05, 0.12, 0.12])
    assert stats.holm([0.4, 0.9], 4) == [1.0, 1.0]
    values = 1 - 0.02 + NOISE  # p = 0.0035
    found = [claims.find(claim(), runs("hira", values) + runs("lora", np.ones(6)))]
    missing = Finding(claim(id="another"), missing="no run of …")
    assert claims.verdicts(found) == ["**holds**"]
    assert claims.verdicts([*found, *[missing] * 20])[0].startswith("not resolvable")


@pytest.mark.parametrize(("count", "alpha"), [(3, 0.05), (5, 0.05 / 12), (8, 0.01)])
def test_the_smallest_effect_is_seen_four_times_out_of_five(count, alpha):
    effect = stats.smallest_effect(2.0, count, alpha)
    samples = np.random.default_rng(0).normal(effect, 2.0, size=(50_000, count))
    power = (scipy_stats.ttest_1samp(samples, 0, axis=1).pvalue < alpha).mean()
    assert power == pytest.approx(stats.POWER, abs=0.01)
    assert stats.seeds_needed(2.0, effect, alpha) == count
    assert stats.seeds_needed(2.0, 0.99 * effect, alpha) == count + 1


@pytest.mark.parametrize(
    ("count", "alpha", "width"), [(3, 0.05, 60.0), (8, 0.05, 7.0), (8, 0.05 / 12, 12.0), (40, 0.01, 3.0)]
)
def test_the_smallest_effect_between_two_limits_passes_both_tests_four_times_out_of_five(count, alpha, width):
    distance = stats.smallest_effect(2.0, count, alpha, width)
    assert 0 < distance <= width / 2
    samples = np.random.default_rng(0).normal(width / 2 - distance, 2.0, size=(50_000, count))
    sides = [scipy_stats.ttest_1samp(samples, at, axis=1, alternative=side).pvalue
             for at, side in ((width / 2, "less"), (-width / 2, "greater"))]  # fmt: skip
    assert (np.maximum(*sides) < alpha / 2).mean() == pytest.approx(stats.POWER, abs=0.01)
    assert stats.seeds_needed(2.0, distance, alpha, width) == count
    assert distance >= stats.smallest_effect(2.0, count, alpha)  # two tests are harder to pass than one


def test_limits_that_are_too_near_each_other_show_nothing_by_so_few_seeds():
    told = verdict(claim("equivalence", 0.005), 1.001 + NOISE)
    assert told.startswith("not resolvable here (nothing would be; ")
    assert stats.smallest_effect(1.0, 6, 0.05, 0.1) == np.inf


def test_what_lacks_is_named():
    done = runs("hira", np.ones(6)) + runs("lora", np.ones(6))
    broken = record("hira", 5, status="diverged")
    found = claims.find(claim(), [*done[:4], broken, *done[6:9]])
    assert found.missing == "no finished run of hira: 4, 5 (diverged); lora: 3, 4, 5"
    for name in ("test f1", "status", "seed"):
        assert claims.find(claim(metric=f"{name}, share, higher is better"), done).missing.startswith(f"no {name}")
    zero = runs("hira", np.ones(6)) + runs("lora", np.zeros(6))
    assert claims.find(claim("ratio", 0.5), zero).missing == "test loss is no number in some of these records"
    assert claims.verdicts([claims.find(claim(seeds=[0, 1]), done)]) == ["too few seeds"]


@pytest.mark.parametrize(("changes", "exploratory"), [
    ({}, False),
    ({"started": "2026-01-01T00:00:00+00:00"}, True),
    ({"environment": {"dirty": True}}, True),
    ({"environment": {"dirty": False}}, False),
    ({"started": ""}, True),
])  # fmt: skip
def test_runs_older_than_their_claim_or_of_code_not_committed_are_exploratory(changes, exploratory):
    changes = {"started": "2026-03-01T00:00:00+00:00"} | changes
    found = claims.find(claim(), runs("hira", 0.5 + NOISE, **changes) + runs("lora", np.ones(6),
        started="2026-03-01T00:00:00+00:00"), datetime(2026, 2, 1, tzinfo=UTC))  # fmt: skip
    assert found.exploratory == "exploratory" * exploratory
    assert claims.verdicts([found]) == ["**holds**" + " (exploratory)" * exploratory]


def test_a_claims_time_is_that_of_its_last_change(tmp_path):
    path = tmp_path / "claims.yaml"

    def git(*words, at="2026-01-01T00:00:00+00:00"):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        times = {"GIT_AUTHOR_DATE": at, "GIT_COMMITTER_DATE": at}
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, env=os.environ | times)

    first, second = (claim(id=name).model_dump() for name in ("first", "second"))
    git("init")
    for at, margin in (("2026-01-01T00:00:00+00:00", 0.0), ("2026-02-01T00:00:00+00:00", 0.5)):
        told = "".join(
            "  - "
            + yaml.safe_dump(one, sort_keys=False, default_flow_style=None).replace("\n", "\n    ").rstrip()
            + "\n"
            for one in (first, second | {"margin": margin})
        )
        path.write_text(f"claims:\n{told}out_of_scope:\n  written: {at}\n")
        git("add", ".")
        git("commit", "-m", "x", at=at)
    found = claims.written_at(path, claims.read_claims(path))
    assert found == {"first": datetime(2026, 1, 1, tzinfo=UTC), "second": datetime(2026, 2, 1, tzinfo=UTC)}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "must hold `claims`"),
        ("claims: 3", "must hold `claims`"),
        ("claims: [", "must hold `claims`"),
        ("claims:\n  - id: x", "source"),
        (yaml.safe_dump({"claims": [claim().model_dump() | {"test": "better"}]}), "test"),
        (yaml.safe_dump({"claims": [claim().model_dump() | {"metric": "loss"}]}), "lower is better"),
        (yaml.safe_dump({"claims": [claim().model_dump() | {"margin": -1.0}]}), "margin"),
        (yaml.safe_dump({"claims": [claim().model_dump() | {"seeds": [0, 0]}]}), "every seed once"),
        (yaml.safe_dump({"claims": [claim().model_dump() | {"against": "hira"}]}), "two rows"),
        (yaml.safe_dump({"claims": [claim().model_dump() | {"colour": "red"}]}), "colour"),
        (yaml.safe_dump({"claims": [claim().model_dump()] * 2}), "must be of one claim"),
    ],
)
def test_a_claims_file_that_is_none_is_named(tmp_path, text, told):
    (tmp_path / "claims.yaml").write_text(text)
    with pytest.raises(LorakitError, match=told):
        claims.read_claims(tmp_path / "claims.yaml")


def test_a_claims_file_that_is_not_there():
    with pytest.raises(DataError, match=r"nowhere\.yaml"):
        claims.read_claims("nowhere.yaml")


def test_the_projects_claims_are_of_rows_that_there_are():
    for one in claims.read_claims():
        folder = PROJECT / "params" / one.setting
        assert {one.row, one.against} <= {path.stem for path in folder.glob("*.yaml")}, one.id


def test_the_command(tmp_path, capsys):
    for one in runs("hira", 0.9 + NOISE) + runs("lora", np.ones(6)):
        write(one, tmp_path / "results" / one.row / f"s{one.seed}.json")
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump({"claims": [claim().model_dump()]}))
    command = ["claims", str(tmp_path / "results"), "--claims", str(tmp_path / "claims.yaml")]
    assert cli.main([*command, "--markdown", "--output", str(tmp_path / "told.md")]) == 0
    told = capsys.readouterr().out
    assert "| a paper" in told and "**holds**" in told and (tmp_path / "told.md").read_text() == told
    assert "-0.100 [-0.109, -0.091]" in told
    assert cli.main([*command, "--setting", "toy"]) == 2 and "must be one of made-up" in capsys.readouterr().err
