"""Will it fit? A training step's predicted memory against GPU sizes, and what makes it fit one of them."""

import argparse
import json
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from lorakit.errors import ParameterError, require
from lorakit.measure import live
from lorakit.runs import hours
from lorakit.runs.plan import CONTEXT_GIB, FRAGMENTATION, GIB, Plan, Prediction, longest, predict

GPU_SIZES_GB = (8, 12, 16, 24, 40, 48, 80, 141)  # of 10**9 bytes: the careful reading of the label
# what may make a step fit, the quickest first: 4 bits are unpacked at every use, checkpointing runs each block again
WAYS = ({}, {"quantize": "nf4"}, {"gradient_checkpointing": True}, {"quantize": "nf4", "gradient_checkpointing": True})
PIECE = 64  # tokens: the step in which the longest row is told


class Fit(NamedTuple):
    """How a step fits a card: the plan that does, None where nothing makes it; the largest batch at its length, and the
    longest row at its batch, in whole pieces of `PIECE` tokens."""

    plan: Plan | None
    batch: int = 0
    seq: int = 0


def fit(plan: Plan, gpu: float) -> Fit:
    """The quickest way in which the step fits a card of `gpu` GB (10**9 bytes), and how far it reaches.

    Raises:
        ParameterError: `gpu` is not above 0, or see `predict`.
    """
    require(0 < gpu < math.inf, "gpu", gpu, "must be above 0")
    seq = predict(plan).seq

    def room(step: Plan, **changes: Any) -> float:
        return gpu * 1e9 - predict(step.but(**changes)).need

    for way in WAYS:
        try:
            step = plan.but(seq=seq, **way)
            fitting = room(step) >= 0
        except (ParameterError, ValueError):  # not together with the rest of the plan, or not with this model
            continue
        if fitting:
            batch = largest(lambda n, step=step: room(step, batch=n), plan.batch, 2**20)
            pieces, most = max(1, seq // PIECE), longest(plan) // PIECE
            longer = largest(lambda n, step=step: room(step, seq=n * PIECE), pieces, most) if most else 0
            return Fit(step, batch, max(seq, longer * PIECE))
    return Fit(None)


def largest(room: Callable[[int], float], start: int, limit: int) -> int:
    """The largest n from `start` to `limit` whose `room` is not negative, which falls about evenly; 0: `start`'s is."""
    low, left, high, tries = start, room(start), limit + 1, 0
    guess = 2 * start
    while left >= 0 and high - low > 1:
        tries += 1
        if tries % 3 == 0 and high <= limit:  # where it is no line
            guess = (low + high) // 2
        guess = min(max(guess, low + 1), high - 1, 8 * low)
        found = room(guess)
        root = low + int(left * (guess - low) / max(left - found, 1e-9))  # of the line through both
        if found < 0:
            high = guess
        else:
            low, left = guess, found
        guess = root
    return low if left >= 0 else 0


def report(plan: Plan, prediction: Prediction) -> str:
    """What `lorakit plan` prints: the step, its predicted bytes by kind, and what fits with the assumed margins."""
    rank = f" rank {plan.rank}" if plan.method not in ("head", "full") else ""
    extra = ", gradient checkpointing" if plan.gradient_checkpointing else ""
    autocast = "" if plan.precision == "fp32" else f", {plan.precision} autocast"
    chosen = "" if plan.tokens == 1 else f", {100 * plan.tokens:.3g} % of the tokens ({plan.mode})"
    base = "nf4 linear layers, other " if plan.quantize == "nf4" else ""
    memory, needed = prediction.memory, prediction.need
    rooms = [(size, (size * 1e9 - needed) / GIB) for size in GPU_SIZES_GB]
    lines = [
        f"{plan.model} ({prediction.source})",
        f"{plan.method}{rank}, batch {plan.batch} x {prediction.seq} tokens, {base}{plan.dtype} weights{autocast}, "
        f"{plan.optimizer}{extra}{chosen}",
        f"{prediction.trainable:,} of {prediction.total:,} parameters trained, {prediction.flops / 1e12:.3g} TFLOPs",
        f"a prefix_cache takes {prediction.width * (4 if plan.dtype == 'fp32' else 2):,} bytes a token of its rows",
        "\npredicted, alive at the peak of one training step",
        *(f"{kind:12s} {memory[kind] / GIB:10.3f} GiB" for kind in (*live.KINDS, "peak")),
        f"\nassumed on top: {CONTEXT_GIB:g} GiB for the CUDA context, {FRAGMENTATION:.0%} for fragmentation",
        f"predicted need {needed / GIB:.1f} GiB; room on common GPUs",
        *(f"{size:4d} GB  {'fits' if room >= 0 else 'does not fit':14s} {room:+9.1f} GiB" for size, room in rooms),
    ]
    return "\n".join(lines)


def reach(fitting: Fit, gpu: float) -> str:
    """One sentence on what fits."""
    if (step := fitting.plan) is None:
        return f"{gpu:g} GB: does not fit, however it is made smaller (4 bits, gradient checkpointing)"
    ways = ["4 bits"] * (step.quantize == "nf4") + ["gradient checkpointing"] * step.gradient_checkpointing
    how = f"with {' and '.join(ways)}" if ways else "as it is"
    most = f"at {step.seq} tokens up to batch {fitting.batch:,}, at batch {step.batch} up to {fitting.seq:,} tokens"
    return f"{gpu:g} GB: fits {how}; {most}"


def main(argv: list[str] | None = None) -> int:
    """`lorakit plan MODEL …`; with --sweep, see `hours`."""
    if any(word.startswith("--sweep") for word in argv or ()):
        return hours.main(argv)
    more = "`lorakit plan --sweep SETTING --seeds 20 --gpus 64`: FLOPs, memory and hours of a whole sweep."
    options = {"description": __doc__, "epilog": more, "argument_default": argparse.SUPPRESS}
    parser = argparse.ArgumentParser(prog="lorakit plan", **options)
    parser.add_argument("model", metavar="MODEL", help="hub id, local folder or asset; only its configuration is read")
    for name, info in [*Plan.model_fields.items()][1:]:
        kind = int if name == "seq" else type(info.default or "")
        option = {"action": "store_true"} if info.default is False else {"type": kind}
        shown = f" (default {info.default})" if info.default else ""
        parser.add_argument(f"--{name.replace('_', '-')}", help=f"{info.description}{shown}", **option)
    parser.add_argument("--gpu", type=float, default=None, help="GB of a card: what fits it, and how far it reaches")
    parser.add_argument("--json", action="store_true", default=False, help="numbers for a program instead of text")
    given: dict[str, Any] = vars(parser.parse_args(argv))
    gpu, told = given.pop("gpu"), given.pop("json")
    if re.fullmatch(r"[\w.]+(,[\w.]+)+", given.get("targets", "")):
        given["targets"] = given["targets"].split(",")
    plan = Plan(**given)
    found = predict(plan)
    fitting = None if gpu is None else fit(plan, gpu)
    if told:
        fitting = fitting and fitting._asdict() | {"plan": fitting.plan and dict(fitting.plan)}
        print(json.dumps({"plan": dict(plan)} | found._asdict() | {"need": found.need, "gpu": gpu, "fit": fitting}))
        return 0
    print(report(plan, found))
    if fitting:
        print(f"\n{reach(fitting, gpu)}")
    return 0
