"""`lorakit claims`: what the runs say of each claim of `claims.yaml`: it holds, is refuted, or cannot be resolved here.

A claim says that a row's mean over seeds, minus another's, lies on one side of a limit: below 0 (superiority, `metric`
saying which way is better), below the margin that would still count as no difference (non-inferiority), within it on
both sides (equivalence: two one-sided tests, Schuirmann 1987), or that the mean of the pairs' ratios is at most, for a
metric of which more is better at least, the margin (ratio). Tests are Student's on pairs of a seed, two-sided about the
limit, with Holm's correction over all claims of a setting, those not run yet among them.
"""

import argparse
import functools
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self

import numpy as np
import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lorakit.analysis import stats
from lorakit.analysis.frame import frame, require_comparable
from lorakit.analysis.tables import NONE, Table
from lorakit.errors import DataError, require
from lorakit.files import PROJECT
from lorakit.records import Record, read_all

BETTER = {"lower is better": 1, "higher is better": -1}  # the sign that makes more of a metric worse
READING = f"""\
A claim **holds** or is **refuted** where its limit lies outside what the seeds allow, at {100 * stats.ALPHA:.0f} % \
over all
claims of a setting together (Holm). Else it is **not resolvable here**: behind it stands the smallest distance from the
limit that so many seeds show four times out of five at that correction, and how many it would take at the distance
seen."""


class Claim(BaseModel):
    """One entry of `claims.yaml`; `metric` begins with a column of `frame(records).runs` and ends with which way is
    better."""

    model_config = ConfigDict(extra="forbid", strict=True)
    id: str
    source: str
    setting: str
    row: str
    against: str
    metric: str = Field(pattern=f", ({'|'.join(BETTER)})$")
    test: Literal["superiority", "non-inferiority", "equivalence", "ratio"]
    margin: float = Field(ge=0, allow_inf_nan=False)
    seeds: list[int] = Field(min_length=1)

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if self.row == self.against or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("two rows, and every seed once")
        return self

    @property
    def column(self) -> str:
        return self.metric.partition(",")[0]

    @property
    def worse(self) -> int:
        return BETTER[self.metric.rpartition(", ")[2]]


@dataclass(frozen=True)
class Finding:
    """What the runs say of a claim: `values` of its pairs (differences, or ratios), or what is `missing`."""

    claim: Claim
    values: tuple[float, ...] = ()
    missing: str = ""
    exploratory: str = ""  # why it is no evidence: a run is older than the claim, or its code was not committed

    def p_values(self) -> tuple[float, float]:
        """Of what speaks for the claim, and of what speaks against it; one-sided each, small where it does."""
        claim, sample = self.claim, np.array(self.values)
        counted = stats.named(claim.column) != claim.column  # as parameters are; metrics, named by a split, are drawn
        if claim.test == "equivalence":
            pairs = [stats.below(side, claim.margin, counted=counted) for side in (sample, -sample)]
            return max(held for held, _ in pairs), min(other for _, other in pairs)
        return stats.below(sample * claim.worse, self.limit * claim.worse, claim.test == "superiority", counted)

    @property
    def limit(self) -> float:
        """What the mean is held against."""
        return {"superiority": -self.claim.worse, "ratio": 1}.get(self.claim.test, self.claim.worse) * self.claim.margin

    def distance(self) -> tuple[float, float]:
        """From the mean to the limit, or to the nearer of two; and how far apart these are, where it is between."""
        mean, margin = float(np.mean(self.values)), self.claim.margin
        if self.claim.test != "equivalence":
            return abs(mean - self.limit), np.inf
        return abs(abs(mean) - margin), 2 * margin if abs(mean) < margin else np.inf


def read_claims(path: str | Path = PROJECT / "claims.yaml", setting: str = "") -> list[Claim]:
    """The claims of a file, all of them or those about one `setting`.

    Raises:
        DataError: it cannot be read, says nothing, or a claim is malformed or has another's id.
    """
    try:
        listed = yaml.safe_load(Path(path).read_text(encoding="utf-8"))["claims"]
        claims = [Claim.model_validate(entry) for entry in listed]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{path}: claim {first['input']!r}: {where}: {first['msg']}") from None
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: must hold `claims`, a list of them: {error}") from None
    names = [claim.id for claim in claims]
    repeated = sorted({name for name in names if names.count(name) > 1})
    require(not repeated, "id", repeated, "must be of one claim")
    return [claim for claim in claims if setting in ("", claim.setting)]


def find(claim: Claim, records: Sequence[Record], written: datetime | None = None) -> Finding:
    """What `records` of the claim's setting say of it; `written` is when it was, None where that is not asked."""
    rows = stats.by_row(records) if records else {}
    groups = {name: {record.seed: record for record in rows.get(name, [])} for name in (claim.row, claim.against)}
    missing = []
    for name, group in groups.items():
        ends = {seed: f" ({group[seed].status.replace('_', ' ')})" if seed in group else "" for seed in claim.seeds}
        told = [f"{seed}{end}" for seed, end in ends.items() if end != " (done)"]
        missing += [f"{name}: {', '.join(told)}"] if told else []
    if missing:
        return Finding(claim, missing=f"no finished run of {'; '.join(missing)}")
    used = [groups[name][seed] for name in groups for seed in claim.seeds]
    require_comparable(used)
    runs = frame(used).runs
    if claim.column not in runs.select_dtypes("number").columns.drop("seed"):
        return Finding(claim, missing=f"no {claim.column} in these records")
    one, other = (runs[runs["row"] == name].set_index("seed")[claim.column].loc[claim.seeds] for name in groups)
    values = one / other if claim.test == "ratio" else one - other
    if not np.isfinite(values).all():
        return Finding(claim, missing=f"{claim.column} is no number in some of these records")
    if claim.column == "learning_rate":  # of one search, whatever the seeds
        values = values[:1]
    early = written is not None and any(record.started < written.astimezone(UTC).isoformat() for record in used)
    dirty = any(record.environment.get("dirty") for record in used)
    return Finding(claim, tuple(map(float, values)), exploratory="exploratory" * (early or dirty))


def written_at(path: Path, claims: Sequence[Claim]) -> dict[str, datetime]:
    """When each claim's lines were last committed, as git tells it; of a claim that it does not know, none."""
    path, found, name = path.resolve(), {}, ""
    git = functools.partial(subprocess.run, cwd=path.parent, capture_output=True, text=True, check=True)
    try:
        if git(["git", "rev-parse", "--is-shallow-repository"]).stdout.strip() == "true":
            return {}  # whose oldest commit holds everything
        told = git(["git", "blame", "--line-porcelain", path.name]).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return {}
    for line in told:
        if line.startswith("committer-time "):
            time = datetime.fromtimestamp(int(line.split()[1]), UTC)
        elif line.startswith("\t"):
            name = line.split("id: ")[1].strip() if line.startswith("\t  - id: ") else name * line.startswith("\t  ")
            found[name] = max(found.get(name, time), time)
    return {claim.id: found[claim.id] for claim in claims if claim.id in found}


def verdicts(found: Sequence[Finding]) -> list[str]:
    """A verdict for each finding, all of one setting."""
    sides = {one.claim.id: one.p_values() for one in found if len(one.values) >= stats.MINIMUM_SEEDS}
    adjusted = dict(zip(sides, stats.holm([2 * min(pair) for pair in sides.values()], len(found)), strict=True))
    told = []
    for one in found:
        if one.claim.id not in sides:
            told.append(one.missing or "too few seeds")
        elif adjusted[one.claim.id] < stats.ALPHA:
            held, other = sides[one.claim.id]
            told.append("**holds**" if held < other else "**refuted**")
        elif np.ptp(one.values) <= stats.ROUNDING:
            told.append("not resolvable here (every seed says the same: they do not scatter)")
        else:
            spread, alpha = float(np.std(one.values, ddof=1)), stats.ALPHA / len(found)
            distance, width = one.distance()
            needed = f"{stats.seeds_needed(spread, distance, alpha, width):.0f}".replace("inf", "over 10,000")
            smallest = f"{stats.smallest_effect(spread, len(one.values), alpha, width):.2g}".replace("inf", "nothing")
            told.append(f"not resolvable here ({smallest} would be; {needed} seeds for this)")
        told[-1] += f" ({one.exploratory})" if one.exploratory else ""
    return told


def claims_table(
    claims: Sequence[Claim], records: Sequence[Record], written: dict[str, datetime] | None = None
) -> pd.DataFrame:
    """A line per claim: what is held against what, the mean of pairs with its 95 % interval, its limit, the verdict.

    Args:
        written: when each claim was; None: not asked. A claim that it lacks is told as one without a date.
    """
    lines = {}
    for setting in dict.fromkeys(claim.setting for claim in claims):
        of = [record for record in records if record.setting == setting]
        found = [find(claim, of, (written or {}).get(claim.id)) for claim in claims if claim.setting == setting]
        if written is not None:
            found = [one if one.claim.id in written else replace(one, exploratory="without a date") for one in found]
        for one, verdict in zip(found, verdicts(found), strict=True):
            claim, ratio = one.claim, one.claim.test == "ratio"
            form, mean = "{:.3f}" if ratio else "{:+.3f}", stats.estimate(one.values) if one.values else None
            interval = mean.interval(form) if mean and np.ptp(one.values) > 0 else ""
            bound = {"equivalence": "±", "ratio": "≤ " if claim.worse > 0 else "≥ "}.get(claim.test, "")
            lines[claim.id] = {
                "claim": claim.source,
                "setting": setting,
                "held against": f"{claim.row} {'/' if ratio else '−'} {claim.against}",
                "what": claim.column,
                "seen": f"{form.format(mean.mean)} {interval}".rstrip() if mean else NONE,
                "limit": f"{bound}{abs(one.limit) + 0 if claim.test == 'equivalence' else one.limit + 0:g}",
                "seeds": f"{len(claim.seeds)}",
                "verdict": verdict,
            }
    return pd.DataFrame([lines[claim.id] for claim in claims])


def main(argv: Sequence[str] | None = None) -> int:
    """Print what the records say of every claim.

    Raises:
        LorakitError: a claims file that is none, a setting without a claim, or records that cannot be compared.
    """
    parser = argparse.ArgumentParser(prog="lorakit claims", description="What the runs say of every claim.")
    parser.add_argument("results", nargs="*", metavar="RESULTS", help="record files, or folders (default: results)")
    parser.add_argument("--claims", type=Path, default=PROJECT / "claims.yaml", metavar="FILE", help="what is claimed")
    parser.add_argument("--setting", default="", help="only the claims about this one")
    parser.add_argument("--markdown", action="store_true", help="as Markdown")
    parser.add_argument("--output", metavar="FILE", help="write it there as well")
    args = parser.parse_args(argv)
    claims = read_claims(args.claims)
    settings = sorted({claim.setting for claim in claims})
    require(args.setting in ("", *settings), "--setting", args.setting, f"must be one of {', '.join(settings)}")
    chosen = [claim for claim in claims if args.setting in ("", claim.setting)]
    records = read_all(args.results or [PROJECT / "results"])
    Table(claims_table(chosen, records, written_at(args.claims, claims)), READING).tell(args.markdown, args.output)
    return 0
