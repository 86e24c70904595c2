"""The optimizers whose memory is predicted: PyTorch's own are run, bitsandbytes' Adam only makes its state."""

from collections.abc import Callable
from typing import Any

import torch

_Trained = list[torch.nn.Parameter]


class _EightBitAdam(torch.optim.Optimizer):
    """The state of bitsandbytes' block-wise 8-bit Adam, without its arithmetic."""

    SMALLEST, BLOCK = 4096, 256  # bitsandbytes: tensors below keep fp32 state; one fp32 scale per block and moment

    def __init__(self, trained: _Trained) -> None:
        super().__init__(trained, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            if not self.state[parameter]:
                self.state[parameter] = self._state(parameter)

    def _state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        count = parameter.numel()
        if count < self.SMALLEST:
            return {f"state{i}": torch.zeros_like(parameter, dtype=torch.float32) for i in (1, 2)}
        moments = {f"state{i}": torch.zeros_like(parameter, dtype=torch.uint8) for i in (1, 2)}
        blocks = -(-count // self.BLOCK)
        return moments | {f"absmax{i}": parameter.new_zeros(blocks, dtype=torch.float32) for i in (1, 2)}


class _ThirtyTwoBitAdam(_EightBitAdam):
    """The state of its 32-bit Adam: two fp32 moments for every tensor."""

    SMALLEST = float("inf")


def _eight_bit(trained: _Trained, foreach: bool) -> torch.optim.Optimizer:
    return _EightBitAdam(trained)


PREDICTABLE: dict[str, Callable[[_Trained, bool], torch.optim.Optimizer]] = {
    "adamw_torch": lambda trained, foreach: torch.optim.AdamW(trained, foreach=foreach),
    "adamw_torch_fused": lambda trained, foreach: torch.optim.AdamW(trained, fused=True),
    "sgd": lambda trained, foreach: torch.optim.SGD(trained, lr=1e-3, foreach=foreach),
    "adamw_bnb_8bit": _eight_bit,
    "adamw_8bit": _eight_bit,
    "paged_adamw_8bit": _eight_bit,  # the same state; on CUDA it may be moved to the CPU's memory under pressure
    "paged_adamw_32bit": lambda trained, foreach: _ThirtyTwoBitAdam(trained),
}


def make_optimizer(name: str, trained: _Trained, *, foreach: bool) -> Any:
    """An optimizer over `trained` that makes the state of the one Hugging Face calls `name`."""
    return PREDICTABLE[name](trained, foreach)
