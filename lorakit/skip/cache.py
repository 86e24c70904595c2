"""A frozen prefix that is run once: what its last block gives for a row is kept, and later epochs start above it.

Where nothing below a block is trained any more, its output for a row is the same in every epoch. AutoFreeze (Liu et al.
2021) keeps such activations and reports up to 2.55 ×. Of a prefix of k in L blocks the forward's k / L go; a backward
there was none. A row is known by its tokens alone, so that order, batches and epochs do not matter.
"""

import hashlib
import shutil
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lorakit.adapters.attachment import is_disabled
from lorakit.errors import DataError, require, retold
from lorakit.files import written
from lorakit.modules import blocks, random_state, set_until
from lorakit.seams import Controller
from lorakit.skip.probes import keep_the_cut

TOLD = {"input_ids", "attention_mask", "token_type_ids", "labels"}  # what a batch may say


def room(rows: Iterable[Iterable[int]], model: nn.Module, folder: Path | None) -> tuple[int, int]:
    """Bytes that the states of `rows` (token ids) take, equal ones once, and how many are free, there or in memory."""
    tokens = sum(map(len, {tuple(row) for row in rows}))
    there = next(path for path in (folder, *folder.parents) if path.exists()) if folder else None
    free = shutil.disk_usage(there).free if there else psutil.virtual_memory().available
    return tokens * model.config.get_text_config().hidden_size * model.dtype.itemsize, free


class PrefixCache(Controller):
    """Keeps what leaves the frozen first blocks of `model` while it trains, each row's valid tokens once.

    The prefix is every block from the first on without a parameter that is trained; with SkipLoRA, whose `skip_share`
    ends it, from the end of its warm-up on. A batch whose rows are all known starts above it; another is computed, and
    kept. Evaluation neither reads nor writes.

    Args:
        folder: of caches for later runs, one for each prefix (its weights, `key`); None: in memory, to the run's end.
        key: what else its states depend on: precision, attention.

    Raises:
        ParameterError: a model without a list of blocks, or with a batch norm, which looks across rows; with the first
            batch that could be kept a first block that is trained, a prefix that is trained from below or draws random
            numbers (dropout), states that are others than those kept of it, rows padded on the left.
    """

    name = "prefix_cache"

    def __init__(self, model: nn.Module, folder: Path | None = None, key: str = ""):
        self.model, self.folder, self.key, self.blocks = model, folder, key, blocks(model)
        self.kept = ("batches", "hits", *(("rows", "bytes") if folder else ()))  # those in memory do not outlive it
        self.cut = self.rows = self.bytes = self.batches = self.hits = 0
        self._kept: dict[str, Tensor | Path] = {}  # a row's name -> its states (T, H), or the file they are in
        self._coming: tuple[list[str], Tensor, Tensor] | None = None  # names of rows, mask (B, T), random state before
        self._known = self._checked = False
        self._patched = ExitStack()
        norms = [path for path, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        self._require(not norms, f"{norms[:1]} looks across rows")
        self._require(bool(self.blocks), f"{type(model).__name__} has no list of blocks")

    def bind_two_passes(self) -> None:
        self._require(False, "gating.mode 'fractional' goes through the layers once more")

    def begin(self) -> None:
        keep_the_cut(self.model)
        self.begin_step(0.0)
        told = "the first block is trained: adapt later ones only (target_modules), or skip 'prefix' by skip_share"
        self._require(self.cut > 0 or any(getattr(m, "probe", None) for m in self.model.modules()), told)

    def _require(self, fine: bool, told: str) -> None:
        require(fine, self.name, "disk" if self.folder else "memory", told)

    def begin_step(self, share: float) -> None:
        probes = [probe for m in self.model.modules() if (probe := getattr(m, "probe", None)) and not probe.active]
        idle = {p for probe in probes for p in probe.parameters}
        trained = [any(p.requires_grad and p not in idle for p in block.parameters()) for block in self.blocks]
        if (cut := [*trained, True].index(True)) != self.cut:
            self.end()
            self.cut = cut
            self._kept = self._stored() if cut and self.folder else {}
            for place, block in enumerate(self.blocks[:cut]):
                run = self._last if place == cut - 1 else self._inner
                set_until(self._patched, block, forward=partial(run, block.forward))

    def begin_batch(self, inputs: Mapping[str, Any]) -> None:
        if not self.cut:
            return
        more = ", ".join(sorted({*inputs} - TOLD))
        self._require(not more, f"batches also hold {more}, as packed rows do")
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        self._require(not bool((mask[:, 1:] & ~mask[:, :-1]).any()), "rows must be padded on the right: places count")
        words = torch.stack([ids, inputs.get("token_type_ids", torch.zeros_like(ids))], 2).cpu()
        valid = (row[at].numpy().tobytes() for row, at in zip(words, mask.cpu(), strict=True))
        names = [hashlib.blake2b(row, digest_size=16).hexdigest() for row in valid]
        self._coming, self._known = (names, mask, random_state(ids)), self._checked and {*names} <= self._kept.keys()
        self.batches, self.hits = self.batches + 1, self.hits + self._known

    def signature(self) -> Hashable:
        return (self.cut, self._known)

    def end(self) -> None:
        self._patched.close()
        self.cut, self._kept, self._coming, self._known, self._checked = 0, {}, None, False, False

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state or self.state_dict())  # older checkpoints hold nothing

    def report(self) -> dict[str, Any]:
        """Counted over the run, resumed or not; rows and bytes that were kept, in memory since it was resumed."""
        return {"rows": self.rows, "bytes": self.bytes, "batches": self.batches, "from_cache": self.hits}

    # inside a forward ----------------------------------------------------------------------------------

    def _told(self) -> bool:
        """Whether this forward is the one told of: no evaluation, and not of the base alone."""
        return self._coming is not None and self.model.training and not is_disabled(self.model)

    def _inner(self, forward: Callable[..., Any], *given: Any, **named: Any) -> Any:
        return (given or [*named.values()])[0] if self._known and self._told() else forward(*given, **named)

    def _last(self, forward: Callable[..., Any], *given: Any, **named: Any) -> Any:
        if not self._told():
            return forward(*given, **named)
        (names, mask, before), self._coming = self._coming, None
        if self._known:
            found = torch.cat([self._states(name) for name in names]).to(mask.device)
            return found.new_zeros(*mask.shape, found.shape[-1]).masked_scatter_(mask[..., None], found)
        out = forward(*given, **named)
        if not self._checked:
            sound = torch.is_tensor(out) and out.shape[:-1] == mask.shape
            self._require(sound, "its blocks give no state for each token")
            self._require(not out.requires_grad, "something below its end is trained")
            drawn = "it draws random numbers, as dropout does: base_dropout false"
            self._require(torch.equal(before, random_state(out)), drawn)
        new = {name: states[at].cpu() for name, states, at in zip(names, out.detach(), mask, strict=True)}
        if not self._checked:
            for name in new.keys() & self._kept.keys():
                kept, now = self._states(name).float(), new[name].float()
                same = kept.shape == now.shape and bool((kept - now).norm() <= 1e-3 * now.norm())  # but for rounding
                self._require(same, f"{self._kept[name]} does not hold what this model computes; remove its folder")
            self._checked = torch.is_grad_enabled()  # else what is trained below would not show
        self._keep({name: states for name, states in new.items() if name not in self._kept})
        return out

    # what is kept --------------------------------------------------------------------------------------

    def _states(self, name: str) -> Tensor:
        if torch.is_tensor(kept := self._kept[name]):
            return kept
        with safe_open(kept, "pt") as file:
            return file.get_tensor(name)

    def _keep(self, new: dict[str, Tensor]) -> None:
        self.rows, self.bytes = self.rows + len(new), self.bytes + sum(states.nbytes for states in new.values())
        if new and self.folder:
            file = self.place / f"{hashlib.sha256(repr([*new]).encode()).hexdigest()[:32]}.safetensors"
            with written(file) as path:
                save_file(new, path)
            new = dict.fromkeys(new, file)
        self._kept |= new

    def _stored(self) -> dict[str, Tensor | Path]:
        """The rows in the folder of this prefix, which is made.

        Raises:
            DataError: one of its files is damaged.
        """
        below, above = ({id(t) for block in part for t in block.state_dict(keep_vars=True).values()}
                        for part in (self.blocks[: self.cut], self.blocks[self.cut :]))  # fmt: skip
        digest = hashlib.sha256(f"{self.cut} {self.key} {self.model.config.to_json_string()}".encode())
        for name, value in self.model.state_dict(keep_vars=True).items():
            if id(value) in below or not (id(value) in above or value.requires_grad):
                digest.update(name.encode() + value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        self.place = self.folder / digest.hexdigest()[:16]
        self.place.mkdir(parents=True, exist_ok=True)
        found: dict[str, Tensor | Path] = {}
        for path in self.place.glob("*.safetensors"):
            broken = retold((SafetensorError, OSError), DataError, f"prefix_cache: {path} is damaged, remove it")
            with broken, safe_open(path, "pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        return found
