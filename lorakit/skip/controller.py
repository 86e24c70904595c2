"""SkipLoRA between the steps of a run: measure and average M of every adapter, choose which are active, keep books."""

import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from lorakit.adapters.attachment import is_disabled
from lorakit.adapters.probe import Probe
from lorakit.errors import require
from lorakit.seams import Controller
from lorakit.settings import BY_SHARE, SkipSettings
from lorakit.skip import choice
from lorakit.skip.probes import keep_the_cut, probe_model, remove_probes


class SkipLoRA(Controller, TrainerCallback):
    """Skips LoRA adapters, lorakit's or PEFT's, whose update is small; inference stays that of LoRA.

    On the Hugging Face Trainer: `Trainer(…, callbacks=[SkipLoRA(model)])`. With a gate, in several processes or where
    a resumed run must be bitwise the same: `SLoRATrainer(…, controllers=[skip])`. In a loop of one's own: `begin()`,
    then for each optimizer step `begin_step(share of the run done)`, forward, backward, `optimizer.step()`,
    `after_step(share, optimizer)`, `zero_grad()`; at last `end()`. A decision holds for a whole optimizer step, however
    many batches it accumulates, and is the same in every process (under DistributedDataParallel with
    `find_unused_parameters=True`).

    Args:
        model: has LoRA attached.
        threshold: an adapter whose M = ‖Δh‖/‖h‖ is below it is skipped; or thresholds by name (a path, the end of one,
            or a regular expression of a whole one; the first that fits counts), all other adapters never being skipped.
        decide: "forward", by M of this very batch; or "ema", by an average, before the step.
        skip: "adapter", each whose M is below its threshold; "prefix": the first blocks while every adapter in them is,
            which ends the backward pass early. A `skip_share` makes the threshold that quantile of the current M; of a
            prefix it is the share of blocks, whatever they measure.
        seed: of the exploration, the same in every process.
        settings: in place of all these and `others`: what a run is told, see `SkipSettings`.
        others: `SkipSettings`' without the prefix: warmup (a tenth of the run: at its start every M is 0), explore, ….

    Raises:
        ParameterError: no adapter that can be skipped, or fewer than `skip_min_active`; a name that none has.
    """

    name = "skip"
    kept = ("metric", "steps", "skipped", "history", "since_point", "generator")

    def __init__(
        self,
        model: nn.Module,
        threshold: float | dict[str, float] = 0.05,
        decide: str = "forward",
        *,
        skip: str = "adapter",
        seed: int = 0,
        settings: SkipSettings | None = None,
        **others: Any,
    ):
        if settings is None:
            named = {f"skip_{name}": value for name, value in others.items()}
            settings = SkipSettings(skip=skip, skip_threshold=threshold, skip_decide=decide, **named)
        require(settings.skip != "none", "skip", settings.skip, "must be adapter or prefix")
        self.model, self.settings = model, settings
        self.probes = probe_model(model)
        self.paths = [probe.path for probe in self.probes]
        self.blocks = choice.block_numbers(self.paths)
        least, most = settings.skip_min_active, len(self.probes)
        require(least <= most, "skip_min_active", least, f"the model has {most} adapters")
        by_name = settings.skip_threshold if isinstance(settings.skip_threshold, dict) else {}
        require(not by_name or not settings.skip_share, "skip_threshold", by_name, "by name is for skip_share 0")
        for name in by_name:
            found = any(choice.named(name, path) for path in self.paths)
            require(found, "skip_threshold", name, f"no adapter is called so; there are {', '.join(self.paths)}")
        self.generator = torch.Generator().manual_seed(seed)
        # M of each adapter, averaged; None before the first measurement, and of one that no forward has visited yet
        self.metric: list[float | None] | None = None
        self.steps = 0
        self.skipped = [0] * most  # steps each adapter was skipped
        self.history: dict[str, list[Any]] = {"step": [], "metric": [], "active": []}
        self.since_point = (0, [0] * most)  # steps and skips at the last point of the curve
        self._handle: Any = None
        self._sum: Callable[[Tensor], Tensor] = lambda vector: vector
        self._forced: list[bool] = []
        self._warm = self.measures = True
        remove_probes(model, self.probes)

    # the trainer's calls -------------------------------------------------------------------------------

    def bind(self, total_over_ranks: Callable[[Tensor], Tensor]) -> None:
        self._sum = total_over_ranks

    def bind_two_passes(self) -> None:
        require(self.settings.by_share, "gating.mode", "fractional", BY_SHARE)
        self.measures = False

    def begin(self) -> None:
        if self._handle is None:
            self.probes = probe_model(self.model)
            self._handle = self.model.register_forward_pre_hook(self._new_batch, with_kwargs=True)
        if self.settings.skip == "prefix":
            keep_the_cut(self.model)
            for probe in self.probes:
                probe.refuse_gradient = True

    def begin_step(self, share: float) -> None:
        self._warm = warm = share < self.settings.skip_warmup
        of_blocks = self.settings.skip == "prefix" and self.settings.skip_share > 0  # known without a measurement
        in_forward = self.settings.skip_decide == "forward" and not of_blocks
        measuring = self.measures and (in_forward or warm or self.steps % self.settings.skip_measure_every == 0)
        active = [True] * len(self.probes)
        if not warm and not in_forward and (self.metric is not None or not self.measures):
            active = self._chosen(self.metric or [0.0] * len(self.probes))
        if in_forward and not warm:
            draws = torch.rand(len(self.probes), generator=self.generator).tolist()
            explored = draws if self.settings.skip == "adapter" else [draws[0]] * len(draws)
            self._forced = [draw < self.settings.skip_explore for draw in explored]
        for probe, on in zip(self.probes, active, strict=True):
            probe.active, probe.measuring, probe.squares = on, measuring, None
            probe.decide = self._decide if in_forward and not warm else None
            for parameter in probe.parameters:
                parameter.grad = None  # a gradient of zeros would still be a step of AdamW

    def after_step(self, share: float, optimizer: torch.optim.Optimizer) -> None:
        self.steps += 1
        for place, probe in enumerate(self.probes):
            self.skipped[place] += not probe.active
        if any(probe.measuring for probe in self.probes):
            measured = self._measured(self.probes)
            # while B still grows from zero an average would lag behind
            rate = self.settings.skip_ema if self.metric and not self._warm else 1.0
            pairs = zip(self.metric or measured, measured, strict=True)
            known = [new if old is None else old if new is None else old + rate * (new - old) for old, new in pairs]
            self.metric = known if any(m is not None for m in known) else None

    def at_point(self, step: int) -> None:
        since, skips = self.since_point
        steps = max(1, self.steps - since)
        active = [1 - (now - before) / steps for now, before in zip(self.skipped, skips, strict=True)]
        self.since_point = (self.steps, list(self.skipped))
        self.history["step"].append(step)
        self.history["metric"].append([round(m or 0.0, 6) for m in self.metric or []])
        self.history["active"].append([round(a, 4) for a in active])

    def end(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
            if unseen := [path for path, m in zip(self.paths, self.metric or [], strict=False) if m is None]:
                warnings.warn(f"never skipped, since no forward called them: {', '.join(unseen)}", stacklevel=2)
        remove_probes(self.model, self.probes)

    def signature(self) -> Hashable:
        return ("".join("01"[probe.active] for probe in self.probes), self.probes[0].measuring)

    def report(self) -> dict[str, Any]:
        told = {"share_skipped": sum(self.skipped) / max(1, self.steps * len(self.probes))}
        told["share_skipped_per_adapter"] = [round(count / max(1, self.steps), 4) for count in self.skipped]
        return {"adapters": self.paths, "blocks": self.blocks, **told, "history": self.history}

    # the Hugging Face Trainer's ------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        told = "several processes decide together in SLoRATrainer(…, controllers=[SkipLoRA(…)])"
        require(args.world_size == 1 and args.n_gpu <= 1, "callbacks", "SkipLoRA", told)
        self.begin()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.begin_step(state.global_step / state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self.after_step(state.global_step / state.max_steps, optimizer)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.end()

    # inside a step -------------------------------------------------------------------------------------

    def _new_batch(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_disabled(model):
            return
        mask = kwargs.get("attention_mask")
        valid = mask.reshape(-1).float() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        for probe in self.probes:
            probe.valid, probe.fresh = valid, True

    def _decide(self, probe: Probe) -> bool:
        """In the forward: whether the adapter just measured is active; later batches of the step keep to it."""
        probe.decide = None
        place = self.probes.index(probe)
        before = [other.active for other in self.probes[:place] if other.squares is not None]  # visited before
        (m,) = self._measured([probe])
        known = [metric for metric in self.metric or [] if metric is not None]
        tau = choice.threshold(known, self.settings, probe.path)
        needed = self.settings.skip_min_active - sum(before) >= len(self.probes) - place
        cut_ended = self.settings.skip == "prefix" and any(before)
        return m is None or m >= tau or needed or cut_ended or self._forced[place]

    def _chosen(self, metric: list[float | None]) -> list[bool]:
        """Which adapters are active: of those that a forward has visited, as if there were no others."""
        seen = [place for place, m in enumerate(metric) if m is not None]
        names = sorted({self.blocks[place] for place in seen})
        given = [metric[place] for place in seen], [names.index(self.blocks[place]) for place in seen]
        active = choice.choose(*given, self.settings, self.generator, [self.paths[place] for place in seen])
        chosen = dict(zip(seen, active, strict=True))
        return [chosen.get(place, True) for place in range(len(metric))]

    def _measured(self, probes: list[Probe]) -> list[float | None]:
        """M of each adapter over the batches since the step began, of all processes; None: no forward visited it."""
        seen = [probe.squares for probe in probes if probe.squares is not None]
        nothing = torch.zeros_like(seen[0]) if seen else torch.zeros(2)
        squares = torch.stack([nothing if probe.squares is None else probe.squares for probe in probes]).double().cpu()
        update, output = self._sum(squares.flatten()).view(-1, 2).T
        means = (update / output.clamp_min(1e-30)).sqrt().tolist()
        return [mean if visited else None for mean, visited in zip(means, (output > 0).tolist(), strict=True)]
