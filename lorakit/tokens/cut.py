"""A second pass that starts behind the blocks in which nothing learns, from the states the first pass had there."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.modules import set_until
from lorakit.tokens.positions import Places


class Cut:
    """Where the first `count` of the `blocks` of `model` end, for one batch: nothing before that gets a gradient.

    An adapter that SkipLoRA lets rest does not learn.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]):
        self.blocks = blocks
        probes = [probe for module in model.modules() if (probe := getattr(module, "probe", None)) is not None]
        resting = {id(parameter) for probe in probes if not probe.active for parameter in probe.parameters}
        learning = {id(p) for p in model.parameters() if p.requires_grad} - resting
        inside = [learning & {id(p) for p in block.parameters()} for block in self.blocks]
        head = {id(p) for p in model.get_output_embeddings().parameters()}
        first = {id(p) for p in model.get_input_embeddings().parameters()}
        outside = learning.difference(*inside, head - first)  # embeddings, a norm between the blocks, …
        self.count = 0 if outside else next((n for n, own in enumerate(inside) if own), len(self.blocks))
        self.states: Tensor | None = None  # (B, T, H) where the count-th block ends
        self.tuples = False  # whether blocks give tuples

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """While inside, a forward of all tokens leaves its states."""
        with contextlib.ExitStack() as hooks:
            for block in self.blocks[self.count - 1 : self.count]:
                hooks.enter_context(block.register_forward_hook(self._keep))
            yield

    def _keep(self, _: nn.Module, __: tuple, out: Any) -> None:
        self.tuples = not torch.is_tensor(out)
        self.states = out[0] if self.tuples else out

    @contextlib.contextmanager
    def started(self, at: Places) -> Iterator[None]:
        """While inside, a forward of the tokens `at` takes their states for what the first blocks give; only once."""
        if self.states is None:
            yield
            return
        chosen, self.states = self.states[at.batch[:, None], at.columns], None
        given = (chosen,) if self.tuples else chosen
        with contextlib.ExitStack() as stack:
            for block in self.blocks[: self.count]:
                set_until(stack, block, forward=lambda *_, **__: given)
            yield
