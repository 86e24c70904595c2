"""A token selection runs the forward pass so that only the chosen tokens are in the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch


class TokenSelection(Protocol):
    """Stands between the trainer and the model: calls the model once, and says how many tokens a backward reaches."""

    def forward(self, model: Callable[..., Any], inputs: Mapping[str, Any]) -> Any:
        """The model's outputs (loss, logits) for `inputs`."""

    def backpropagated(self, inputs: Mapping[str, Any], tokens: int) -> int:
        """How many of the batch's `tokens` non-padding input tokens get a backward."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class AllTokens:
    """The baseline: every token gets its backward."""

    def forward(self, model: Callable[..., Any], inputs: Mapping[str, Any]) -> Any:
        return model(**inputs)

    def backpropagated(self, inputs: Mapping[str, Any], tokens: int) -> int:
        return tokens

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore: the selection has no state."""


def count_tokens(inputs: Mapping[str, torch.Tensor], pad_token_id: int | None) -> int:
    """Non-padding input tokens of a batch: from a (B, T) attention mask, else by the padding id (packed rows)."""
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        return int(mask.sum())
    ids = inputs["input_ids"]
    return ids.numel() if pad_token_id is None else int((ids != pad_token_id).sum())
