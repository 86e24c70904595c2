"""README's table rows and sentences with numbers that `python -m benchmarks NAME --save benchmarks/measured` wrote.

While a benchmark's file is missing its numbers are `Unmeasured`: the texts have a `HOLE` in their place.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from readme_records import line, percent

from benchmarks import gate, hira, lora, nf4, skip, sparse
from benchmarks._decoders import SHARES
from benchmarks.tokens import CHOICES
from lorakit.files import PROJECT

MEASURED = PROJECT / "benchmarks" / "measured"
COMMAND = "python -m benchmarks {} --save benchmarks/measured"
HOLE = "□"


class Unmeasured:
    """A claim without a file, and any number that is made of it."""

    def _itself(self, *_: Any) -> Unmeasured:
        return self

    __getattr__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __rsub__ = __sub__ = _itself

    def __gt__(self, _: Any) -> bool:
        return False

    def __format__(self, _: str) -> str:
        return HOLE


@functools.cache
def saved(benchmark: str) -> dict[str, Any] | None:
    path = MEASURED / f"{benchmark}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def claim(benchmark: str, name: str) -> Any:
    """What was measured under this name: ours, theirs, ratio, target, in the claim's unit."""
    if saved(benchmark) is None:
        return Unmeasured()
    found = {told["name"]: told for told in saved(benchmark)["claims"]}
    return SimpleNamespace(**found[name])


def ratios(benchmark: str, cases: Any, what: str, form: str) -> list[str]:
    found = [claim(benchmark, f"{case.name}: {what}").ratio for case in cases]
    return [f"{ratio:{form}}".replace("-", "−") for ratio in found]


def row(title: str, benchmark: str, cases: Any, what: str, form: str = ".2f", target: str = ".2f") -> str:
    """Of a table: what two models' claims came to, and the target that both have."""
    goal = claim(benchmark, f"{cases[0].name}: {what}").target
    return line(title, *ratios(benchmark, cases, what, form), f"{goal:{target}}")


def short(number: Any) -> str:
    return f"{number:.1e}".replace("e-0", "e-")


def of_lora() -> Iterator[str]:
    pins = (PROJECT / "constraints.txt").read_text(encoding="utf-8").split()
    (peft,) = (pin.partition("==")[2] for pin in pins if pin.startswith("peft=="))
    yield f"Against PEFT {peft.rpartition('.')[0]} on the same weights"
    steps = ratios("lora", lora.CASES, "step", ".2f")
    yield f"a step took {steps[0]} (MiniLM) and {steps[1]} (DistilBERT) of PEFT's time"
    memory = max(claim("lora", f"{case.name}: predicted peak memory").ratio for case in lora.CASES)
    gap = max(claim("lora", f"{case.name}: loss gap over 33 steps / 1e-5").ours for case in lora.CASES)
    yield f"and {memory:.3f} of its predicted memory, with losses equal to {short(gap)}."


def of_hira() -> Iterator[str]:
    yield row("HiRA: step time over PEFT's", "hira", hira.CASES, "step")
    beyond = "HiRA: predicted memory beyond LoRA's, over PEFT's"
    yield row(beyond, "hira", hira.CASES, "predicted peak beyond LoRA's", ".3f")


def of_skip() -> Iterator[str]:
    half = "SkipLoRA, half of the blocks: backward"
    yield row(f"{half} FLOPs over LoRA's", "skip", skip.CASES, "backward FLOPs, prefix")
    yield row(f"{half} seconds over LoRA's", "skip", skip.CASES, "backward, prefix")
    measure = "SkipLoRA: a step that pays for the measure, over one that does not"
    yield row(measure, "skip", skip.CASES, "step, measured every 4th time", ".3f")
    left, head = (claim("skip", f"Gemma 270M 4x256: backward FLOPs, {what}").ratio for what in ("prefix", "the head's"))
    yield f"On Gemma 3 270M's dimensions the skipped half leaves {left:.2f} of the backward FLOPs, because"
    yield f"{percent(head)} of them are the head's."


def of_cache() -> Iterator[str]:
    for part in ("half", "two thirds"):
        for what, told, form in (("FLOPs", "FLOPs", ".3f"), ("seconds", "step", ".2f")):
            found = [claim("cache", f"{case.name}, {part}: {told}") for case in lora.CASES]
            shown = (f"{one.ratio:{form}}" for one in found)
            yield line(f"cached {part}: {what} over LoRA's", *shown, f"{found[0].target:.2f}")
    size = claim("cache", "8,192 rows of SST-2: on disk over said")
    yield line("rows of SST-2: bytes on disk over those said beforehand", f"{size.ratio:.3f}", "", f"{size.target:.2f}")


def of_examples() -> Iterator[str]:
    best, half = "best quarter", "cached half: FLOPs over LoRA's"
    told = {
        f"{best}: FLOPs over LoRA's on the whole candidate batch": "loss_floor: FLOPs over LoRA's, whole batch",
        f"{best} on a cached half: FLOPs over LoRA's without a cache": f"{half} without a cache",
        f"{best} on a cached half: FLOPs over LoRA's on the same cache": f"{half} on that cache",
    }
    for title, name in told.items():
        found = claim("examples", name)
        yield line(title, f"{found.ratio:.3f}", "", f"{found.target:.2f}")
    loss, novelty = (
        claim("examples", f"{gate}: step over LoRA's, whole batch").ratio for gate in ("loss_floor", "novelty")
    )
    yield "a step on the best quarter of 128"
    yield f"took {loss:.2f} of LoRA's on the whole batch by the largest loss, and {novelty:.2f} by novelty"
    steps = [
        claim("examples", f"cached half: step over LoRA's {on}").ratio for on in ("without a cache", "on that cache")
    ]
    yield "on the cached half {:.2f} and {:.2f}".format(*steps)


def of_sparse() -> Iterator[str]:
    half = f"Sparse LoRA, half of rank {sparse.RANK} removed"
    yield row(f"{half}: adapter file", "sparse", sparse.CASES, "structured, compacted file")
    yield row(f"{half}: unmerged inference", "sparse", sparse.CASES, "structured, compacted latency")


def of_nf4() -> Iterator[str]:
    names = [*nf4.MODELS]
    bits = [claim("nf4", f"{name}: bits per linear weight") for name in names]
    yield line("NF4 base: bits per linear weight", *(f"{one.ours:.2f}" for one in bits[:2]), f"{bits[0].theirs:.1f}")
    loss = claim("nf4", f"{nf4.MINILM.model}: loss, last third of {nf4.STEPS} steps, 2 seeds")
    title = f"NF4 base: training loss over LoRA's, last third of {nf4.STEPS} steps, two seeds"
    yield line(title, f"{loss.ratio:.3f}", "", f"{loss.target:.2f}")
    yield f"NF4's loss ratio holds at {nf4.STEPS} steps"
    smaller = [f"{1 / claim('nf4', f'{name}: whole model over fp16').ratio:.1f}" for name in names]
    yield f"The base is {smaller[0]} times smaller than in fp16 (DistilBERT {smaller[1]}, Gemma 270M {smaller[2]})"
    yield f", not {16 / bits[0].ours:.0f}."


def of_gate() -> Iterator[str]:
    def pair(what: str) -> str:
        return "; ".join(ratios("gate", (gate.MINILM, gate.CHATS), what, ".3f"))

    over = {"rejected": "rejected batch over its forward", "accepted": "accepted batch over the plain step"}
    goals = {kind: f"{claim('gate', f'{gate.MINILM.name}: {what}').target:.2f}" for kind, what in over.items()}
    models = "MiniLM; Gemma 270M, 4 × 256 tokens, a quarter of them predicted"
    yield line(f"{over['rejected']}, seconds: {models}", pair(over["rejected"]), goals["rejected"])
    yield line(f"{over['accepted']}, seconds: the same", pair(over["accepted"]), goals["accepted"])
    forwards = claim("gate", "forwards per candidate batch, some rejected")
    yield line("backbone forwards per candidate batch", f"{forwards.ratio:.3g}", f"{forwards.target:g}")
    flops = claim("gate", "rejected batch: FLOPs")
    title = "rejected batch over its forward, FLOPs (Gemma 270M, every token predicted)"
    yield line(title, f"{flops.ratio:.4f}", f"{flops.target:.3f}")
    kept, again = (claim("gate", f"a candidate at rate 0.3, logits {how}: FLOPs") for how in ("kept", "made again"))
    title = "FLOPs a candidate at acceptance 0.3 over the exact step's: logits kept; made again"
    yield line(title, f"{kept.ratio:.2f}; {again.ratio:.2f}", f"{kept.target:.2f}; {again.target:.2f}")
    state = claim("gate", "gate state, m=512, k=64, V=262144")
    yield line("gate state, V = 262,144", f"{state.ours:.2f} MB", f"{state.theirs:.0f} MB")
    yield "the state is of m = 512, k = 64"
    peak = claim("gate", "Gemma 640x4 1x256: peak of an accepted step")
    title = "peak memory of an accepted step over the plain step's (4-layer Gemma, 256 tokens)"
    yield line(title, f"{peak.ratio:.4f}", f"{peak.target:.2f}")
    off = [claim("gate", f"acceptance at {rate}: |share - target|") for rate in gate.RATES]
    rates, worst = ", ".join(map(str, gate.RATES)), max(one.ours for one in off)
    title = f"acceptance rate at {rates} over {gate.STEPS:,} batches of a drifting stream, off by"
    yield line(title, f"≤ {worst:.4f}", f"{off[0].theirs:.2f}")
    every = [f"{claim('gate', f'{gate.PRETRAINING.name}: {what}').ratio:.3f}" for what in over.values()]
    goal = claim("gate", f"{gate.PRETRAINING.name}: {gate.OVER[0]}").target
    yield f"**Where every one of the 1,024 tokens is predicted** a rejected batch costs {every[0]} of its forward"
    yield f"(target {goal:.2f})"
    yield f"on Gemma 270M and an accepted one {every[1]}: to find"
    yield "largest logits all 262,144 are read once more"


def of_tokens() -> Iterator[str]:
    yield "Gemma 3 270M, 4 × 256 tokens, over LoRA with the exact loss"
    choices = {f"{mode} {fraction:.0%}": (mode, percent(fraction)) for mode, fraction in CHOICES}
    choices["fractional 20% by update"] = ("fractional, by `update`", "20 %")
    choices |= {"fractional 20% at random": ("fractional, at random", "20 %"), "plain": ("all logits (`nll`)", "all")}
    for name, shown in choices.items():
        step = f"{claim('tokens', f'{name}: step').ratio:.2f}" if "20%" in name else ""
        told = [claim("tokens", f"{name}{share}: {what}").ratio
                for share in SHARES for what in ("step FLOPs", "predicted peak")]  # fmt: skip
        flops, peak, *quarter = (f"{ratio:.2f}" for ratio in told)
        yield line(*shown, flops, peak, step, *quarter)
    scores = [claim("tokens", f"scoring by {score}") for score in ("sketch", "gradient_norm", "loss", "entropy")]
    most, states = max(one.ratio for one in scores), claim("tokens", "scoring by hidden_gradient").ratio
    yield f"It adds {percent(most - 1, '.1f')} to a forward's FLOPs by `sketch`, `gradient_norm`, `loss` and `entropy`"
    yield f"but {percent(states - 1)} by `hidden_gradient`"
    off = claim("tokens", "fractional, all chosen: gradient off by (1e-5)")
    yield f"`fractional` with everything chosen has the plain gradient to {short(1e-5 * off.ours)}."


def of_loss() -> Iterator[str]:
    def both(what: str, form: str = ".2f", *shares: str) -> Iterator[str]:
        found = [claim("loss", f"{what.format(share)}") for share in shares or SHARES]
        yield "; ".join(f"{one.ratio:{form}}" for one in found)
        yield "; ".join(f"{one.target:.2f}" for one in found)

    yield "| the exact loss (Gemma 3 270M's dimensions, 4 × 256 tokens, bf16; "
    yield line("over TRL 1.16's, FLOPs: all tokens predicted; a quarter", *both("over TRL{}: FLOPs", ".3f"))
    yield line("over TRL 1.16's, peak (its GPU path's buffers, by formula): the same", *both("over TRL{}: peak", ".3f"))
    yield line("over TRL 1.16's, seconds (its CPU fallback): all", *both("over TRL: step", ".2f", ""))
    for what, told in (("peak", "predicted peak"), ("step", "seconds")):
        title = f"over all logits, {told}, all predicted: 384 MiB a chunk; 96, the default"
        yield line(title, *both(f"over plain, {{}} MiB: {what}", ".2f", "384", "96"))
    yield line("over all logits, seconds: a quarter predicted", *both("over plain{}: step", ".2f", ", 25 % targets"))
    off = [claim("loss", f"gradient {how}, off by") for how in ("in fp32", "by the head's input in fp16 with a scaler")]
    sides = [
        [unit * getattr(one, side) for unit, one in zip((1e-6, 1e-4), off, strict=True)] for side in ("ours", "target")
    ]
    title = "gradient off by: of a trained weight in fp32; by the head's input in fp16 with a scaler"
    yield line(title, *("; ".join(map(short, side)) for side in sides))
    below = claim("loss", "gradient in fp16, off by, over the plain one's at another scale")
    yield f"In fp16 a trained weight's gradient is off by {short(1e-4 * below.ours)}, the plain one's at another scale"
    yield f" by {short(1e-4 * below.theirs)} from itself"


def of_combined() -> Iterator[str]:
    for what, title in (("FLOPs", "FLOPs over exact LoRA's"), ("peak over plain LoRA's", "peak over plain LoRA's")):
        found = [claim("combined", f"combined{share}: {what}") for share in SHARES]
        measured, goals = ("; ".join(f"{getattr(one, side):.2f}" for one in found) for side in ("ratio", "target"))
        yield line(f"all four at once, {title}: all predicted; a quarter", measured, goals)


SAID = {
    "lora": of_lora,
    "cache": of_cache,
    "examples": of_examples,
    "hira": of_hira,
    "skip": of_skip,
    "sparse": of_sparse,
    "nf4": of_nf4,
    "gate": of_gate,
    "tokens": of_tokens,
    "loss": of_loss,
    "combined": of_combined,
}
