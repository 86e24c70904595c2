"""The optimizers whose memory is predicted: PyTorch's own are run, bitsandbytes' Adam only makes its state."""

from collections.abc import Callable

import torch

_Trained = list[torch.nn.Parameter]
_EIGHT_BIT = ("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit")


class _BitsAndBytesAdam(torch.optim.Optimizer):
    """The state of bitsandbytes' Adam, without its arithmetic: two fp32 moments, or in 8 bits, block by block.

    Tensors of fewer than `smallest` elements are not kept in 8 bits. Every block has one fp32 scale a moment.
    """

    BLOCK = 256

    def __init__(self, trained: _Trained, smallest: float = 4096) -> None:
        super().__init__(trained, {"smallest": smallest})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            if self.state[parameter]:
                continue
            small = parameter.numel() < self.defaults["smallest"]
            for i in (1, 2):
                dtype = torch.float32 if small else torch.uint8
                self.state[parameter][f"state{i}"] = torch.zeros_like(parameter, dtype=dtype)
                if not small:
                    blocks = -(-parameter.numel() // self.BLOCK)
                    self.state[parameter][f"absmax{i}"] = parameter.new_zeros(blocks, dtype=torch.float32)


# name -> (trained, foreach) to an optimizer over `trained` that makes the state of the one Hugging Face calls so
PREDICTABLE: dict[str, Callable[[_Trained, bool], torch.optim.Optimizer]] = {
    "adamw_torch": lambda trained, foreach: torch.optim.AdamW(trained, foreach=foreach),
    "adamw_torch_fused": lambda trained, foreach: torch.optim.AdamW(trained, fused=True),
    "sgd": lambda trained, foreach: torch.optim.SGD(trained, lr=1e-3, foreach=foreach),
    # paged: the same state; on CUDA it may be moved to the CPU's memory under pressure
    **dict.fromkeys(_EIGHT_BIT, lambda trained, foreach: _BitsAndBytesAdam(trained)),
    "paged_adamw_32bit": lambda trained, foreach: _BitsAndBytesAdam(trained, float("inf")),
}
