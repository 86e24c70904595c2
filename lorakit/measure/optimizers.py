"""The optimizers whose memory is predicted: PyTorch's own are run, bitsandbytes' Adam only makes its state."""

from collections.abc import Callable

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
            if self.state[parameter]:
                continue
            small = parameter.numel() < self.SMALLEST
            for i in (1, 2):
                moment = torch.zeros_like(parameter, dtype=torch.float32 if small else torch.uint8)
                self.state[parameter][f"state{i}"] = moment
                if not small:
                    blocks = -(-parameter.numel() // self.BLOCK)
                    self.state[parameter][f"absmax{i}"] = parameter.new_zeros(blocks, dtype=torch.float32)


class _ThirtyTwoBitAdam(_EightBitAdam):
    """The state of its 32-bit Adam: two fp32 moments for every tensor."""

    SMALLEST = float("inf")


# name -> (trained, foreach) to an optimizer over `trained` that makes the state of the one Hugging Face calls so
PREDICTABLE: dict[str, Callable[[_Trained, bool], torch.optim.Optimizer]] = {
    "adamw_torch": lambda trained, foreach: torch.optim.AdamW(trained, foreach=foreach),
    "adamw_torch_fused": lambda trained, foreach: torch.optim.AdamW(trained, fused=True),
    "sgd": lambda trained, foreach: torch.optim.SGD(trained, lr=1e-3, foreach=foreach),
    # paged: the same state; on CUDA it may be moved to the CPU's memory under pressure
    **dict.fromkeys(
        ("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"), lambda trained, foreach: _EightBitAdam(trained)
    ),
    "paged_adamw_32bit": lambda trained, foreach: _ThirtyTwoBitAdam(trained),
}
