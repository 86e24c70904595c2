"""Live bytes: the sum of the sizes of all storages that exist, followed operator by operator."""

import bisect
import weakref
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch.utils._pytree import tree_leaves

from lorakit.measure.flops import Onlooker

KINDS = ("parameters", "gradients", "optimizer", "activations", "logits")


@dataclass(eq=False)
class _Storage:
    """One allocation: `nbytes` bytes alive in the events `born <= t < died`."""

    nbytes: int
    kind: str
    born: int
    died: float = float("inf")


class LiveBytes(Onlooker):
    """Follows every storage that an operator makes inside it, from its birth to its death, on fake or real tensors.

    A storage is of kind "activations" until `claim` says otherwise; views and in-place results are no new storages.
    The workspace a kernel allocates and frees inside itself is not seen.

    Attributes:
        logit_width: while set, a floating-point storage born as a tensor of this last dimension is of kind "logits".
    """

    def __init__(self) -> None:
        super().__init__()
        self.logit_width: int | None = None
        self._alive: dict[int, tuple[weakref.ref, _Storage]] = {}  # by address, free for reuse after the death
        self._all: list[_Storage] = []
        self._sums: list[tuple[_Storage, _Storage]] = []  # (a, a + b) of sums in the backward
        self._events = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func.name() == "bitsandbytes::gemm_4bit":
            # As the library's CPU kernel takes it, with the unpacked weight in sight. So it does on CUDA for more than
            # 1,536 rows; for fewer a fused kernel may need none of this memory. Under autocast the real kernel casts an
            # fp32 weight (`compute_dtype="fp32"`) once more, which is not seen here.
            from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl

            with self:
                return _gemm_4bit_default_impl(*args)
        out = func(*args, **(kwargs or {}))
        sums = func is torch.ops.aten.add.Tensor and not args[0]._is_view()
        if sums and torch._C._current_autograd_node() is not None and not torch.is_grad_enabled():  # in the backward
            self._sums.append((self._follow(args[0]), self._follow(out)))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._follow(leaf)
        return out

    def claim(self, tensor: torch.Tensor, kind: str) -> None:
        """Say that the storage of `tensor` is of `kind`; it is followed from now on where it was not yet."""
        self._follow(tensor).kind = kind

    def _follow(self, tensor: torch.Tensor) -> _Storage:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._alive:
            return self._alive[address][1]
        wide = self.logit_width == (tensor.shape[-1] if tensor.ndim else 0) and tensor.is_floating_point()
        self._events += 1
        entry = _Storage(storage.nbytes(), "logits" if wide else "activations", self._events)
        self._alive[address] = (weakref.ref(storage, lambda _: self._forget(address)), entry)
        self._all.append(entry)
        return entry

    def _forget(self, address: int) -> None:
        self._events += 1
        self._alive.pop(address)[1].died = self._events

    def peak(self) -> dict[str, int]:
        """Bytes by kind at the first moment when most bytes were alive, and their sum as "peak"."""
        self._sum_in_place()
        table = pd.DataFrame(map(vars, self._all))
        changes = pd.concat([table.set_index("born")["nbytes"], -table.set_index("died")["nbytes"]])
        when = changes.groupby(level=0).sum().cumsum().idxmax()
        alive = table[(table["born"] <= when) & (when < table["died"])]
        split = alive.groupby("kind")["nbytes"].sum().reindex(KINDS, fill_value=0)
        return {**split.to_dict(), "peak": int(split.sum())}

    def _sum_in_place(self) -> None:
        """Give a sum of gradients the storage of its first term where it would have it without a dispatch mode.

        Autograd adds a second gradient into the first if nothing else holds that (and it is no view), but not while a
        mode looks on. The first then dies right after the sum is born, before anything else is.
        """
        births = [entry.born for entry in self._all]
        for first, total in self._sums:
            later = bisect.bisect_right(births, total.born)
            if total.born < first.died and (later == len(births) or first.died < births[later]):
                total.born = first.died
        self._sums.clear()
