"""Peak training memory: predicted from one step on fake tensors, or read from CUDA's allocator.

The prediction runs forward, backward and optimizer step of the real model code on tensors without data, in the steady
state of training (the optimizer's state exists, gradients do not), and adds up the storages alive at each moment.
PyTorch's own optimizers are run; bitsandbytes' Adam only makes its state.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lorakit.base.nf4 import bitsandbytes, scale_tensors
from lorakit.errors import require
from lorakit.measure.dry import cuda_attention, fake, fake_mode, faked, training_state
from lorakit.measure.flops import FlopCount
from lorakit.measure.live import LiveBytes
from lorakit.seams import TokenSelection

AUTOCAST = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}
_Trained = list[torch.nn.Parameter]
_EIGHT_BIT = ("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit")


def _bitsandbytes_adam(trained: _Trained, bits: int) -> torch.optim.Optimizer:
    """bitsandbytes' own, without its arithmetic, whose kernels know no fake tensors: it makes its state only."""
    adam = bitsandbytes().optim.AdamW(trained, optim_bits=bits)
    adam.update_step = lambda *_: None
    return adam


# name -> (trained, foreach) to an optimizer over `trained` that makes the state of the one Hugging Face calls so
PREDICTABLE: dict[str, Callable[[_Trained, bool], torch.optim.Optimizer]] = {
    "adamw_torch": lambda trained, foreach: torch.optim.AdamW(trained, foreach=foreach),
    "adamw_torch_fused": lambda trained, foreach: torch.optim.AdamW(trained, fused=True),
    "sgd": lambda trained, foreach: torch.optim.SGD(trained, lr=1e-3, foreach=foreach),
    # paged: the same state; on CUDA it may be moved to the CPU's memory under pressure
    **dict.fromkeys(_EIGHT_BIT, lambda trained, foreach: _bitsandbytes_adam(trained, 8)),
    "paged_adamw_32bit": lambda trained, foreach: _bitsandbytes_adam(trained, 32),
}


def predict_step_memory(
    model: nn.Module,
    batch: Mapping[str, torch.Tensor],
    *,
    optimizer: str = "adamw_torch",
    autocast: str | None = None,
    gradient_checkpointing: bool = False,
    device: str = "cpu",
    tokens: TokenSelection | None = None,
    count: FlopCount | None = None,
) -> dict[str, int]:
    """Predict the peak memory of one training step of `model` (real or meta) on `batch`, leaving both as they are.

    Args:
        model: returns an output with `.loss` when called with `batch`.
        batch: inputs by name, labels included; only shapes and dtypes matter.
        optimizer: by its Hugging Face name, one of `PREDICTABLE`.
        autocast: None, "bf16" or "fp16".
        gradient_checkpointing: recompute activations in the backward; so it is anyway where the model already does.
        device: "cpu", or "cuda" for what differs there: the optimizer updates all tensors at once (more temporaries),
            and attention keeps no (T, T) matrix for dropout. Kernels are else taken to allocate the same on both.
        tokens: which tokens get a backward; needs a `batch` with real labels and masks. None: all.
        count: counts the FLOPs of the forward and the backward as well, but for what scoring takes by formula.

    Returns:
        Bytes of every storage alive at the peak, by kind, and their sum "peak". Every storage counts once:
        "parameters" (frozen and trained weights, 4-bit ones with their scales, buffers), "gradients" (of parameters, as
        far as the backward has come at the peak), "optimizer" (its state), "logits" (everything as wide as the output
        head's result that lives between the head's forward and its backward: logits, casts, log-probabilities, their
        gradients) and "activations" (all the rest: inputs, saved tensors, temporaries). Not included: workspace inside
        kernels, the CUDA context, the allocator's rounding and fragmentation.

    Raises:
        ParameterError: unknown optimizer, autocast or device; or nothing to train.
    """
    require(optimizer in PREDICTABLE, "optimizer", optimizer, f"memory is predicted for {', '.join(PREDICTABLE)}")
    require(autocast in AUTOCAST, "autocast", autocast, f"one of {', '.join(map(str, AUTOCAST))}")
    require(device in ("cpu", "cuda"), "device", device, "one of cpu, cuda")
    mode = fake_mode()
    attention = cuda_attention() if device == "cuda" else contextlib.nullcontext()
    with faked(model, mode), training_state(model, gradient_checkpointing), attention:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        require(bool(trained), "model", type(model).__name__, "needs at least one trainable parameter")
        inputs = {name: fake(mode, value) for name, value in batch.items()}
        made = PREDICTABLE[optimizer](trained, device == "cuda")
        cast = torch.autocast("cpu", AUTOCAST[autocast], enabled=autocast is not None)
        if tokens is None or not tokens.makes_loss:
            return _step(model, inputs, made, cast, mode, count, lambda: model(**inputs).loss)
        labels = batch["labels"]
        inputs.pop("labels")
        with tokens.dry({name: batch[name] for name in inputs}, labels) as masks:
            held = inputs | dict(enumerate(masks))
            return _step(model, held, made, cast, mode, count, lambda: tokens.select(model, inputs, labels).finish())


def _step(
    model: nn.Module, inputs: dict[str, Any], optimizer: Any, cast: Any, mode: Any, count: Any, run: Callable[[], Any]
) -> dict[str, int]:
    """One step in steady state, everything alive before it claimed by its kind."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    live = LiveBytes()
    states = [value for state in optimizer.state.values() for value in state.values()]
    weights = [*model.parameters(), *model.buffers()]
    weights += [scale for weight in weights for scale in scale_tensors(weight)]
    for kind, tensors in (("activations", inputs.values()), ("optimizer", states), ("parameters", weights)):
        for tensor in filter(torch.is_tensor, tensors):
            live.claim(tensor, kind)
    with contextlib.ExitStack() as hooks:
        for parameter in trained:
            hooks.enter_context(parameter.register_post_accumulate_grad_hook(lambda p: live.claim(p.grad, "gradients")))
        _watch_head(live, model, hooks)
        with mode, live, count or contextlib.nullcontext():
            with cast:
                loss = run()  # the output, logits with it, dies here as in the Trainer
            loss.backward()
    with live:  # without the fake mode: the optimizer reads its step counters, which are real
        optimizer.step()
        optimizer.zero_grad()
    return live.peak()


def _watch_head(live: LiveBytes, model: nn.Module, hooks: contextlib.ExitStack) -> None:
    """Let `live` know the logits' width from the head's forward until the backward has passed the head.

    The head is the last linear layer: a language model's output embeddings, or a classifier's `score` or `classifier`.
    """
    embeddings = getattr(model, "get_output_embeddings", lambda: None)()
    named = [module for name, module in model.named_modules() if name.rpartition(".")[2] in ("score", "classifier")]
    heads = [module for module in named if isinstance(module, nn.Linear)] if embeddings is None else [embeddings]
    if not heads:
        return

    def entered(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        live.logit_width = heads[-1].weight.shape[0]
        if args[0].requires_grad:
            args[0].register_hook(lambda _: setattr(live, "logit_width", None))

    hooks.enter_context(heads[-1].register_forward_pre_hook(entered))


def reset_cuda_peak() -> None:
    """Start a new measurement of the CUDA peak; nothing without CUDA."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def cuda_peak_bytes() -> int | None:
    """Most bytes PyTorch had allocated on the current CUDA device since `reset_cuda_peak`; None without CUDA."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
