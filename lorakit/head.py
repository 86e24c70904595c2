"""A model's head: which layer it is, what it is given, which labels it predicts, and of which kind the model is."""

import contextlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.errors import LorakitError, require

IGNORED = -100  # of a label: nothing is predicted there
KINDS = ("causal", "masked", "classify")
# which class of transformers is of which kind
NAMED = {"ForSequenceClassification": "classify", "ForMaskedLM": "masked", "ForCausalLM": "causal", "LMHead": "causal"}
HEADED = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice|NextSentencePrediction|XVector)")
MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")  # of logits, in configs (Cohere, Falcon-H1, …)
ROWS_CHECKED = 4
TOLERANCE = 0.03  # relative; a head that runs in bfloat16 under autocast is off by 0.004


# the kind and the labels -------------------------------------------------------------------------------


def kind_of(model: nn.Module) -> str:
    """ "classify", "masked" or "causal", from the class of `model` (under PEFT's wrapper); empty: none of them."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return next((kind for part, kind in NAMED.items() if part in type(base).__name__), "")


def takes_labels(model: nn.Module) -> bool:
    """Whether the forward of `model` (under PEFT's wrapper) has a place for labels, and so a loss of its own."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "labels" in inspect.signature(type(base).forward).parameters


def has_virtual_tokens(model: nn.Module) -> bool:
    """Whether a method of PEFT puts tokens of its own before those that `model` is given."""
    return any(getattr(config, "is_prompt_learning", False) for config in getattr(model, "peft_config", {}).values())


def same_loss(own: Tensor, mean: Tensor) -> bool:
    """Whether a model's own loss is the mean cross-entropy of its labels, but for rounding in the own one's dtype."""
    tolerance = 2e-5 if own.dtype in (torch.float32, torch.float64) else 2e-2
    return torch.allclose(own.float(), mean.float(), rtol=tolerance, atol=1e-6, equal_nan=True)


def shifted(labels: Tensor, kind: str) -> Tensor:
    """Labels (B, T) where they are predicted: for kind "causal" the logits at t predict the label at t + 1."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED) if kind == "causal" else labels


def rows(labels: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Where predictions are made: flat positions (N,) and what is predicted there (N,), labels of -100 dropped.

    Args:
        labels: (B, T), or (B,) for "classify".
        kind: "causal": position t predicts label t + 1; "masked" and "classify": its own.

    Raises:
        ParameterError: `kind` is none of these, or the shape of `labels` does not go with it.
    """
    require(kind in KINDS, "kind", kind, f"must be one of {', '.join(KINDS)}")
    dimensions = 1 if kind == "classify" else 2
    require(labels.ndim == dimensions, "labels", tuple(labels.shape), f"must have {dimensions} dimension(s)")
    flat = shifted(labels, kind).reshape(-1)
    positions = (flat != IGNORED).nonzero().squeeze(1)
    return positions, flat[positions]


def require_words(targets: Tensor, words: int) -> None:
    """Refuse labels (N,) of predictions that are none of `words`."""
    if len(targets):
        low, high = (int(bound) for bound in targets.aminmax())
        require(low >= 0 and high < words, "labels", (low, high), f"must be from 0 to {words - 1}, or {IGNORED}")


def fullest_row(inputs: Mapping[str, Any], labels: Tensor, kind: str) -> tuple[dict[str, Any], Tensor]:
    """Of a batch the row in which most is predicted: its inputs, and its labels (1, T) or (1,)."""
    counts = (shifted(labels, kind).reshape(len(labels), -1) != IGNORED).sum(1)
    row = slice(first := int(counts.argmax()), first + 1)
    batched = {name for name, value in inputs.items() if torch.is_tensor(value) and len(value) == len(labels)}
    return {name: value[row] if name in batched else value for name, value in inputs.items()}, labels[row]


def weighted(values: Tensor, weights: Tensor | None) -> Tensor:
    """Values (n,) or (n, H) times weights (n,), where there are some."""
    return values if weights is None else values * weights.view(-1, *[1] * (values.ndim - 1))


def by_sequence(parts: Iterable[tuple[Tensor, Tensor]], where: Tensor, shape: torch.Size) -> Tensor:
    """(B, 4) float64 of each sequence: Σ of losses, predictions, how many were right, predictions.

    Args:
        parts: losses (n,) and whether each was predicted right (n,), chunk after chunk of the predictions at `where`
            (N,) of the flattened (B, T), which is `shape`.
    """
    sums, first = torch.zeros(shape[0], 4, dtype=torch.float64, device=where.device), 0
    for losses, right in parts:
        sequence = where[first : first + len(losses)] // shape[1]
        ones = torch.ones_like(losses)
        sums.index_add_(0, sequence, torch.stack([losses, ones, right.to(losses.dtype), ones], dim=1).double())
        first += len(losses)
    return sums


# where the head is -------------------------------------------------------------------------------------


def output_head(model: nn.Module) -> list[str]:
    """Path of the output embeddings of a language model; empty for every other model."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return [path for path, module in model.named_modules() if module is head]


def task_head(model: nn.Module) -> list[str]:
    """Paths of the task head of a transformers model: what has parameters and stands outside `base_model_prefix`.

    BERT `classifier`; DistilBERT `pre_classifier`, `classifier`; GPT-2 and Gemma `score`. Where no child is called so
    (CLIP, Siglip, T5): what follows the last part that is a transformers model, or the largest. Empty for language
    models, for modules that are no transformers model, and where the head is inside the base: see `has_task_head`.
    """
    base = getattr(model, getattr(model, "base_model_prefix", ""), None)
    if output_head(model):
        return []
    children = {name: child for name, child in model.named_children() if next(child.parameters(), None) is not None}
    if isinstance(base, nn.Module):
        return [name for name, child in children.items() if child is not base]
    if not has_task_head(model) or not children:
        return []
    names, models = [*children], [name for name, child in children.items() if hasattr(child, "base_model_prefix")]
    largest = max(children, key=lambda name: sum(p.numel() for p in children[name].parameters()))
    return names[names.index([largest, *models][-1]) + 1 :]


def has_task_head(model: nn.Module) -> bool:
    """Whether a transformers model has a task head, by the name of its class, wherever it may be."""
    return bool(getattr(model, "base_model_prefix", "") and HEADED.search(type(model).__name__))


@dataclass(frozen=True)
class Head:
    """A model's last linear layer. d_hidden: H; outputs: V words or C classes; softcap: None or c of c·tanh(x / c).

    scale: what the logits are multiplied by before (`MULTIPLIERS`; Granite's `logits_scaling` divides).
    """

    module: nn.Module
    d_hidden: int
    outputs: int
    softcap: float | None
    scale: float = 1.0

    def capped(self, raw: Tensor) -> Tensor:
        """The model's logits, of what its linear layer gives."""
        raw = raw if self.scale == 1 else raw * self.scale
        return raw if self.softcap is None else self.softcap * torch.tanh(raw / self.softcap)

    @property
    def is_fixed(self) -> bool:
        """Whether it is a linear map that nothing changes: neither trained, adapted nor in 4 bits."""
        return type(self.module) is nn.Linear and not any(p.requires_grad for p in self.module.parameters())

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits (…, V) of hidden states (…, H), float32, by the head itself, adapters and all."""
        return self.capped(self.module(hidden).float())

    @torch.no_grad()
    def recomputed(self, hidden: Tensor) -> Tensor:
        """The linear map of hidden states (…, H), in float32; by the head itself where it is not one of torch's."""
        if type(self.module) is not nn.Linear:
            return self.logits(hidden)
        weight, bias = self.module.weight, self.module.bias
        return self.capped(F.linear(hidden.float(), weight.float(), None if bias is None else bias.float()))

    def check(self, hidden: Tensor, logits: Tensor, remedy: str = "") -> bool:
        """Recompute the first rows of logits (…, V) from hidden (…, H): what does more than a linear map has other
        gradients. False where there are no rows.

        Raises:
            LorakitError: they differ.
        """
        if not hidden.numel():
            return False
        if (hidden.shape[-1], logits.shape[-1]) == (self.d_hidden, self.outputs):
            states, given = (x.detach().flatten(0, -2)[:ROWS_CHECKED] for x in (hidden, logits))
            error = (self.recomputed(states) - given.float()).norm() / given.float().norm().clamp(min=1e-12)
            if error < TOLERANCE or not torch.isfinite(given).all():
                return True
        told = f"the logits {tuple(logits.shape)} are not the head's linear map of its input {tuple(hidden.shape)}"
        raise LorakitError(f"{told}: its gradient would be another (head: {self.d_hidden} to {self.outputs}){remedy}")

    def reached(self, model: Callable[..., Any], inputs: Mapping[str, Any], take: Callable[[Tensor], Any]) -> Any:
        """What `take` makes of the head's input in a forward of `model`, whose head is then given nothing."""
        made: list[Any] = []

        def none_left(hidden: Tensor) -> Tensor:
            made.append(take(hidden))
            return hidden[:, :0]

        with replaced_input(self, none_left):
            model(**inputs)
        return made[0]


def find_head(model: nn.Module, kind: str) -> Head:
    """The output embeddings of a language model, or a classifier's last linear layer.

    Raises:
        LorakitError: the model has no such layer.
    """
    if kind == "classify":  # of those with one output per label the last that takes part in the forward
        labels = getattr(model.config, "num_labels", None)
        used = [layer for name, layer in model.named_modules() if "original_module" not in name]  # PEFT's spare copy
        fit = [layer for layer in used if isinstance(layer, nn.Linear) and layer.out_features == labels]
        module = fit[-1] if fit else None
    else:
        module = model.get_output_embeddings()
    if module is None or getattr(module, "weight", None) is None or module.weight.dim() != 2:
        told = f"{type(model).__name__} has no linear output head to read gradients from ({kind})"
        needs = "a gate that looks at the head gradient needs one; gates 'random' and 'loss_floor' do not"
        raise LorakitError(f"{told}: {needs}")
    shape = module.weight.shape  # of a packed weight: not its features
    outputs, width = getattr(module, "out_features", shape[0]), getattr(module, "in_features", shape[1])
    told = getattr(model.config, "get_text_config", lambda: model.config)()
    scale = next((named for name in MULTIPLIERS if (named := getattr(told, name, None)) is not None), 1.0)
    if divisor := getattr(told, "logits_scaling", None):
        scale = divisor if told.model_type == "hyperclovax" else 1 / divisor
    scale = 1.0 if kind == "classify" else scale
    return Head(module, width, outputs, getattr(told, "final_logit_softcapping", None), scale)


class HeadInput:
    """Keeps what `head` was given in the last forward pass, detached, until `take`n."""

    def __init__(self, head: Head):
        self.head, self.hidden, self.checked = head, None, False
        self.handle = head.module.register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, arguments: tuple) -> None:
        self.hidden = arguments[0].detach()

    def take(self, logits: Tensor) -> Tensor:
        """h (B, T, H) of logits (B, T, V), or (B, H) of (B, C), of the forward that has just run.

        Raises:
            LorakitError: the head did not run, or its output is not `logits`.
        """
        hidden, self.hidden = self.hidden, None
        if hidden is None:
            raise LorakitError("the model's forward did not call its output head: no head gradient to gate by")
        if hidden.dim() == logits.dim() + 1:  # a classifier that reads one token of each sequence (GPT-2, Gemma)
            # (B, H) out of (B, T, H): of each sequence the token whose outputs are the logits (B, C)
            distance = (self.head.recomputed(hidden) - logits.float()[:, None]).abs().sum(-1)  # (B, T)
            hidden = hidden[torch.arange(len(hidden), device=hidden.device), distance.argmin(-1)]
        self.checked = self.checked or self.head.check(hidden, logits)
        self.hidden = None
        return hidden

    def remove(self) -> None:
        """Take the hook off the model."""
        self.handle.remove()


@contextlib.contextmanager
def replaced_input(head: Head, replace: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """While inside, the head is given `replace(hidden)` for its first input; what it was given is collected."""
    given: list[Tensor] = []

    def hook(_: nn.Module, arguments: tuple) -> tuple | None:
        if given:
            return None  # `replace` itself asks the head for logits
        given.append(arguments[0])
        given[0] = replace(arguments[0])
        return (given[0], *arguments[1:])

    with head.module.register_forward_pre_hook(hook):
        yield given


def ambient_autocast(device: torch.device) -> torch.autocast:
    """The autocast of this moment, to be entered again later: what a model was called under."""
    kind = device.type
    return torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
