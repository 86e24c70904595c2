"""The linear head of a model and what it is given: h, for the head gradient Σ_t h_t ⊗ e_t."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lorakit.errors import LorakitError

ROWS_CHECKED = 4
TOLERANCE = 0.03  # relative; a head that runs in bfloat16 under autocast is off by 0.004


@dataclass(frozen=True)
class Head:
    """A model's last linear layer. d_hidden: H; outputs: V words or C classes; softcap: None or c of c·tanh(x / c)."""

    module: torch.nn.Module
    d_hidden: int
    outputs: int
    softcap: float | None

    def capped(self, raw: torch.Tensor) -> torch.Tensor:
        """The model's logits, of what its linear layer gives."""
        return raw if self.softcap is None else self.softcap * torch.tanh(raw / self.softcap)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The model's logits (…, V) of hidden states (…, H), float32, by the head itself, adapters and all."""
        return self.capped(self.module(hidden).float())


def find_head(model: torch.nn.Module, kind: str) -> Head:
    """The output embeddings of a language model, or a classifier's last linear layer.

    Raises:
        LorakitError: the model has no such layer.
    """
    module = _classifier(model) if kind == "classify" else model.get_output_embeddings()
    if module is None or getattr(module, "weight", None) is None or module.weight.dim() != 2:
        raise LorakitError(
            f"{type(model).__name__} has no linear output head to read gradients from ({kind}): a gate that looks at "
            "the head gradient needs one; gates 'random' and 'loss_floor' do not"
        )
    outputs, width = module.weight.shape
    return Head(module, width, outputs, getattr(model.config, "final_logit_softcapping", None))


def _classifier(model: torch.nn.Module) -> torch.nn.Module | None:
    """The last linear layer with one output per label that takes part in the forward (PEFT keeps a spare copy)."""
    labels = getattr(model.config, "num_labels", None)
    found = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module.out_features == labels and "original_module" not in name
    ]
    return found[-1] if found else None


class HeadCheck:
    """Recomputes logits from what the head was given: one that does more than a linear map has other gradients."""

    def __init__(self, head: Head):
        self.head, self.checked = head, False

    @torch.no_grad()
    def expected(self, hidden: torch.Tensor) -> torch.Tensor:
        """The linear map of hidden states (…, H), in float32."""
        weight, bias = self.head.module.weight, getattr(self.head.module, "bias", None)
        raw = F.linear(hidden.float(), weight.float(), None if bias is None else bias.float())
        return self.head.capped(raw)

    def __call__(self, hidden: torch.Tensor, logits: torch.Tensor) -> None:
        """Compare the first rows of logits (…, V) with those of hidden (…, H), the first time it is called.

        Raises:
            LorakitError: they differ.
        """
        if self.checked or not hidden.numel():
            return
        width, outputs = hidden.shape[-1], logits.shape[-1]
        if (width, outputs) == (self.head.d_hidden, self.head.outputs):
            rows = slice(0, ROWS_CHECKED)
            given = logits.detach().flatten(0, -2)[rows].float()
            expected = self.expected(hidden.detach().flatten(0, -2)[rows])
            error = (expected - given).norm() / given.norm().clamp(min=1e-12)
            if error < TOLERANCE or not torch.isfinite(given).all():
                self.checked = True
                return
        raise LorakitError(
            f"the logits {tuple(logits.shape)} are not the head's linear map of its input {tuple(hidden.shape)}: its "
            f"gradient would be another (head: {self.head.d_hidden} to {self.head.outputs})"
        )


class HeadInput:
    """Keeps what `head` was given in the last forward pass, detached, until `take`n."""

    def __init__(self, head: Head):
        self.head, self.hidden, self.check = head, None, HeadCheck(head)
        self.handle = head.module.register_forward_pre_hook(self._keep)

    def _keep(self, module: torch.nn.Module, arguments: tuple) -> None:
        self.hidden = arguments[0].detach()

    def take(self, logits: torch.Tensor) -> torch.Tensor:
        """h (B, T, H) of logits (B, T, V), or (B, H) of (B, C), of the forward that has just run.

        Raises:
            LorakitError: the head did not run, or its output is not `logits`.
        """
        hidden, self.hidden = self.hidden, None
        if hidden is None:
            raise LorakitError("the model's forward did not call its output head: no head gradient to gate by")
        if hidden.dim() == logits.dim() + 1:  # a classifier that reads one token of each sequence (GPT-2, Gemma)
            hidden = self._token_read(hidden, logits)
        self.check(hidden, logits)
        return hidden

    def _token_read(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """(B, H) out of (B, T, H): of each sequence the token whose outputs are the logits (B, C)."""
        distance = (self.check.expected(hidden) - logits.float()[:, None]).abs().sum(-1)  # (B, T)
        return hidden[torch.arange(len(hidden), device=hidden.device), distance.argmin(-1)]

    def remove(self) -> None:
        """Take the hook off the model."""
        self.handle.remove()


@contextlib.contextmanager
def replaced_input(head: Head, replace: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """While inside, the head is given `replace(hidden)` for its first input; what it was given is collected."""
    given: list[torch.Tensor] = []

    def hook(_: torch.nn.Module, arguments: tuple) -> tuple | None:
        if given:
            return None  # `replace` itself asks the head for logits
        given.append(arguments[0])
        given[0] = replace(arguments[0])
        return (given[0], *arguments[1:])

    handle = head.module.register_forward_pre_hook(hook)
    try:
        yield given
    finally:
        handle.remove()
