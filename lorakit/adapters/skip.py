"""SkipLoRA: an adapter with a small update, M = ‖Δh‖₂ / ‖h‖₂ < τ, is detached: its backward is not done.

h is the base layer's output and Δh the adapter's, both over the batch's valid tokens. Detaching scattered adapters
saves next to nothing, because the gradient still flows through the frozen layers to the first active one; detaching a
*prefix* ends the backward pass early. Related: AutoFreeze (Liu et al. 2021) and Egeria (Wang et al. 2023) freeze
prefixes, LoRA-drop (Zhou et al. 2024) ranks adapters by their outputs, LISA (Pan et al. 2024) draws layers at random.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor, nn

from lorakit.adapters.layer import AdapterLayer
from lorakit.adapters.lora import LoRALayer
from lorakit.errors import LorakitError, ParameterError, require

MODES, DECIDES = ("adapter", "prefix"), ("ema", "forward")


@dataclass(frozen=True)
class SkipSettings:
    """When an adapter is skipped.

    Args:
        mode: "adapter": each one whose M is below the threshold; "prefix": the transformer blocks from the first on as
            long as every adapter in them is below it, which is what shortens the backward pass.
        decide: "ema": before the forward, from a moving average of earlier steps; "forward": from the step's own M,
            as each adapter is reached, which costs a synchronisation per adapter on a GPU.
        threshold: τ, used where `share` is 0.
        share: of adapters to skip: τ is then that quantile of the current M. Of a prefix it is the share of blocks,
            the lowest, whatever they measure: no threshold on a running maximum could tell them otherwise.
        warmup: share of the budget before the first skip. With B = 0 at the start every M is 0.
        min_active: adapters that stay active, those with the largest M (prefix: the last).
        explore: chance per step that a skipped adapter (prefix: the whole prefix) is trained all the same.
        ema: weight of the newest measurement.
        measure_every: steps between measurements where `decide` is "ema".

    Raises:
        ParameterError: naming the run's parameter, `skip` or `skip_…`.
    """

    mode: str = "prefix"
    decide: str = "ema"
    threshold: float = 0.05
    share: float = 0.0
    warmup: float = 0.1
    min_active: int = 1
    explore: float = 0.05
    ema: float = 0.2
    measure_every: int = 4

    def __post_init__(self) -> None:
        require(self.mode in MODES, "skip", self.mode, f"must be one of {', '.join(MODES)}")
        require(self.decide in DECIDES, "skip_decide", self.decide, f"must be one of {', '.join(DECIDES)}")
        require(self.threshold >= 0, "skip_threshold", self.threshold, "must be at least 0")
        require(0 <= self.share < 1, "skip_share", self.share, "must be in [0, 1)")
        require(0 <= self.warmup < 1, "skip_warmup", self.warmup, "must be a share of the run in [0, 1)")
        require(self.min_active >= 1, "skip_min_active", self.min_active, "must be at least 1")
        require(0 <= self.explore <= 1, "skip_explore", self.explore, "must be in [0, 1]")
        require(0 < self.ema <= 1, "skip_ema", self.ema, "must be in (0, 1]")
        require(self.measure_every >= 1, "skip_measure_every", self.measure_every, "must be at least 1")


# which adapters -------------------------------------------------------------------------------------


def choose(metric: Sequence[float], blocks: Sequence[int], settings: SkipSettings, generator: Generator) -> list[bool]:
    """Which adapters are active, from M of each (L,) and the block each is in (L,), both in forward order.

    Always draws the same count of random numbers, so that every process that has the same generator agrees.
    """
    draws = torch.rand(len(metric), generator=generator).tolist()
    if settings.mode == "prefix":
        return _all_but_prefix(metric, blocks, settings, explored=draws[0] < settings.explore)
    tau = threshold(metric, settings)
    active = [m >= tau or draw < settings.explore for m, draw in zip(metric, draws, strict=True)]
    largest = sorted(range(len(metric)), key=lambda place: metric[place], reverse=True)
    for place in largest[: settings.min_active]:
        active[place] = True
    return active


def _all_but_prefix(
    metric: Sequence[float], blocks: Sequence[int], settings: SkipSettings, explored: bool
) -> list[bool]:
    if explored:
        return [True] * len(metric)
    per_block = running_maxima(metric, blocks)
    if settings.share:
        skipped = _count(settings.share, len(per_block))
    else:
        skipped = sum(m < settings.threshold for m in per_block)
    while sum(block >= skipped for block in blocks) < settings.min_active:
        skipped -= 1
    return [block >= skipped for block in blocks]


def running_maxima(metric: Sequence[float], blocks: Sequence[int]) -> list[float]:
    """The largest M in each block or before it: below τ exactly where the whole prefix up to there is."""
    maxima, largest = [], 0.0
    for block in range(max(blocks) + 1):
        largest = max(largest, *(m for m, own in zip(metric, blocks, strict=True) if own == block))
        maxima.append(largest)
    return maxima


def threshold(metric: Sequence[float], settings: SkipSettings) -> float:
    """τ: the fixed one, or the value that `settings.share` of `metric`, rounded down, lie below."""
    if not settings.share:
        return settings.threshold
    return sorted(metric)[_count(settings.share, len(metric))]


def _count(share: float, total: int) -> int:
    return int(share * total + 1e-9)


def block_numbers(paths: Sequence[str]) -> list[int]:
    """The transformer block of each adapter, counted from 0 in forward order; a layer outside is a block of its own."""
    names = []
    for path in paths:
        parts = path.split(".")
        number = next((place for place, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
        names.append(".".join(parts[: number + 1]))
    order = list(dict.fromkeys(names))
    return [order.index(name) for name in names]


# measuring and detaching ----------------------------------------------------------------------------


@dataclass
class Probe:
    """One adapter's switch and meter, called by the layer in its forward.

    Attributes:
        path: of the adapted layer.
        parameters: A and B.
        active: whether A and B get a gradient.
        measuring: whether the coming forwards are measured.
        squares: sums of ‖Δh‖² and ‖h‖² since they were last taken, (2,) on the model's device, or None.
        decide: asked in the forward, where that is how to decide: (this probe) to whether it is active.
        refuse_gradient: an inactive adapter whose input needs a gradient is an error: the cut would be undone.
        valid: (B·T,) weights of the batch's tokens, 1 or 0, or None for all; set for every batch.
    """

    path: str
    parameters: tuple[nn.Parameter, nn.Parameter]
    active: bool = True
    measuring: bool = False
    squares: Tensor | None = None
    decide: Callable[[Probe], bool] | None = None
    refuse_gradient: bool = False
    valid: Tensor | None = None
    fresh: bool = True  # no forward of this batch yet: a recomputation in the backward is not measured again
    handles: list = field(default_factory=list)

    def see(self, h: Tensor, inner: Tensor, B: Tensor, scaling: float) -> None:
        """Take note of h (N, out) and of Δh = scaling · inner Bᵀ, given as inner (N, r) and B (out, r)."""
        if not self.fresh:
            return
        self.fresh = False
        if self.measuring:
            sums = squared_norms(h, inner, B, scaling, self.valid)
            self.squares = sums if self.squares is None else self.squares + sums
        if self.decide is not None:
            self.active = self.decide(self)

    def require_cut(self, x: Tensor) -> None:
        if self.refuse_gradient and not self.active and x.requires_grad:
            raise LorakitError(
                f"skip='prefix': the input of the skipped {self.path} requires a gradient, so the backward pass would "
                "not end there; something below is trained (trainable=…), or enable_input_require_grads() was called "
                "(with gradient checkpointing; use_reentrant=False does without)"
            )


@torch.no_grad()
def squared_norms(h: Tensor, inner: Tensor, B: Tensor, scaling: float, valid: Tensor | None) -> Tensor:
    """‖Δh‖² and ‖h‖² over the valid rows, (2,) fp32, without forming Δh: ‖inner Bᵀ‖² = ⟨innerᵀ inner, Bᵀ B⟩."""
    with torch.autocast(h.device.type, enabled=False):
        h, inner, B = h.detach(), inner.detach().float(), B.detach().float()
        rows = torch.linalg.vector_norm(h, dim=1, dtype=torch.float32).square_()  # (N,)
        if valid is not None and valid.shape[0] == rows.shape[0]:
            rows, inner = rows * valid, inner * valid[:, None]
        update = ((inner.T @ inner) * (B.T @ B)).sum() * scaling**2
        return torch.stack([update.clamp_min(0), rows.sum()])


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
    if not probes:
        raise ParameterError("skip", type(model).__name__, "the model has no LoRA adapter")
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

    def base(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if layer.training and torch.is_grad_enabled():
            seen["h"], seen["x"] = out.detach().reshape(-1, out.shape[-1]), args[0]

    def inner(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        if "h" not in seen:
            return None
        probe.see(seen.pop("h"), out.reshape(-1, out.shape[-1]), B.weight, scaling)
        probe.require_cut(seen.pop("x"))
        return None if probe.active else out.detach()

    def outer(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        return None if probe.active else out.detach()

    for module, hook in ((layer.base_layer, base), (A, inner), (B, outer)):
        probe.handles.append(module.register_forward_hook(hook))
    return probe


def keep_the_cut(model: nn.Module) -> None:
    """Undo what transformers does for gradient checkpointing and what would make a prefix's backward run all the same.

    Enabling checkpointing makes the embeddings' output require a gradient, which only the reentrant kind needs.

    Raises:
        LorakitError: checkpointing is the reentrant kind.
    """
    for module in model.modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and getattr(checkpoint, "keywords", {}).get(
            "use_reentrant"
        ):
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
    for probe in probes:
        probe.active = True
        while probe.handles:
            probe.handles.pop().remove()
