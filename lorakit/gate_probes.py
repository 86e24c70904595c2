"""Is novelty(head gradient) the novelty of what is trained, does a rejected batch leave a trace, does the rate hold?"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from lorakit import style
from lorakit.errors import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lorakit.gates import HeadGradientGate, ThresholdController
    from lorakit.runs.assembly import Assembled
    from lorakit.training import BudgetTrainer


# the proxy and the truth ----------------------------------------------------------------------------


class Agreement(NamedTuple):
    """Novelty of the same batches, (N,) each: as the gate scores it, and of the gradient of all adapters."""

    proxy: np.ndarray
    truth: np.ndarray

    @property
    def spearman(self) -> float:
        """Rank correlation of the two."""
        from lorakit.sketch_tables import spearman

        return spearman(self.proxy, self.truth)


def true_gradient_novelty(
    model: torch.nn.Module, batches: Sequence[Mapping[str, torch.Tensor]], gate: HeadGradientGate, remembered: int
) -> Agreement:
    """Does what is new to the head tell what is new to the adapters? Every batch gets its backward here, none a step.

    The first `remembered` batches fill two bases of `gate`'s rank: the gate's own, of sketched head gradients, and one
    of the adapters' whole gradients, (parameters,), unsketched, without the task head's. Both are normalised alike and
    kept by Frequent Directions with the gate's rows and decay. The other batches' novelty is then measured by both.

    Args:
        model: with adapters and a linear head.
        batches: with labels, on the model's device.
        gate: of the model's head, without anything learned yet.
        remembered: how many batches fill the bases.

    Raises:
        ParameterError: no batch is left to be measured, or the gate has learned already.
    """
    from lorakit.head import HeadInput, find_head
    from lorakit.modules import adapter_parameters
    from lorakit.sketches import FrequentDirections

    require(0 < remembered < len(batches), "remembered", remembered, f"must be in 1 to {len(batches) - 1}")
    require(gate.updates == 0, "gate", gate.updates, "must not have learned from a batch yet")
    trained, seen = adapter_parameters(model), HeadInput(find_head(model, gate.kind))
    rows, decay = gate.directions.rows, gate.directions.decay
    whole = FrequentDirections(sum(p.numel() for p in trained), rows, decay=decay, device=gate.device)
    pairs = [_sketch_and_gradient(model, batch, gate, seen, trained) for batch in batches]
    seen.remove()
    for sketch, gradient in pairs[:remembered]:
        gate.update(sketch)
        whole.insert(gradient)
    bases = (gate.directions.basis(gate.k), whole.basis(gate.k))
    values = [[_novelty(basis, z) for basis, z in zip(bases, pair, strict=True)] for pair in pairs[remembered:]]
    return Agreement(*np.array(values).T)


def _sketch_and_gradient(
    model: Any, batch: Mapping[str, torch.Tensor], gate: HeadGradientGate, seen: Any, trained: Sequence[Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one batch: z (m,) and the unit gradient of everything in `trained`, (parameters,)."""
    model.zero_grad()
    outputs = model(**batch)
    outputs.loss.backward()
    logits = outputs.logits.detach()
    z = gate.embed(seen.take(logits), logits, batch["labels"])
    gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained])
    model.zero_grad()
    return z, gradient / gradient.norm().clamp(min=1e-30)


def _novelty(basis: torch.Tensor, vector: torch.Tensor) -> float:
    """1 − ‖W v̂‖² of a basis (k, n) and a vector (n,)."""
    unit = vector.double() / vector.double().norm().clamp(min=1e-300)
    return 1 - float((basis.double() @ unit).square().sum())


def batches(task: Any, size: int, count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """`count` batches of `size` training rows each, shuffled, and shuffled again when they are used up."""
    generator, order = torch.Generator().manual_seed(seed), []
    while len(order) < size * count:
        order += torch.randperm(len(task.train), generator=generator).tolist()
    return [task.collator([task.train[row] for row in order[size * i : size * (i + 1)]]) for i in range(count)]


def agreement(table: Mapping[str, Agreement]) -> Figure:
    """A panel per entry: the novelty the gate sees against that of the true gradient, a point per batch."""
    with style.context():
        drawn = style.figure(3.0)
        axes = np.atleast_1d(drawn.subplots(1, len(table)))
        for ax, (name, found) in zip(axes, table.items(), strict=True):
            ax.plot(found.truth, found.proxy, "o", ms=3, color=style.COLORS[1], alpha=0.6)
            ax.set(xlabel="novelty of the adapters' true gradient", ylabel="novelty as the gate sees it")
            ax.set_title(f"{name}: Spearman {found.spearman:.2f}", loc="left")
    return drawn


# a run, watched ------------------------------------------------------------------------------------


class Step(NamedTuple):
    """What one candidate batch did: accepted, whether a trained weight moved, whether an optimizer's moment did."""

    accepted: bool
    weights_moved: bool
    moments_moved: bool


def trained(given: Mapping[str, Any]) -> Assembled:
    """Model and task of a run, after its training and without any of its measurements."""
    assembled, trainer, folder = _started(given)
    with folder:
        trainer.train()
    assembled.model.eval()
    return assembled


def watched(given: Mapping[str, Any]) -> list[Step]:
    """Train as `given` says and compare, bit by bit, weights and moments around every batch."""
    from transformers import TrainerCallback

    assembled, trainer, folder = _started(given)
    parameters = [p for p in assembled.model.parameters() if p.requires_grad]
    states, steps = [_state(parameters, None)], []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **_):
            states.append(_state(parameters, optimizer))
            before, after = states.pop(0), states[0]
            moved = [not _same(one, other) for one, other in zip(before, after, strict=True)]
            steps.append(Step(trainer.gate_log.decisions[-1], *moved))

    trainer.add_callback(Watch())
    with folder:
        trainer.train()
    return steps


def _started(given: Mapping[str, Any]) -> tuple[Assembled, BudgetTrainer, Any]:
    from lorakit.params import resolve
    from lorakit.runs.assembly import assemble, build_trainer
    from lorakit.runs.experiment import new_record

    params = resolve(dict(given))
    assembled, folder = assemble(params), tempfile.TemporaryDirectory()
    return assembled, build_trainer(assembled, new_record(params, dict(given)), folder.name), folder


def _state(parameters: Sequence[torch.nn.Parameter], optimizer: Any) -> tuple[list[Any], list[Any]]:
    states = optimizer.state_dict()["state"] if optimizer else {}
    moments = [value for state in states.values() for value in state.values() if torch.is_tensor(value)]
    return copy.deepcopy([p.detach() for p in parameters]), copy.deepcopy(moments)


def _same(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def thresholded(controller: ThresholdController, scores: Iterable[float], seed: int) -> list[bool]:
    """Which of a stream of scores `controller` accepts, its coin thrown with `seed`."""
    generator, accepted = torch.Generator().manual_seed(seed), []
    for score in scores:
        coin = torch.rand((), generator=generator, dtype=torch.float64).item()
        accepted.append(coin < controller.probability(score))
        controller.observe(score, accepted[-1])
    return accepted
