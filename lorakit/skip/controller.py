"""SkipLoRA between the steps of a run: measure and average M of every adapter, choose which are active, keep books."""

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.attachment import is_disabled
from lorakit.adapters.layer import AdapterLayer
from lorakit.adapters.lora import LoRALayer
from lorakit.adapters.probe import Probe
from lorakit.errors import LorakitError, require
from lorakit.seams import Controller
from lorakit.settings import BY_SHARE, SkipSettings
from lorakit.skip.choice import block_numbers, choose, threshold


class SkipLoRA(Controller):
    """Skips LoRA adapters, lorakit's or PEFT's, whose update is small; inference stays that of LoRA.

    Without lorakit's trainer: `begin()`, then for each optimizer step `begin_step(share of the run done)`, forward,
    backward, `optimizer.step()`, `after_step(share, optimizer)`, `zero_grad()`; at last `end()`. On the
    Hugging Face Trainer: `SLoRATrainer(…, controllers=[skip])`. A decision holds for a whole optimizer step, however
    many batches it accumulates, and is the same in every process (under DistributedDataParallel with
    `find_unused_parameters=True`).

    Args:
        model: has LoRA attached.
        settings: see `SkipSettings`; `skip` is "adapter" or "prefix".
        seed: of the exploration, the same in every process.

    Raises:
        ParameterError: no adapter that can be skipped, or fewer than `settings.skip_min_active`.
    """

    name = "skip"
    kept = ("metric", "steps", "skipped", "history", "since_point", "generator")

    def __init__(self, model: nn.Module, settings: SkipSettings, seed: int = 0):
        self.model, self.settings = model, settings
        self.probes = probe_model(model)
        self.paths = [probe.path for probe in self.probes]
        self.blocks = block_numbers(self.paths)
        least, most = settings.skip_min_active, len(self.probes)
        require(least <= most, "skip_min_active", least, f"the model has {most} adapters")
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
        asked = self.settings
        by_share = asked.skip == "prefix" and asked.skip_share > 0 and asked.skip_decide == "ema"
        require(by_share, "gating.mode", "fractional", BY_SHARE)
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
        in_forward, self._warm = self.settings.skip_decide == "forward", share < self.settings.skip_warmup
        warm = self._warm
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
            unseen = [path for path, m in zip(self.paths, self.metric or [], strict=False) if m is None]
            if unseen:
                warnings.warn(f"never skipped, since no forward called them: {', '.join(unseen)}", stacklevel=2)
        remove_probes(self.model, self.probes)

    def signature(self) -> Hashable:
        return ("".join("01"[probe.active] for probe in self.probes), self.probes[0].measuring)

    def report(self) -> dict[str, Any]:
        share = sum(self.skipped) / max(1, self.steps * len(self.probes))
        return {
            "adapters": self.paths,
            "blocks": self.blocks,
            "share_skipped": share,
            "share_skipped_per_adapter": [round(count / max(1, self.steps), 4) for count in self.skipped],
            "history": self.history,
        }

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
        tau = threshold([metric for metric in self.metric or [] if metric is not None], self.settings)
        needed = self.settings.skip_min_active - sum(before) >= len(self.probes) - place
        cut_ended = self.settings.skip == "prefix" and any(before)
        return m is None or m >= tau or needed or cut_ended or self._forced[place]

    def _chosen(self, metric: list[float | None]) -> list[bool]:
        """Which adapters are active: of those that a forward has visited, as if there were no others."""
        seen = [place for place, m in enumerate(metric) if m is not None]
        names = sorted({self.blocks[place] for place in seen})
        given = [metric[place] for place in seen], [names.index(self.blocks[place]) for place in seen]
        active = choose(*given, self.settings, self.generator)
        chosen = dict(zip(seen, active, strict=True))
        return [chosen.get(place, True) for place in range(len(metric))]

    def _measured(self, probes: list[Probe]) -> list[float | None]:
        """M of each adapter over the batches since the step began, of all processes; None: no forward visited it."""
        seen = [probe.squares for probe in probes if probe.squares is not None]
        nothing = torch.zeros_like(seen[0]) if seen else torch.zeros(2)
        squares = [nothing if probe.squares is None else probe.squares for probe in probes]
        squares = torch.stack(squares).double().cpu()
        update, output = self._sum(squares.flatten()).view(-1, 2).T
        means = (update / output.clamp_min(1e-30)).sqrt().tolist()
        return [mean if visited else None for mean, visited in zip(means, (output > 0).tolist(), strict=True)]


# probes on a model -------------------------------------------------------------------------------------


def probe_model(model: nn.Module) -> list[Probe]:
    """Give every LoRA adapter of `model`, lorakit's or PEFT's, a probe; in the order of the model's modules.

    Raises:
        ParameterError: there is none, or one whose update is no term of its own (HiRA, DoRA, …).
    """
    probes = []
    for path, module in model.named_modules():
        if isinstance(module, AdapterLayer):
            require(isinstance(module, LoRALayer), "skip", path, f"cannot skip a {type(module).__name__}")
            module.probe = Probe(path, (module.lora_A, module.lora_B))
            probes.append(module.probe)
        elif type(module).__module__.startswith("peft.tuners.lora.") and hasattr(module, "lora_variant"):
            probes.append(_probe_peft(path, module))
    require(probes != [], "skip", type(model).__name__, "the model has no LoRA adapter")
    return probes


def _probe_peft(path: str, layer: nn.Module) -> Probe:
    """Hooks on a PEFT LoRA layer: its base gives h, its A the inner values, its B's output is what is detached."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    require(len(names) == 1, "skip", path, f"needs one active PEFT LoRA adapter per layer, has {len(names)}")
    (name,) = names
    require(name not in layer.lora_variant, "skip", path, "cannot skip a LoRA variant (DoRA, …)")
    A, B, scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
    require(isinstance(A, nn.Linear), "skip", path, "can skip PEFT LoRA on linear layers only")
    probe, seen = Probe(path, (A.weight, B.weight)), {}
    layer.probe = probe  # for who asks what rests

    def base(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if layer.training and torch.is_grad_enabled():
            seen["h"], seen["x"] = out.detach().reshape(-1, out.shape[-1]), args[0]

    def inner(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        if "h" not in seen:
            return None
        probe.see(seen.pop("h"), out.reshape(-1, out.shape[-1]), B.weight, scaling)
        probe.require_cut(seen.pop("x"))
        return None if probe.active else out.detach()

    cut = (B, lambda _, args, out: None if probe.active else out.detach())
    for module, hook in ((layer.base_layer, base), (A, inner), cut):
        probe.handles.append(module.register_forward_hook(hook))
    return probe


def keep_the_cut(model: nn.Module) -> None:
    """Undo what transformers does for gradient checkpointing and what would make a prefix's backward run all the same.

    Enabling checkpointing makes the embeddings' output require a gradient, which only the reentrant kind needs.

    Raises:
        LorakitError: checkpointing is the reentrant kind.
    """
    for module in model.modules():
        options = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
        if getattr(module, "gradient_checkpointing", False) and options.get("use_reentrant"):
            raise LorakitError(
                "skip='prefix': reentrant checkpointing undoes the cut; enable it with use_reentrant=False"
            )
    for module in model.modules():
        if getattr(module, "_require_grads_hooks", None):
            module.disable_input_require_grads()


def remove_probes(model: nn.Module, probes: Sequence[Probe]) -> None:
    """Take the probes off: every adapter is trained again, and inference is that of plain LoRA."""
    for module in model.modules():
        if isinstance(module, LoRALayer):
            module.probe = None
        elif getattr(module, "probe", None) in probes:
            del module.probe
    for probe in probes:
        probe.active = True
        while probe.handles:
            probe.handles.pop().remove()
