"""Gates: is novelty(head gradient) the novelty of what is trained, does a rejected batch leave a trace, does the rate
hold, and what do many short runs and recorded ones say of a row and the row it is compared with?"""

import copy
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import BatchSampler, RandomSampler

from lorakit.analysis import names, stats, style, tables
from lorakit.analysis.frame import gate_of
from lorakit.errors import require
from lorakit.files import RESULTS, aside
from lorakit.gates import HeadGradientGate, ThresholdController
from lorakit.head import HeadInput, find_head
from lorakit.modules import adapter_parameters
from lorakit.params import resolve
from lorakit.params.doors import switched_off
from lorakit.records import Record, read_all
from lorakit.runs.assembly import Assembled, assemble, build_trainer
from lorakit.runs.experiment import new_record, run
from lorakit.sketches import FrequentDirections
from lorakit.training import BudgetTrainer

Batch = Mapping[str, Tensor]
# of a short run, what no table of a study looks at
QUICK = {"evaluations": 1, "latency_repeats": 0, "predict_memory": False, "max_test": 16}


# the proxy and the truth ----------------------------------------------------------------------------


def novelty_table(model: nn.Module, batches: Sequence[Batch], gate: HeadGradientGate, remembered: int) -> pd.DataFrame:
    """Does what is new to the head tell what is new to the adapters? Every batch gets its backward here, none a step.

    The first `remembered` batches fill two bases of `gate`'s rank: the gate's own, of sketched head gradients, and one
    of the adapters' whole gradients, (parameters,), unsketched, without the task head's. Both are normalised alike and
    kept by Frequent Directions with the gate's rows and decay. The other batches' novelty is then measured by both:
    a line per batch, "proxy" as the gate scores it, "truth" of the gradient of all adapters.

    Args:
        model: with adapters and a linear head.
        batches: with labels, on the model's device.
        gate: of the model's head, without anything learned yet.
        remembered: how many batches fill the bases.

    Raises:
        ParameterError: no batch is left to be measured, or the gate has learned already.
    """
    require(0 < remembered < len(batches), "remembered", remembered, f"must be in 1 to {len(batches) - 1}")
    require(gate.updates == 0, "gate", gate.updates, "must not have learned from a batch yet")
    trained, seen = adapter_parameters(model), HeadInput(find_head(model, gate.kind))
    rows, decay = gate.directions.rows, gate.directions.decay
    whole = FrequentDirections(sum(p.numel() for p in trained), rows, decay=decay, device=gate.device)

    def sketch_and_gradient(batch: Batch) -> tuple[Tensor, Tensor]:
        """Of one batch: z (m,) and the unit gradient of everything in `trained`, (parameters,)."""
        outputs = model(**batch)
        logits = outputs.logits.detach()
        z = gate.embed(seen.take(logits), logits, batch["labels"])
        gradients = torch.autograd.grad(outputs.loss, trained, materialize_grads=True)
        return z, nn.functional.normalize(torch.cat([part.flatten() for part in gradients]), dim=0, eps=1e-30)

    pairs = [sketch_and_gradient(batch) for batch in batches]
    seen.remove()
    for sketch, gradient in pairs[:remembered]:
        gate.update(sketch)
        whole.insert(gradient)
    bases = gate.directions.basis(gate.k).double(), whole.basis(gate.k).double()
    values = [[1 - float((basis @ nn.functional.normalize(vector.double(), dim=0, eps=1e-300)).square().sum())
               for basis, vector in zip(bases, pair, strict=True)] for pair in pairs[remembered:]]  # fmt: skip
    return pd.DataFrame(values, columns=["proxy", "truth"])


def batches(task: Any, size: int, count: int, seed: int) -> list[dict[str, Tensor]]:
    """`count` batches of `size` training rows each, shuffled, and shuffled again when they are used up."""
    order = RandomSampler(task.train, num_samples=size * count, generator=torch.Generator().manual_seed(seed))
    return [task.collator([task.train[row] for row in rows]) for rows in BatchSampler(order, size, drop_last=False)]


@style.captioned
def agreement(found: Mapping[str, pd.DataFrame]) -> Figure:
    """The novelty that the gate sees against that of the adapters' true gradient, a point per batch."""
    with style.panel(3.0, len(found), squeeze=False) as axes:
        for ax, (name, table) in zip(axes.flat, found.items(), strict=True):
            style.points(ax, table["truth"], table["proxy"])
            ax.set(xlabel="novelty of the adapters' true gradient", ylabel="novelty as the gate sees it",
                   title=f"{name}: Spearman {stats.spearman(table['proxy'], table['truth']):.2f}")  # fmt: skip
        return ax.get_figure()


# a run, watched ------------------------------------------------------------------------------------


class Step(NamedTuple):
    """What one candidate batch did: accepted, whether a trained weight moved, whether an optimizer's moment did."""

    accepted: bool
    weights_moved: bool
    moments_moved: bool


def trained(given: Mapping[str, Any]) -> Assembled:
    """Model and task of a run, after its training and without any of its measurements."""
    with aside(tempfile.gettempdir(), "study") as folder:
        assembled, trainer = _started(given, folder)
        trainer.train()
    assembled.model.eval()
    return assembled


def watched(given: Mapping[str, Any]) -> list[Step]:
    """Train as `given` says and compare, bit by bit, weights and moments around every batch."""
    from transformers import TrainerCallback

    parameters, states, steps = [], [], []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **_):
            states.append(_state(parameters, optimizer))
            before, after = states.pop(0), states[0]
            moved = [len(one) != len(other) or not all(map(torch.equal, one, other))
                     for one, other in zip(before, after, strict=True)]  # fmt: skip
            steps.append(Step(trainer.gate_log.decisions[-1], *moved))

    with aside(tempfile.gettempdir(), "study") as folder:
        assembled, trainer = _started(given, folder)
        parameters += [p for p in assembled.model.parameters() if p.requires_grad]
        states.append(_state(parameters, None))
        trainer.add_callback(Watch())
        trainer.train()
    return steps


def _started(given: Mapping[str, Any], folder: Path) -> tuple[Assembled, BudgetTrainer]:
    params = resolve(dict(given))
    assembled = assemble(params)
    return assembled, build_trainer(assembled, new_record(params, dict(given)), folder)


def _state(parameters: Sequence[nn.Parameter], optimizer: Any) -> tuple[list[Any], list[Any]]:
    states = optimizer.state_dict()["state"] if optimizer else {}
    moments = [value for state in states.values() for value in state.values() if torch.is_tensor(value)]
    return copy.deepcopy([p.detach() for p in parameters]), copy.deepcopy(moments)


def thresholded(controller: ThresholdController, scores: Iterable[float], seed: int) -> list[bool]:
    """Which of a stream of scores `controller` accepts, its coin thrown with `seed`."""
    generator, accepted = torch.Generator().manual_seed(seed), []
    for score in scores:
        accepted.append(torch.rand((), generator=generator, dtype=torch.float64).item() < controller.probability(score))
        controller.observe(score, accepted[-1])
    return accepted


# runs and records -----------------------------------------------------------------------------------


def ablate(base: Mapping[str, Any], variants: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]) -> list[Record]:
    """A run of `base` with each variant's changes and each seed; a record is called after its variant.

    What `base` says of a gate, say, is left out where a variant has none.
    """
    jobs = [(name, changes, seed) for name, changes in variants.items() for seed in seeds]
    kept = {name: switched_off(base, {"gate": "none", **base, **changes}) for name, changes in variants.items()}
    return [run({**QUICK, **kept[name], **changes, "row": name, "seed": seed}) for name, changes, seed in jobs]


def recorded(setting: str) -> list[Record]:
    """The records of a setting, none where it was not run."""
    return read_all(RESULTS / setting) if (RESULTS / setting).is_dir() else []


def gap_table(records: Sequence[Record], pairs: Mapping[str, str], value: str = stats.LOSS) -> tables.Table:
    """A line per row of `pairs` that has finished runs: `value`, the rate kept, and the paired difference.

    Args:
        records: of one setting.
        pairs: row -> the row it is compared with ("" for none); rows without a record are left out.
    """
    groups, lines = stats.by_row(records), []
    for row, other in pairs.items():
        if len(ended := pd.Series(stats.finished(groups.get(row, []), value), dtype=float)):
            line = {"row": names.label(row, records), value: tables.score(ended.mean(), ended.std())}
            gap = stats.paired_differences(groups[row], groups[other], value) if other in groups else None
            told = tables.told(gap, records) if gap and gap.estimate else {}
            lines.append(line | {"accepted": _rate(groups[row])} | told)
    return tables.Table(pd.DataFrame(lines).fillna(tables.NONE))


def _rate(group: Sequence[Record]) -> str:
    rates = [rate for r in group if (rate := r.details.get("gate", {}).get("acceptance_rate")) is not None]
    return tables.percent(statistics.fmean(rates) if rates else 1)


def in_words(gap: stats.Difference) -> str:
    """A difference for a sentence: "+0.101 [+0.098, +0.104] (3 seeds: above)"."""
    seeds = f"({gap.estimate.count} seed{'s' * (gap.estimate.count != 1)}: {gap.verdict})"
    return " ".join(filter(None, (f"{gap.estimate.mean:+.3f}", gap.estimate.interval(), seeds)))


def redundant_shares(records: Sequence[Record]) -> pd.DataFrame:
    """By row: of the batches its runs saw, and of those they accepted, the shares that were redundant by design.

    Means over runs; rows whose stream was not redundant are left out.
    """
    found = [(record.row, gate["redundant_seen"] / gate["decisions"],
              gate["redundant_accepted"] / (gate["redundant_accepted"] + gate["fresh_accepted"]))
             for record in records if record.status == "done"
             and "redundant_seen" in (gate := record.details.get("gate", {}))]  # fmt: skip
    table = pd.DataFrame(found, columns=["row", "seen", "accepted"]).groupby("row").mean()
    return table.reindex(names.order(table.index))


def ended(records: Sequence[Record], row: str) -> float | None:
    """Mean final validation loss of a row's finished runs; None where it has none."""
    losses = stats.finished([record for record in records if record.row == row], stats.LOSS).values()
    return statistics.fmean(losses) if losses else None


def verdict(records: Sequence[Record], row: str, others: Sequence[str]) -> str:
    """One sentence, all of it from the records: the loss `row` ended at, and how that compares with `others`."""
    groups, label, loss = stats.by_row(records), names.label(row, records), ended(records, row)
    if loss is None:
        return f"On {records[0].setting}, no run of {label} has finished."
    gaps = [stats.paired_differences(groups[row], groups[name], stats.LOSS) for name in others if name in groups]
    gaps = [(f'"{names.label(gap.baseline, records)}"', gap) for gap in gaps if gap.estimate is not None]
    unshown = ", ".join(other for other, gap in gaps if gap.verdict != "below")
    chosen = "examples" if gate_of(groups[row])[0].endswith(" example") else "batches"
    end = f"accepting {_rate(groups[row])} of the {chosen}, ended at a {stats.LOSS} of {loss:.3f}"
    differs = "; ".join(f"from {other} by {in_words(gap)}" for other, gap in gaps)
    but = f"; it is not shown to be better than {unshown}" if unshown else ""
    return f"On {records[0].setting}, {label}, {end}{', which differs ' * bool(gaps)}{differs}{but}."
