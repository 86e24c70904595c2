"""An adapter wraps one frozen linear map: h = (W0 + ΔW) x + b, where a method only says what ΔW is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Set
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.utils import checkpoint
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from lorakit.base.nf4 import dense, dequantise, is_four_bit
from lorakit.errors import CheckpointError, LorakitError
from lorakit.fields import Settings
from lorakit.modules import is_conv1d
from lorakit.seams import Controller
from lorakit.settings import AdapterSettings


class AdapterLayer(nn.Module, ABC):
    """A frozen linear `base_layer` and the trainable tensors of a method.

    A method subclasses it: it registers parameters in `__init__`, lists them in `parameter_names`, and defines
    `delta_weight` (the update as one matrix), `adapted` (the output, without forming that matrix where it can), and
    how its settings read in PEFT's config. It joins the suite by its entry in `ADAPTERS`.

    Args:
        base_layer: nn.Linear (subclasses too) or GPT-2's Conv1D; its parameters are left as they are.
        settings: see `AdapterSettings`.
        generator: draws initial values, on the CPU so that a seed means the same on every device; None: the global one.
    """

    has_alpha: ClassVar[bool] = True  # whether the update is scaled by alpha
    peft_type: ClassVar[str]  # the method's name in PEFT's file format
    parameter_names: ClassVar[tuple[str, ...]]  # trainable attributes, named as in PEFT's file format
    peft_fields: ClassVar[Set[str]]  # the fields of the method's PEFT config that are understood
    peft_names: ClassVar[Mapping[str, str]]  # of settings, those fields that hold them
    peft_defaults: ClassVar[Mapping[str, Any]]  # what PEFT takes where its config does not say
    peft_inits: ClassVar[tuple[Any, ...]]  # that it may hold
    no_other_init: ClassVar[str]  # why
    is_off: bool = False  # see `lorakit.disabled`

    def __init__(self, base_layer: nn.Module, settings: AdapterSettings, generator: Generator | None = None):
        super().__init__()
        self.base_layer, self.settings, self.transposed = base_layer, settings, is_conv1d(base_layer)
        # a 4-bit weight's own shape is a packed one
        named = ("nf", "nx") if self.transposed else ("out_features", "in_features")
        self.out_features, self.in_features = (getattr(base_layer, name) for name in named)
        # what merging replaced: W0, or the 4-bit layer; in a tuple, so that it is no parameter or module of ours
        self._unmerged: tuple[nn.Parameter | nn.Module, ...] = ()
        self.register_state_dict_pre_hook(_require_unmerged)
        self.register_load_state_dict_pre_hook(_require_unmerged)
        self.train(base_layer.training)

    @abstractmethod
    def delta_weight(self) -> Tensor:
        """ΔW, (out_features, in_features), in the adapter's precision; differentiable."""

    @abstractmethod
    def adapted(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features): the output with the update, in the base's dtype.

        What `base_layer(x)` gives is ours to change only where `owns_output`: else somebody may have kept it.
        """

    @staticmethod
    def controllers(model: nn.Module, run: Settings) -> list[Controller]:
        """What the method needs between the steps of a run with these parameters."""
        return []

    @classmethod
    def settings_to_peft(cls, settings: AdapterSettings) -> dict[str, Any]:
        """`settings` under the names of the method's PEFT config."""
        alpha = settings.alpha
        told = dict(settings) | {"init": "gaussian" if settings.init == "gaussian" else True}
        told["alpha"] = int(alpha) if alpha is not None and alpha.is_integer() else alpha
        return {theirs: told[name] for name, theirs in cls.peft_names.items()}

    @classmethod
    def settings_from_peft(cls, config: Mapping[str, Any]) -> AdapterSettings:
        """The settings in a PEFT config; raises `CheckpointError` on what lorakit cannot reproduce."""
        told = {name: config[theirs] for name, theirs in cls.peft_names.items() if theirs in config}
        init, rslora = told.pop("init", None), told.pop("rslora", None) or False
        if init not in cls.peft_inits:
            raise CheckpointError(f"{cls.peft_names['init']}={init!r}: {cls.no_other_init}")
        init = "gaussian" if init == "gaussian" else "kaiming"
        return AdapterSettings(**cls.peft_defaults | told, init=init, rslora=rslora)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features).

        Raises:
            LorakitError: merged, and asked to train: the adapter would silently get no gradient.
        """
        if self.is_off:
            return self.base_layer(x)
        if self._unmerged:
            if self.training and torch.is_grad_enabled():
                raise LorakitError("the adapter is merged into the base weights; unmerge(model) before training")
            if torch.is_autocast_enabled(x.device.type):
                return self.base_layer(x)
            # it may stand in place of a 4-bit layer, which gives what it is given in its own dtype too
            return self.base_layer(x.to(self.base_layer.weight.dtype)).to(x.dtype)
        if torch.is_autocast_enabled(x.device.type) and x.dtype == torch.float32:
            # cast once here; the base and the adapter would each keep a copy of their own
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return self.adapted(x)

    def new_parameter(self, values: Tensor) -> nn.Parameter:
        """A trainable tensor on the base's device, in fp32 or the base's dtype if that is finer.

        Low-precision bases keep fp32 adapters, as in PEFT: bf16 would lose AdamW's small steps.
        """
        weight = self.base_layer.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return nn.Parameter(values.to(weight.device, dtype))

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The trainable tensors by their name in PEFT's file format."""
        return {name: getattr(self, name) for name in self.parameter_names}

    def base_weight(self) -> Tensor:
        """W0, (out_features, in_features): a view where the base stores it plainly, new where it is in 4 bits.

        Raises:
            LorakitError: it is stored in a way that cannot be read here (8 bits).
        """
        if is_four_bit(self.base_layer):
            return dequantise(self.base_layer)
        weight = self.base_layer.weight
        if not weight.is_floating_point():
            raise LorakitError(f"the base weight is {weight.dtype} ({type(self.base_layer).__name__}), not read here")
        return weight.T if self.transposed else weight

    def merged_weight(self) -> Tensor:
        """W0 + ΔW rounded once to the base's dtype, laid out as the base stores it."""
        base = self.base_weight()
        weight = (base + self.delta_weight()).to(base.dtype)
        return weight.T if self.transposed else weight

    @property
    def weight(self) -> Tensor:
        """The effective weight, for code that reads it past `forward` (nn.MultiheadAttention, fused encoder layers)."""
        return self.base_layer.weight if self._unmerged or self.is_off else self.merged_weight()

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    @property
    def is_merged(self) -> bool:
        return self._unmerged != ()

    @property
    def is_plain(self) -> bool:
        """Whether the base's forward is x Wᵀ + b and nothing else: no subclass's or own, no hook that looks on."""
        base = self.base_layer
        hooks = (base._forward_pre_hooks, base._forward_hooks, base._backward_pre_hooks, base._backward_hooks)
        changed = any(hooks) or nn.modules.module._has_any_global_hook()
        own = "forward" in vars(base)  # accelerate's, which brings weights in from elsewhere
        return (self.transposed or type(base).forward is nn.Linear.forward) and not own and not changed

    @property
    def owns_output(self) -> bool:
        """Whether nobody else can hold what the base's forward gives, nor is it a view: then it may be changed."""
        if not self.is_plain or self.transposed or torch.compiler.is_compiling():
            return False
        modes = (checkpoint._CachingTorchDispatchMode, checkpoint._CachedTorchDispatchMode)  # keep what they choose
        kept = any(isinstance(mode, modes) for mode in _get_current_dispatch_mode_stack())
        return not kept and torch._C._functorch.peek_interpreter_stack() is None  # which changes nothing in place

    def merge_obstacle(self) -> str:
        """Why the update cannot be folded into the base's weight; empty where it can."""
        base = self.base_layer
        if is_four_bit(base):
            return ""
        if "weight" not in base._parameters:
            return "its weight is computed from others (weight_norm, a parametrisation)"
        if not base.weight.is_floating_point():
            return f"its weight is {base.weight.dtype} ({type(base).__name__})"
        if not self.transposed and type(base).forward is not nn.Linear.forward:
            return f"the forward of its {type(base).__name__} does more than a linear map with its weight"
        return ""

    def merge(self, safe: bool = False) -> None:
        """Put W0 + ΔW in W0's place; W0 itself is kept, so while merged the layer holds two weights.

        A new parameter, not an in-place sum: a weight tied to another module's (an embedding) stays what it was. A
        4-bit base makes room for a dense one; its sum in 4 bits would be another (see `requantisation_error`).

        Raises:
            LorakitError: see `merge_obstacle`, or `safe` and the sum is not finite; nothing has changed.
        """
        if self._unmerged:
            return
        if obstacle := self.merge_obstacle():
            raise LorakitError(obstacle)
        with torch.no_grad():
            merged = self.merged_weight()
        if safe and not torch.isfinite(merged).all():
            raise LorakitError("NaN or infinite values would be merged into its weight")
        base = self.base_layer
        if is_four_bit(base):
            self._unmerged, self.base_layer = (base,), dense(base, merged)
        else:
            base.weight, self._unmerged = nn.Parameter(merged, requires_grad=False), (base.weight,)

    def unmerge(self) -> None:
        """Put W0 back, bit for bit the tensor it was."""
        if not self._unmerged:
            return
        (original,), merged = self._unmerged, self.base_layer.weight
        if isinstance(original, nn.Module):
            self.base_layer = original.to(merged.device).train(self.training)
        else:
            original.data = original.data.to(merged.device, merged.dtype)  # the model may have moved meanwhile
            self.base_layer.weight = original
        self._unmerged = ()

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in vars(self.settings).items())


def _require_unmerged(layer: AdapterLayer, *_: Any) -> None:
    """Before its state_dict is saved or loaded: who reads both names, base and adapter, adds the update twice."""
    if layer.is_merged:
        told = "the adapter is merged into the base weights: unmerge(model) before its state_dict is saved or loaded"
        raise LorakitError(f"{told}; lorakit.export(model, folder) writes the merged model")


ADAPTERS: dict[str, type[AdapterLayer]] = {}  # method -> its layer; each module enters its own
