"""The loss of predictions from what the head is given: their logits exist a chunk at a time, their gradient with them.

A plain step makes the logits (N, V) of N predictions and keeps them. Here, where the head is frozen, ∂/∂h = e·W with
e = softmax − onehot is made in the pass that makes the loss: 4·N·V·H FLOPs, and nothing is left for the backward. (TRL
and cut-cross-entropy make the logits anew in the backward, 6·N·V·H; Liger's kernel makes the gradient at once too.)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorakit.errors import LorakitError, ParameterError, require, retold
from lorakit.head import ROWS_CHECKED, Head, has_virtual_tokens, replaced_input, rows, same_loss, takes_labels, weighted
from lorakit.settings import TokenSettings
from lorakit.sketches.head_gradient import error_in_place, group_maxima

BYTES = {True: 6, False: 16}  # of a logit at work, by whether the head is frozen: float32, and 16 bits before or after
CAPPED = 8  # bytes more where it is capped or scaled
KEPT = 2  # times that for logits that are kept
SLICE = 2**21  # logits whose softmax is found at once, in float32: 8 MiB, which a processor's cache holds
HALF = 256.0  # fp16: errors are multiplied by it before they are rounded, or those of rare words would be 0

Plan = Literal["keep", "again", "now"]


def cheapest(used: float, looked: int, kept_bytes: float, room: float) -> Plan:
    """How the gradient of the rows that will be used comes about, after all logits were made to be looked at.

    Looking costs 2·N·V·H FLOPs for N rows. Of k rows that are used (the expected number, where a gate may reject all),
    "keep" multiplies the kept logits' errors with W: 2·k·V·H; "again" makes the logits anew first: 4·k·V·H; "now"
    makes all rows' gradient while looking: 2·N·V·H, before it is known who will be used. So what fits is kept, and
    else "now" wins for k > N / 2.

    Args:
        used: k; looked: N; kept_bytes: of the logits that would be kept; room: for them.
    """
    return "keep" if kept_bytes <= room else "again" if used <= looked / 2 else "now"


@dataclass(frozen=True)
class HeadLoss:
    """Σ of the losses of predictions whose last states are given.

    "exact", and what stands for "nll" of chosen tokens: as above. "dft": each loss times its own token's probability,
    detached (Wu et al. 2025). "liger": Liger's kernel.

    Args:
        head: of the model; settings: `loss` says which, `logits_mib` what a chunk's logits may take.
        smoothing: of the labels, in [0, 1).

    Raises:
        ParameterError: no row of logits fits `logits_mib`; label smoothing with "dft"; "liger" where it is not.
    """

    head: Head
    settings: TokenSettings
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        name = self.settings.loss
        fits = f"must be at least {self.row_bytes / 2**20:.3g}: one row of {self.head.outputs} words"
        require(self.room >= self.row_bytes, "logits_mib", self.settings.logits_mib, fits)
        smoothed = f"weighs each token by its own probability: no label_smoothing_factor={self.smoothing}"
        require(name != "dft" or not self.smoothing, "loss", name, smoothed)
        if name == "liger":
            liger(self.head, self.smoothing)

    @property
    def room(self) -> float:
        """Bytes for a chunk's logits."""
        return self.settings.logits_mib * 2**20

    @property
    def is_fixed(self) -> bool:
        """Whether the gradient is a formula: of a frozen linear head, labels as they are."""
        return self.head.is_fixed and not self.smoothing

    @property
    def row_bytes(self) -> int:
        """Bytes of one prediction's logits at work."""
        changed = self.head.softcap is not None or self.head.scale != 1
        return (BYTES[self.is_fixed] + CAPPED * changed) * self.head.outputs

    @property
    def chunk(self) -> int:
        """Predictions at a time."""
        return int(self.room / self.row_bytes)

    @property
    def few(self) -> int:
        """Predictions of a chunk whose softmax is found at once where only its errors are needed."""
        return max(1, min(SLICE // self.head.outputs, self.chunk // 8))

    def wide(self, weight: Tensor) -> int:
        """Predictions at a time, in as many bytes, where errors overwrite what `weight` (V, H) gives, few by few."""
        work = self.row_bytes // self.head.outputs
        return max(1, (work * self.chunk - (work - 2) * self.few) // weight.element_size())

    def __call__(self, states: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Σ weight · loss, () float32, of states (N, H), targets (N,) and weights (N,) or none."""
        if self.settings.loss == "liger":
            return liger(self.head, self.smoothing)(self.head.module.weight, states, targets, self.head.module.bias)
        trained = [p for p in self.head.module.parameters() if p.requires_grad]
        if not (torch.is_grad_enabled() and (states.requires_grad or trained)):
            return weighted(self.weighed(self.nll(states, targets, self.smoothing)), weights).sum().float()
        return _Sum.apply(self, states, targets, weights, *trained)

    def weighed(self, losses: Tensor) -> Tensor:
        """Negative log-likelihoods (n,) as they count."""
        return losses * torch.exp(-losses.detach()) if self.settings.loss == "dft" else losses

    def nll(self, states: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """Negative log-likelihoods (N,) of states (N, H) and targets (N,), without a graph."""
        return torch.cat([losses for losses, _ in self.losses(states, targets, smoothing)] or [states[:0, 0].detach()])

    @torch.no_grad()
    def losses(self, states: Tensor, targets: Tensor, smoothing: float = 0.0) -> Iterator[tuple[Tensor, Tensor]]:
        """Negative log-likelihoods (n,), and whether the word was predicted right (n,), of chunk after chunk."""
        run, _ = self.runner(states.device)
        for h, y in self.parts(states, targets):
            logits = self.head.capped(run(h).float())
            yield likelihoods(logits, y, smoothing)[0], logits.argmax(-1) == y
            del logits

    def parts(self, states: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """States (n, H) and targets (n,), chunk by chunk."""
        return ((h, y) for h, y in zip(states.split(self.chunk), targets.split(self.chunk), strict=True) if len(h))

    def runner(self, device: torch.device) -> tuple[Callable[[Tensor], Tensor], Tensor | None]:
        """The head, (n, H) to (n, V) in its own precision, and of a frozen one the weight that this takes.

        Under autocast that is cast here, not for every chunk.
        """
        module, kind = self.head.module, device.type
        if not self.head.is_fixed:  # an adapter's weight is made when asked for
            return module, None
        half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else module.weight.dtype
        if module.weight.dtype == half:
            return module, module.weight
        cast = {name: parameter.to(half) for name, parameter in module.named_parameters()}
        return (lambda h: torch.func.functional_call(module, cast, (h,))), cast["weight"]

    @torch.no_grad()
    def gradient(self, raw: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (n,) and their gradient by a frozen head's input (n, H), float32.

        Args:
            raw: the head's results (n, V), overwritten; targets: (n,); weight: (V, H) in their precision.
        """
        half = weight.dtype == torch.float16  # in which s·e may be too large
        copies = raw.new_empty(self.few * (raw.dtype != torch.float32), raw.shape[1], dtype=torch.float32)

        def overwritten(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.head.capped(copies[: len(z)].copy_(z) if len(copies) else z)
            error, scale, losses = error_in_place(logits, y, self.head.softcap)
            z.copy_(error.mul_(HALF / scale[:, None]) if half else error)
            return losses, scale

        found = map(overwritten, raw.split(self.few), targets.split(self.few))
        losses, scale = map(torch.cat, zip(*found, strict=True))
        gradient = (raw @ weight).float() * (self.head.scale / (HALF if half else scale[:, None]))
        if self.settings.loss == "dft":
            gradient *= torch.exp(-losses)[:, None]
        return self.weighed(losses), gradient

    def formula(self, device: torch.device) -> tuple[Callable[..., tuple[Tensor, list[Tensor]]], int]:
        """As `learnt`, of a frozen head: by `gradient`; and of how many predictions at a time."""
        run, weight = self.runner(device)

        def made(h: Tensor, targets: Tensor, weights: Tensor | None) -> tuple[Tensor, list[Tensor]]:
            losses, found = self.gradient(run(h), targets, weight)
            return weighted(losses, weights).sum(), [weighted(found, weights)]

        return made, self.wide(weight)

    def learnt(
        self, h: Tensor, targets: Tensor, weights: Tensor | None, trained: Sequence[nn.Parameter]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Σ weight · loss of a chunk, and its gradients by its states and by what is `trained` of the head."""
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            raw = self.head.module(h)
            losses = F.cross_entropy(
                self.head.capped(raw.float()), targets, reduction="none", label_smoothing=self.smoothing
            )
            total = weighted(self.weighed(losses), weights).sum()
            up = HALF if raw.dtype == torch.float16 else 1.0
            del raw, losses
            found = torch.autograd.grad(total * up, [h, *trained], allow_unused=True)
        return total.detach(), [None if grad is None else grad.float() / up for grad in found]


class _Sum(torch.autograd.Function):
    """What `HeadLoss` gives, with its gradients made on the way."""

    @staticmethod
    def forward(
        ctx: Any, loss: HeadLoss, states: Tensor, targets: Tensor, weights: Tensor | None, *trained: nn.Parameter
    ) -> Tensor:
        total = states.new_zeros((), dtype=torch.float32)
        sums: list[Tensor | None] = [None] * len(trained)
        gradient, first = torch.empty(states.shape, dtype=torch.float32, device=states.device), 0
        made, size = partial(loss.learnt, trained=trained), loss.chunk
        if loss.is_fixed:
            made, size = loss.formula(states.device)
        size = -(-len(targets) // max(1, -(-len(targets) // size)))  # as many chunks, all as large
        for h, y in zip(states.split(size), targets.split(size), strict=True):
            part = slice(first, first := first + len(y))
            value, (gradient[part], *new) = made(h, y, None if weights is None else weights[part])
            total += value
            sums = [a if b is None else b if a is None else a + b for a, b in zip(sums, new, strict=True)]
        ctx.save_for_backward(gradient)
        ctx.sums, ctx.dtypes = sums, (states.dtype, [p.dtype for p in trained])
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upper: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (dtype, dtypes) = ctx.saved_tensors, ctx.dtypes
        own = [None if s is None else (s * upper).to(d) for s, d in zip(ctx.sums, dtypes, strict=True)]
        return None, (gradient * upper).to(dtype), None, None, *own


@torch.no_grad()
def likelihoods(logits: Tensor, targets: Tensor, smoothing: float = 0.0, grouped: bool = False) -> tuple[Tensor, ...]:
    """Negative log-likelihoods (n,) of logits (n, V) float32, a few rows at a time; if `grouped` also `group_maxima`.

    Those cost little here: the softmax begins with each row's largest logit, and the largest of them is that.
    """
    rows = max(1, SLICE // 2 // logits.shape[1])  # the cache holds what is made of them as well
    work, found = torch.empty_like(logits[:rows]), []  # one for all: memory that is new each time costs page faults
    for z, y in zip(logits.split(rows), targets.split(rows), strict=True):
        maxima = [group_maxima(z)] if grouped else []
        shifted = torch.sub(z, (maxima or [z])[0].amax(1, keepdim=True), out=work[: len(z)])
        gold = shifted.gather(1, y[:, None]).squeeze(1)
        gold = (1 - smoothing) * gold + smoothing * shifted.mean(1) if smoothing else gold
        found.append((shifted.exp_().sum(1).log_() - gold, *maxima))
    return tuple(map(torch.cat, zip(*found, strict=True)))


def words(states: Tensor, labels: Tensor) -> Tensor:
    """Of states (B, v + T, …), of which v are virtual tokens', those of the words with labels (B, T): (B·T, …)."""
    return states[:, -labels.shape[1] :].flatten(0, 1)


def require_plain_loss(loss: HeadLoss, model: nn.Module, inputs: Mapping[str, Any], labels: Tensor, kind: str) -> None:
    """Try on `inputs` and `labels` (1, T) of one row whether `model` makes its loss as `loss` does.

    Raises:
        LorakitError: its logits are not its head's linear map, its own loss not their cross-entropy.
    """
    remedy = "; where no tokens are chosen, loss 'nll' takes what the model makes"
    few = min(ROWS_CHECKED, length := labels.shape[1])
    labelled = takes_labels(model) and not has_virtual_tokens(model)  # which makes labels of those too
    own = {"labels": torch.arange(few, device=labels.device)[None]} if labelled else {}
    try:
        with replaced_input(loss.head, lambda hidden: hidden[:, : hidden.shape[1] - length + few]) as given:
            outputs = model(**inputs, **own)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        told = f"{type(model).__name__} cannot work where its head is given fewer states"
        raise LorakitError(f"{told} ({' '.join(str(error).split())}){remedy}") from error
    if not given:
        raise LorakitError(f"the model's forward did not call its output head: there is nothing to select{remedy}")
    loss.head.check(given[0][:, -few:], outputs.logits[:, -few:], remedy)
    if own and outputs.loss is not None and few > 1:
        where, targets = rows(own["labels"], kind)
        mean = F.cross_entropy(outputs.logits.flatten(0, 1)[where].float(), targets)
        if not same_loss(outputs.loss, mean):
            told = f"its own loss is {float(outputs.loss):.4g}, the mean cross-entropy of its labels {float(mean):.4g}"
            only = f"loss {loss.settings.loss!r} and chosen tokens know the latter only"
            off = "take off what it adds or puts in its place (loss_function, router losses)"
            raise LorakitError(f"{type(model).__name__}: {told}: {only}; {off}{remedy}")


def liger(head: Head, smoothing: float) -> Any:
    """Liger's fused loss for `head`, summed.

    Raises:
        ParameterError: it is not installed, or the head is not on CUDA.
    """
    with retold(ImportError, ParameterError, "loss", "liger", "needs the package liger-kernel; 'exact' needs none"):
        made = import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss
    require(type(head.module) is nn.Linear, "loss", "liger", "knows a linear head only, no adapter on it; 'exact' does")
    require(head.scale == 1, "loss", "liger", "knows no scale of logits; 'exact' does")
    require(head.module.weight.is_cuda, "loss", "liger", "needs the model on CUDA; 'exact' needs none")
    return made(reduction="sum", softcap=head.softcap, label_smoothing=smoothing)
