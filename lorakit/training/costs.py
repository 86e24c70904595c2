"""What a run has cost so far, and what it may: steps, tokens, FLOPs and seconds, summed over ranks.

A budget is an amount of any of them; the learning rate follows the share already spent.
"""

import math
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lorakit.measure.flops import FlopCount
from lorakit.records import Spent

SPENT = ("accepted_steps", "tokens", "tokens_backpropagated", "flops")  # of a ledger, in a curve and in trackers


class Ledger(Spent):
    """What a run has spent so far, one optimizer step after the other."""

    loss_sum: float = 0.0  # of the steps since the last point on the curve
    loss_steps: int = 0
    score_sum: float = 0.0  # of the scored batches since then
    score_count: int = 0
    _pending: dict[str, float] = {}
    _mark: float = 0.0

    @property
    def flops(self) -> float:
        return self.flops_forward + self.flops_backward + self.flops_gate

    def add(self, **counts: float) -> None:
        """Count what this rank did; it becomes part of the totals at the next `commit`."""
        for name, count in counts.items():
            self._pending[name] = self._pending.get(name, 0) + count

    def commit(self, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Close one optimizer step. `total` sums a float64 vector over ranks, so every rank holds equal totals."""
        names = ("examples", "tokens", "tokens_backpropagated", "flops_forward", "flops_backward", "flops_gate")
        counts = [self._pending.get(name, 0.0) for name in (*names, "accepted", "without_labels", "loss")]
        *sums, accepted, without_labels, loss, ranks = total(torch.tensor([*counts, 1.0], dtype=torch.float64)).tolist()
        for name, value in zip(names, sums, strict=True):
            setattr(self, name, type(getattr(self, name))(getattr(self, name) + value))
        self.steps += 1
        self.accepted_steps += accepted > 0
        self.steps_without_labels += accepted == 0 and without_labels > 0
        self.loss_sum += loss / ranks
        self.loss_steps += 1
        self.score_sum += self._pending.get("score", 0.0)
        self.score_count += int(self._pending.get("scored", 0))
        self._pending.clear()
        now = time.perf_counter()
        self.seconds += now - self._mark
        self._mark = now

    def forget(self) -> None:
        """Drop what was counted of a step that came to no end."""
        self._pending.clear()

    def restart_clock(self) -> None:
        """Leave what happened since the last step (evaluation, saving) out of the seconds."""
        self._mark = time.perf_counter()

    def take_means(self) -> tuple[float | None, float | None]:
        """Mean train loss and gate score since the last call, and start anew."""
        loss = self.loss_sum / self.loss_steps if self.loss_steps else None
        score = self.score_sum / self.score_count if self.score_count else None
        self.loss_sum = self.score_sum = 0.0
        self.loss_steps = self.score_count = 0
        return loss, score

    def state_dict(self) -> dict[str, Any]:
        return self.model_dump()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.state_dict():
            setattr(self, name, state[name])


@dataclass(frozen=True)
class Budget:
    """`amount` of `unit`; the run ends with the step that spends the last of it. For ranges see `lorakit.settings`."""

    amount: float
    unit: str = "accepted_steps"

    def share(self, ledger: Ledger) -> float:
        """Share of the budget spent, 0 at the start, at least 1 at the end."""
        return getattr(ledger, self.unit) / self.amount

    def steps(self) -> float | None:
        """Steps an ungated run of this budget takes; None where that is not counted in steps."""
        return self.amount if self.unit in ("steps", "accepted_steps") else None


@dataclass(frozen=True)
class Schedule:
    """Learning-rate factor as a function of the share of the budget spent.

    Rises linearly from a tenth over the first `warmup` share, then decays to 0 at share 1 (or stays: "constant").
    """

    name: str = "linear"
    warmup: float = 0.0

    def factor(self, share: float) -> float:
        if share < self.warmup:
            return 0.1 + 0.9 * share / self.warmup
        if self.name == "constant":
            return 1.0
        left = max(0.0, 1 - (share - self.warmup) / (1 - self.warmup))
        return left if self.name == "linear" else 0.5 * (1 - math.cos(math.pi * left))


@dataclass
class FlopMeter:
    """FLOPs of a pass: counted until they can be computed, since counting takes as long again as a small model's pass.

    Matrix products of the passes of one key cost a + Σ bᵢ·sizeᵢ, where the sizes are what the products' shapes are
    made of: a pass over (B, T) needs T and, for attention, T². Every count is one equation; a pass whose sizes are a
    combination of counted ones has the same combination of their FLOPs, exactly. The first that could be computed is
    counted as well: where the two differ the pass is no such sum, and all its sizes are counted.

    Attributes:
        known: (key, sizes) -> what was counted, in order.
    """

    known: dict[tuple[Hashable, tuple[int, ...]], int] = field(default_factory=dict, init=False)
    _equations: dict[Hashable, "_Equations"] = field(default_factory=dict, init=False)

    def measure(self, key: Hashable, sizes: tuple[int, ...], function: Callable[[], Any]) -> tuple[Any, int]:
        """Run `function`; return its result and its FLOPs.

        Args:
            key: what they depend on otherwise; sizes: equally many for every pass of the key.
        """
        flops = self.known.get((key, sizes))
        if flops is None and key in self._equations:
            flops = self._equations[key].solved(sizes)
        if flops is not None:
            return function(), flops
        with FlopCount() as count:
            result = function()
        self._learn(key, sizes, int(count.total))
        return result, int(count.total)

    def _learn(self, key: Hashable, sizes: tuple[int, ...], flops: int) -> None:
        self.known[key, sizes] = flops
        self._equations.setdefault(key, _Equations()).add(sizes, flops)

    def state_dict(self) -> list[list[Any]]:
        """[[key, sizes], FLOPs] of every count, in order, for JSON."""
        return [[[key, list(sizes)], flops] for (key, sizes), flops in self.known.items()]

    def load_state_dict(self, state: list[list[Any]]) -> None:
        self.__init__()
        for (key, sizes, *older), flops in state:  # older checkpoints hold counts by whole shapes: counted anew
            if not older and all(isinstance(size, int) for size in sizes):
                self._learn(_frozen(key), tuple(sizes), flops)


@dataclass
class _Equations:
    """flops = a + Σ bᵢ·sizeᵢ of some passes, reduced as they come (Gauss and Jordan), in whole numbers.

    rows: (place of its leading entry, [1, *sizes, flops] reduced).
    holds: whether the first that could be computed was as counted; None: not yet known.
    """

    rows: list[tuple[int, list[int]]] = field(default_factory=list)
    holds: bool | None = None

    def solved(self, sizes: tuple[int, ...]) -> int | None:
        """FLOPs of these sizes, None where they must be counted."""
        (*rest, flops), scale = self._reduced(sizes, 0)
        return -flops // scale if self.holds and not any(rest) and flops % scale == 0 else None

    def add(self, sizes: tuple[int, ...], flops: int) -> None:
        (*rest, difference), _ = self._reduced(sizes, flops)
        if (lead := next((place for place, value in enumerate(rest) if value), None)) is not None:
            common = math.gcd(*rest, difference)
            self.rows.append((lead, [value // common for value in (*rest, difference)]))
        elif self.holds is not False:
            self.holds = difference == 0

    def _reduced(self, sizes: tuple[int, ...], flops: int) -> tuple[list[int], int]:
        """The equation without what the rows explain, and the factor it was multiplied by on the way."""
        row, scale = [1, *sizes, flops], 1
        for lead, known in self.rows:
            if factor := row[lead]:
                row = [known[lead] * value - factor * other for value, other in zip(row, known, strict=True)]
                scale *= known[lead]
        return row, scale


def count_tokens(inputs: Mapping[str, torch.Tensor], config: Any) -> int:
    """Non-padding input tokens of a batch: from a (B, T) attention mask, else by the padding id (packed rows)."""
    if (mask := inputs.get("attention_mask")) is not None and mask.dim() == 2:
        return int(mask.sum())
    ids, pad = main_input(inputs), getattr(config, "pad_token_id", None)
    return ids.shape[:2].numel() if "input_ids" not in inputs or pad is None else int((ids != pad).sum())


def described(inputs: Mapping[str, Any]) -> tuple[torch.Tensor, tuple[Hashable, ...], tuple[int, int]]:
    """The main input, and what the FLOPs of a pass depend on: its tensors' shapes, "T" for the length; T and T²."""
    main = main_input(inputs)
    length = main.shape[1]
    shapes = {name: value.shape for name, value in inputs.items() if torch.is_tensor(value)}
    told = {name: ["T" if size == length else size for size in shape[1:]] for name, shape in shapes.items()}
    shape = tuple((name, (*shape[:1], *told[name])) for name, shape in shapes.items())
    return main, shape, (length, length**2)


def main_input(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(B, T, …): the words, else their embeddings, else the first tensor with two dimensions or more."""
    named = [inputs[name] for name in ("input_ids", "inputs_embeds") if name in inputs]
    return next(value for value in [*named, *inputs.values()] if torch.is_tensor(value) and value.dim() > 1)


def _frozen(key: Any) -> Any:
    return tuple(_frozen(item) for item in key) if isinstance(key, list) else key
