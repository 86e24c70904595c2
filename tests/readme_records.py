"""README's table rows and sentences with numbers, made anew from the committed records: `said()`.

Every text must stand in README as it is, but for line breaks.
"""

from __future__ import annotations

import functools
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import lorakit
from lorakit.analysis import claims, equal_cost, names, stats, tables
from lorakit.files import RESULTS
from lorakit.records import Record
from lorakit.studies.gates import redundant_shares

SST2, GATES, REDUNDANT, HALF = "sst2-minilm", "sst2-minilm-gates", "sst2-minilm-redundant", "sst2-minilm-redundant50"
CHAT, CHAT_GATES = "instruct-gemma3-270m", "instruct-gemma3-270m-gates"
EXACT, PLANNED = "instruct-gemma3-270m-exact", 5  # seeds, in claims.yaml
TOKENS, HIGHER = "instruct-gemma3-270m-tokens-lower-rate", "instruct-gemma3-270m-tokens"
FIRST = {
    "full": "full fine-tuning",
    "lora": "LoRA, rank 8, all linear layers",
    "head": "head only",
    "sparse": "Sparse LoRA, half of A and B zero",
    "hira": "HiRA, rank 8",
    "qlora": "QLoRA, NF4 base",
    "skip": "SkipLoRA, lower half of the blocks",
}
ENDS = ("flora20", "flora40", "flora20_gather", "flora40_gather", "update20", "dft", "excess20_gather")  # outside noise
BESIDE = (("random20", "lora"), ("flora20_gather", "random20_gather"), ("pps20", "random20"), ("update20", "random20"),
          ("combined", "lora"))  # fmt: skip
PAIRS = (("flora20", "random20"), ("pps20", "flora20"), ("update20", "flora20"))
WORDS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
PARTS = {2: "half", 4: "a quarter", 6: "a sixth"}
LOSS, TEST, ACCURACY, FLOPS = stats.LOSS, "test loss", "test accuracy", "flops"
SCORE = (tables.SCORE, 1)
GIB = 2**30


def said() -> Iterator[str]:
    yield from first_table()
    yield from first_results()
    yield from causal()
    yield from batches_table()
    yield from batches()
    yield from redundant()
    yield from exact_table()
    yield from exact_verdicts()
    yield from exact()
    yield from tokens_table()
    yield from tokens()
    yield from not_true()


# reading ---------------------------------------------------------------------------------------------


@functools.cache
def groups(setting: str) -> dict[str, list[Record]]:
    return stats.by_row(lorakit.read_all(RESULTS / setting))


def asked(setting: str, name: str) -> Any:
    """The parameter that all runs of a setting share."""
    (value,) = {record.resolved[name] for group in groups(setting).values() for record in group}
    return value


def searched(setting: str, row: str) -> dict[float, float]:
    """Learning rate -> validation loss of the search."""
    found = lorakit.read(RESULTS / setting / row / "lr_search.json")
    return {point.learning_rate: point.validation["loss"] for point in found.search}


def mean(setting: str, row: str, column: str, seeds: Iterable[int] | None = None) -> float:
    """Of one column of `lorakit.frame`'s runs, over all seeds or some."""
    runs = lorakit.frame(groups(setting)[row]).runs
    return float((runs if seeds is None else runs[runs["seed"].isin(seeds)])[column].mean())


def cells(setting: str, row: str, columns: Mapping[str, tuple[str, float]]) -> list[str]:
    """The row's means; in the form `SCORE` with the standard deviation over seeds."""
    columns = {name: (name, *form) for name, form in columns.items()}
    return [*tables.summary(lorakit.frame(groups(setting)[row]).runs, columns).iloc[0, 1:]]


def reached(setting: str, row: str, spread: bool = True) -> str:
    loss = cells(setting, row, {LOSS: SCORE})[0]
    return loss if spread else loss.split()[0]


def gap(setting: str, row: str, other: str, value: stats.Value = LOSS, **options: Any) -> stats.Estimate:
    return stats.paired_differences(groups(setting)[row], groups(setting)[other], value, **options).estimate


# words -----------------------------------------------------------------------------------------------


def line(*told: str) -> str:
    """A table's row, with single spaces."""
    return " ".join(f"| {' | '.join(told)} |".split())


def difference(*pair: Any) -> str:
    """ "−0.012 [−0.034, +0.010]" """
    return in_words(gap(*pair))


def at_equal_flops(setting: str, *rows: str) -> str:
    """ "−0.012 [−0.034, +0.010]", of the first row's loss minus the other's where both had spent as much."""
    return in_words(stats.at_equal(*(groups(setting)[row] for row in rows), FLOPS).gap.estimate)


def in_words(found: stats.Estimate) -> str:
    return f"{found.mean:+.3f} {found.interval()}".replace("-", "−")


def distance(*pair: Any) -> tuple[str, str]:
    """ "0.012", "[0.002, 0.022]" of a difference whose direction the sentence says."""
    found = gap(*pair)
    assert found.low * found.high > 0
    low, high = sorted(map(abs, (found.low, found.high)))
    return f"{abs(found.mean):.3f}", f"[{low:.3f}, {high:.3f}]"


def percent(share: float, form: str = ".0f") -> str:
    return f"{100 * share:{form}} %"


def seeds(setting: str, *rows: str) -> str:
    """In words, how many seeds each of these rows has (of all rows, where none is named)."""
    (count,) = {len(groups(setting)[row]) for row in rows or groups(setting)}
    return f"{WORDS[count]} seed{'s' * (count > 1)}"


def part(share: float) -> str:
    return PARTS.get(round(1 / share), f"{share:.3f}")


def vocabulary() -> str:
    return f"{lorakit.models.config('gemma-3-270m').vocab_size // 1000}k words"


# First results ---------------------------------------------------------------------------------------


def first_table() -> Iterator[str]:
    columns = {ACCURACY: SCORE, LOSS: SCORE, "trainable": ("{:,.0f}", 1), FLOPS: ("{:.1f}", 1e12)}
    columns["predicted_peak"] = ("{:.0f} MiB", 2**20)
    for row, name in FIRST.items():
        *scores, trained, flops, peak = cells(SST2, row, columns)
        mib = mean(SST2, row, "adapter_bytes") / 2**20
        adapter = f"{mib:.1f} MiB" if mib > 0.05 else "< 0.1 MiB"
        if row == "sparse":
            packed = statistics.mean(record.details["sparsity"]["bytes"]["packed"] for record in groups(SST2)[row])
            adapter += f", {packed / 2**20:.1f} packed"
        yield line(name, *scores, trained, adapter, flops, peak)


def uncounted() -> float:
    """FLOPs of B's product in LoRA's forward, which its records lack: as many as A's, by which its forward exceeds
    full fine-tuning's."""
    entries = groups(SST2)["sparse"][0].details["sparsity"]["entries"]
    assert entries["A"] == entries["B"]
    return mean(SST2, "lora", "flops_forward") - mean(SST2, "full", "flops_forward")


def first_results() -> Iterator[str]:
    total, steps = groups(SST2)["full"][0].parameters.total, f"{asked(SST2, 'budget'):.0f} steps"
    yield f"({total / 1e6:.1f} M parameters), {steps} of {asked(SST2, 'batch_size')} sentences"
    many, few = seeds(SST2, *[*FIRST][:3]), seeds(SST2, *[*FIRST][3:])
    two = few.split()[0]
    yield f"The first three rows have {many}; the methods below them {two}, which"
    searches = [lorakit.read(RESULTS / SST2 / row / "lr_search.json") for row in FIRST]
    ((tried, rates),) = {(one.resolved["search_budget"], len(one.search)) for one in searches}
    yield f"{tried:.0f} steps a rate, {WORDS[rates]} rates a method"
    yield f"are about {percent(uncounted() / mean(SST2, 'lora', FLOPS), '.1f')} too low"
    common = [record.seed for record in groups(SST2)["sparse"]]
    at = [f"{mean(SST2, 'lora', column, common):.3f}" for column in (ACCURACY, LOSS)]
    yield f"On the {few} that all have, LoRA is at {at[0]} and {at[1]}."

    sparsity = groups(SST2)["sparse"][0].details["sparsity"]
    yield f"{part(sparsity['reached'])} of the entries go for {gap(SST2, 'sparse', 'lora').mean:.3f} nats"
    yield f"{part(sparsity['zeros']['BA']).capitalize()} of BA is zero"
    rate = {row: groups(SST2)[row][0].resolved["learning_rate"] for row in FIRST}
    yield f"rate {rate['hira'] / rate['lora']:.0f} times LoRA's, and learned less in {steps}."
    less = {what: 1 - mean(SST2, row, what) / mean(SST2, "lora", what, common) for row, what in
            (("qlora", "predicted_peak"), ("skip", "flops_backward"), ("skip", FLOPS))}  # fmt: skip
    weights = groups(SST2)["qlora"][0].details["weights"]
    linear = percent(weights["rows"][0]["parameters"] / weights["base"]["parameters"])
    yield f"cost nothing that {few} can show, and saved {percent(less['predicted_peak'])} of the"
    yield f"predicted peak: {linear} of MiniLM's weights are in linear layers"
    yield f"took {percent(less['flops_backward'])} off the backward pass and {percent(less[FLOPS])} off all FLOPs"
    ends = {record.seed: record.costs.flops for record in groups(SST2)["skip"]}
    there = [stats.loss_at(record, FLOPS, ends[record.seed]) for record in groups(SST2)["lora"] if record.seed in ends]
    yield f"after as many FLOPs LoRA stands at {statistics.mean(there):.3f}."

    accuracy, interval = difference(SST2, "lora", "full", ACCURACY).split(" ", 1)
    yield f"is {accuracy} accuracy with a 95 % interval of {interval}: within the noise of {many}"
    place = 18e12
    equal = difference(SST2, "lora", "full", lambda record: stats.loss_at(record, FLOPS, place))
    yield f"at equal FLOPs ({place / 1e12:.0f} T) the validation losses differ by {equal}"
    below, interval = distance(SST2, "head", "full", ACCURACY)
    yield f"Head only is {below} below {interval}"


def train_loss(record: Record, steps: int) -> float:
    """Mean over the first `steps`; a point holds the mean since the one before."""
    points = [point for point in record.curve if point.train_loss is not None and point.step <= steps]
    places = [0, *(point.step for point in points)]
    assert places[-1] == steps
    return sum(point.train_loss * (point.step - before) for before, point in zip(places, points, strict=False)) / steps


def causal() -> Iterator[str]:
    (lora,), (qlora,) = groups(CHAT)["lora"], groups(CHAT)["qlora"]
    bits = "–".join(re.search(r"(\d)-(\d)-bit weights", lora.notes[0]).groups())
    yield f"(dequantised from {bits} bits)"
    yield f"weights that were {bits}-bit once already"
    asked_for = f"LoRA rank {lora.resolved['rank']}, {lora.costs.steps} steps of {lora.resolved['batch_size']}"
    yield f"{asked_for} conversations, {seeds(CHAT, 'lora')}"
    (middle, first), (_, end) = ((point.step, point.validation["loss"]) for point in lora.curve if point.validation)
    test = lora.final["test"]["loss"]
    yield f"validation loss {first:.2f} after {middle} steps, {end:.2f} at the end (test {test:.2f})"
    peak, less = (record.costs.predicted_memory["peak"] / GIB for record in (lora, qlora))
    logits = lora.costs.predicted_memory["logits"] / GIB
    yield f"Of a predicted peak of {peak:.1f} GiB, {logits:.1f} GiB are the logits over {vocabulary()}"
    short = qlora.costs.steps
    yield f"QLoRA on it, {short} steps: a predicted peak of {less:.2f} GiB instead of {peak:.2f}"
    high, low = (train_loss(record, short) for record in (qlora, lora))
    yield f"first {short} batches a training loss {percent(high / low - 1)} above LoRA's ({high:.2f} against {low:.2f})"


# Which batches deserve a backward? -------------------------------------------------------------------


def batches_table() -> Iterator[str]:
    columns = {"accepted_steps": ("{:.0f}", 1), "steps": ("{:.0f}", 1), FLOPS: ("{:.2f}", 1e12)}
    for row in groups(GATES):
        other = equal_cost.random_for(groups(GATES), row)
        against = "" if other in (None, row) else difference(GATES, row, other)
        yield line(names.label(row), *cells(GATES, row, columns | {LOSS: SCORE, ACCURACY: SCORE}), against)


def batches() -> Iterator[str]:
    yield f"LoRA, batches of {asked(GATES, 'batch_size')}, {seeds(GATES)}"
    rate, high = (f"{groups(GATES)[row][0].resolved['gate_rate']:g}" for row in ("slora", "slora50"))
    low_gap, high_gap = difference(GATES, "slora", "random"), difference(GATES, "slora50", "random50")
    yield f"SLoRA − random in validation loss: {low_gap} at rate {rate}, {high_gap} at {high}"
    yield f"(95 % intervals over {seeds(GATES)}, paired): within noise"
    limit, fewer = percent(equal_cost.LOSS_LIMIT, ".1f"), percent(equal_cost.STEPS_LIMIT)
    yield f"within {limit} of the full-length run at {fewer} fewer accepted steps"
    found = [gap(GATES, row, "full_length", relative=True) for row in ("slora", "slora50")]
    more = [(percent(one.mean), f"[{100 * one.low:.0f}, {100 * one.high:.0f}]") for one in found]
    yield f"is {more[0][0]} higher {more[0][1]} at rate {rate}, {more[1][0]} {more[1][1]} at {high}"
    pair = "slora", "same_flops"
    gated, steps = (f"{mean(GATES, row, 'accepted_steps'):.0f}" for row in pair)
    yield f"{steps} ungated steps cost what SLoRA's {gated} accepted ones did and reached"
    losses = [reached(GATES, row, spread=False) for row in pair]
    yield f"{losses[1]} against {losses[0]} ({at_equal_flops(GATES, *pair)})"
    assert len(groups(CHAT_GATES)) == 3
    rows = {"baseline": "ungated", "random": "random", "slora": "SLoRA"}
    ends = [f"{mean(CHAT_GATES, row, LOSS):.2f} ({name})" for row, name in rows.items()]
    accepted, size = asked(CHAT_GATES, "budget"), asked(CHAT_GATES, "batch_size")
    yield f"{seeds(CHAT_GATES)}, {accepted:.0f} accepted batches of {size} conversations, the validation losses were "
    yield f"{ends[0]}, {ends[1]} and {ends[2]}"
    yield f"works on a model with {vocabulary()}"


def redundant() -> Iterator[str]:
    most, half = (percent(asked(setting, "redundancy")) for setting in (REDUNDANT, HALF))
    pool = asked(REDUNDANT, "redundancy_pool")
    yield f"With {most} of the batches drawn again and again from the same {pool} rows"
    slora, random = (reached(REDUNDANT, row) for row in ("slora", "random"))
    yield f"reached {slora} against {random} for random batches at the same rate"
    shares = redundant_shares([*groups(REDUNDANT)["slora"], *groups(REDUNDANT)["random"]])["accepted"]
    yield f"({seeds(REDUNDANT, 'slora', 'random')}, {difference(REDUNDANT, 'slora', 'random')}): "
    half_of, other = part(shares["slora"]), percent(shares["random"])
    yield f"{half_of} of what it accepted was redundant, against {other}."
    slora, random = (reached(HALF, row, spread=False) for row in ("slora", "random"))
    yield f"With {half} redundant, {slora} against {random} ({seeds(HALF)}, {difference(HALF, 'slora', 'random')})"
    yield f"{reached(REDUNDANT, 'loss_floor')} at {most} ({seeds(REDUNDANT, 'loss_floor')})"
    yield f"SLoRA − ungated is {at_equal_flops(HALF, 'slora', 'same_flops')} with {half} redundant batches"
    yield f"{at_equal_flops(REDUNDANT, 'slora', 'same_flops')}, within noise, with {most} ("
    ungated = [reached(setting, "same_flops") for setting in (HALF, REDUNDANT)]
    yield f"{seeds(HALF)} each; ungated {ungated[0]} and {ungated[1]})"


# Which tokens deserve a backward? --------------------------------------------------------------------


def exact_table() -> Iterator[str]:
    columns = {"learning_rate": ("{:.0e}", 1), "steps": ("{:,.0f}", 1), LOSS: SCORE}
    for row, runs in groups(EXACT).items():
        if len(runs) == PLANNED:
            others = ("lora", equal_cost.random_for(groups(EXACT), row))
            told = ["" if other in (None, row) else in_words(gap(EXACT, row, other, TEST)) for other in others]
            rate, *more = cells(EXACT, row, columns)
            yield line(names.label(row, runs), rate.replace("e-0", "e-"), *more, *told)


def exact_verdicts() -> Iterator[str]:
    told = claims.read_claims(setting=EXACT)
    found = claims.claims_table(told, [record for runs in groups(EXACT).values() for record in runs])
    for pair, *cells in found[["held against", "seen", "limit", "verdict"]].itertuples(index=False):
        one, other = pair.split(" − ")
        yield line(f"`{one}` − `{other}`", *cells).replace("-0", "−0")


def exact() -> Iterator[str]:
    budget = asked(EXACT, "budget")
    rates, more = (len(searched(EXACT, row)) for row in ("lora", "dft"))
    yield f"{asked(EXACT, 'batch_size')} conversations a batch, **{budget / 1e12:.0f} TFLOPs for every row**"
    lower = WORDS[more - rates]
    yield f"the rate of its own search ({WORDS[rates]} rates; for DFT, whose best was the lowest, {lower} lower ones)"
    rows = [row for row, runs in groups(EXACT).items() if len(runs) == PLANNED]
    yield f"{seeds(EXACT, *rows)} each, claims and margins written down before the runs"
    yield f"| row ({seeds(EXACT, *rows)} each) | learning rate |"
    low, high = (percent(groups(EXACT)[row][0].resolved["gating"]["topk_tokens"]) for row in ("flora20", "flora40"))
    yield "with 95 % intervals that are not corrected for their number"
    told = claims.read_claims(setting=EXACT)
    yield f"verdicts with Holm's correction over all {WORDS[len(told)]})"
    yield f"**At {high} choosing pays, at {low} the largest scores cost**"
    yield f"**The largest score is the wrong choice at {low}**"
    ends = {row: " ".join(distance(EXACT, row, "lora", TEST)) for row in groups(EXACT) if row in ENDS}
    yield f"mode `fractional` at {high} ends {ends['flora40']} nats a token *below* exact LoRA on test"
    yield f"at {low} {ends['flora20']} *above* it, mode `gather` at {low} {ends['flora20_gather']}"
    yield f"and at {high} {ends['flora40_gather']} above."
    beside = {row: in_words(gap(EXACT, row, *other, TEST)) for row, *other in BESIDE}
    chance, pps, update = (" ".join(distance(EXACT, *pair, TEST)) for pair in PAIRS)
    yield f"{low} by the largest score end {chance} above {low} drawn at random"
    yield f"which are within the noise of LoRA ({beside['random20']})"
    yield f"it is within the noise ({beside['flora20_gather']})"
    yield f"(PPS) they end {pps} below the largest, and"
    yield f"ends {update} below it and {ends['update20']} below LoRA"
    yield f"neither is told from random tokens ({beside['pps20']} and {beside['update20']})"
    yield f"are within the noise of LoRA ({beside['combined']})"
    yield f"are far above: {ends['dft']} and {ends['excess20_gather']}."


def tokens_table() -> Iterator[str]:
    counts = dict.fromkeys(("steps", "tokens", "tokens_backpropagated"), ("{:,.0f}", 1))
    for row in groups(TOKENS):
        other = "random20_gather" if row == "targets_only" else equal_cost.random_for(groups(TOKENS), row)
        against = "" if other in (None, row) else difference(TOKENS, row, other)
        yield line(names.label(row), *cells(TOKENS, row, counts | {LOSS: SCORE}), against)


def tokens() -> Iterator[str]:
    chosen = {row: told["topk_tokens"] for row, group in groups(TOKENS).items()
              if (told := group[0].resolved["gating"]) and row != "targets_only"}  # fmt: skip
    low, high = map(percent, sorted(set(chosen.values())))
    yield f"Of each batch's predictions {low} or {high} are kept"
    batch, budget = asked(TOKENS, "batch_size"), asked(TOKENS, "budget")
    yield f"{batch} conversations a batch, **{budget / 1e12:.0f} TFLOPs for every row**"
    yield f"({seeds(TOKENS)} each)"
    below = distance(TOKENS, "pps20_gather", "random20_gather")[0]
    above = distance(TOKENS, "flora20_gather", "random20_gather")[0]
    yield f"PPS ended {below} below random tokens and top-k {above} *above* them"
    yield f"(95 % intervals over {seeds(TOKENS)}, paired, hold no 0)"
    yield f"Does {low.split()[0]}–{high} of the tokens keep the loss?"
    yield f"PPS {low} and both {high} rows are within the noise of LoRA"
    yield f"(`fractional` {high}: {difference(TOKENS, 'flora40', 'lora')})"
    yield f"is better than LoRA by {' '.join(distance(TOKENS, 'targets_only', 'lora'))}"
    told = [record.details["tokens"] for record in groups(TOKENS)["pps20"]]
    seen = sum(record.costs.tokens for record in groups(TOKENS)["pps20"])
    yield f"where {part(sum(one['predictions'] for one in told) / seen)} of the tokens are answers"
    yield f"the head has {vocabulary()}"
    fractional = {f"{mean(TOKENS, row, 'predicted_peak') / GIB:.1f}" for row in ("flora20", "pps20", "random20")}
    peaks = [f"{mean(TOKENS, row, 'predicted_peak') / GIB:.1f} GiB" for row in ("lora", "targets_only")]
    yield f"{'/'.join(fractional)} GiB in mode `fractional` at {low} against {peaks[0]} for LoRA and {peaks[1]} for all"
    losses = searched(HIGHER, "lora")
    best = f"{min(losses, key=losses.get):.0e}".replace("e-0", "e-")
    assert f"{asked(HIGHER, 'learning_rate'):.0e}".replace("e-0", "e-") == best
    ends = [mean(HIGHER, row, LOSS) for row in groups(HIGHER) if "20" in row]
    lora = mean(HIGHER, "lora", LOSS)
    yield f"at {best}, the best for LoRA in a shorter search, LoRA ended at {lora:.2f}"
    yield f"the {low} rows at {min(ends):.1f} to {max(ends):.1f} ({seeds(HIGHER)},"


# What is not true of LoRA ----------------------------------------------------------------------------


def not_true() -> Iterator[str]:
    flops = (mean(SST2, "lora", FLOPS) + uncounted()) / mean(SST2, "full", FLOPS)
    peak = mean(SST2, "lora", "predicted_peak") / mean(SST2, "full", "predicted_peak")
    yield f"LoRA spends {flops:.2f} of full fine-tuning's FLOPs and {peak:.2f} of its predicted peak memory"
    (times,) = {f"{mean(SST2, 'full', what) / mean(SST2, 'lora', what):.0f}" for what in ("trainable", "adapter_bytes")}
    yield f"What shrinks, {times} times, is what is trained, stored"
    lora, full = (searched(SST2, row) for row in ("lora", "full"))
    best, worst = min(lora, key=lora.get), max(lora, key=lora.get)
    times = [WORDS[round(ratio)] for ratio in (best / min(full, key=full.get), worst / best)]
    yield f"was {times[0]} times that of full fine-tuning, and {times[1]} times that ruined it."
    record = groups(TOKENS)["random20"]
    places = sum(one.details["tokens"]["predictions"] for one in record) / sum(one.costs.steps for one in record)
    yield f"(In the recorded chats {round(places, -1):.0f} places of a batch are predicted.)"
