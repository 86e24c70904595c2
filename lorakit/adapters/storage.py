"""Adapter files read: what `saving` writes, and PEFT."""

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from lorakit.adapters import peft_format
from lorakit.adapters.attach import attach_to
from lorakit.adapters.attachment import Attachment, detach, require_bare, require_unmerged
from lorakit.adapters.layer import ADAPTERS
from lorakit.adapters.packed import PACKED_FILE, unpack
from lorakit.adapters.peft_format import ConfigShape, StoredAdapter
from lorakit.adapters.saving import DIGEST, OWN_CONFIG_FILE, OWN_TENSORS_FILE, header_and_digest
from lorakit.adapters.state import load_adapter_state
from lorakit.errors import CheckpointError, ParameterError, retold
from lorakit.modules import unwrapping
from lorakit.settings import AdapterSettings


@unwrapping
def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Load what `save_adapter` or PEFT wrote: into the adapter `model` has, or attaching one as the file says.

    Raises:
        CheckpointError: there is no adapter in `folder`, it is another kind than the attached one, uses a PEFT feature
            lorakit lacks, or does not fit (tensor and both shapes named). The model is then as it was.

    Returns:
        The model; of a type that lorakit has no layer for, PEFT's wrapper around it (method "peft").
    """
    attachment: Attachment | None = getattr(model, "lorakit_attachment", None)
    folder = Path(folder).expanduser()
    try:
        if attachment is None:
            require_bare(model, "load_adapter")
        if _is_for_peft(folder, attachment):
            return _load_peft(model, folder, attachment)
        stored = _read(model, folder)
        if attachment is None:
            attach_to(model, stored.method, stored.settings, stored.targets, stored.trained, seed=0)
            try:
                return load_adapter_state(model, stored.tensors)
            except CheckpointError:
                detach(model)
                raise
        _require_same(attachment, stored)
        return load_adapter_state(model, stored.tensors)
    except (CheckpointError, ParameterError) as error:
        raise CheckpointError(f"{folder}: {error}") from None


def described(folder: str | Path) -> tuple[str | None, str | None, int | None]:
    """What an adapter's files say of its model: the base's name, its kind, a classifier's number of labels.

    Raises:
        CheckpointError: there is no adapter in `folder`.
    """
    folder = Path(folder).expanduser()
    own = not (folder / peft_format.CONFIG_FILE).is_file()
    try:
        config = _read_json(folder / (OWN_CONFIG_FILE if own else peft_format.CONFIG_FILE))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no adapter here: no {peft_format.CONFIG_FILE}") from None
    kind = {"SEQ_CLS": "classify", "CAUSAL_LM": "causal"}.get(config.get("task_type"))
    heads = config.get("trained" if own else "modules_to_save") or []
    files = [folder / n for n in (PACKED_FILE, peft_format.TENSORS_FILE, OWN_TENSORS_FILE) if (folder / n).is_file()]
    tensors = [named for file in files for named in _read_tensors(file)[0].items()]
    ends = [f".{head}{last}.weight" for head in heads for last in ("", ".out_proj")]  # RoBERTa's has two layers
    rows = [len(t) for name, t in tensors if t.ndim == 2 and any(end in f".{name}" for end in ends)]
    return config.get("base_model_name_or_path"), kind, min(rows, default=None)


def _is_for_peft(folder: Path, attachment: Attachment | None) -> bool:
    """Whether PEFT must read `folder`: it is attached, or the file is of a type or has a feature that lorakit lacks."""
    if attachment is not None:
        return attachment.foreign
    if not (folder / peft_format.CONFIG_FILE).is_file():
        return False
    config = _read_json(folder / peft_format.CONFIG_FILE)
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if (kind := config.get("peft_type")) not in {adapter.peft_type for adapter in ADAPTERS.values()}:
        return kind in [known.value for known in PeftType]
    if feature := peft_format.foreign_feature(config):
        return hasattr(PEFT_TYPE_TO_CONFIG_MAPPING[kind], feature)  # PEFT drops what it does not know
    return not (folder / PACKED_FILE).is_file() and peft_format.adapts_more(_peft_tensors(folder))


def _load_peft(model: nn.Module, folder: Path, attachment: Attachment | None) -> nn.Module:
    from lorakit.adapters.peft.method import attach_file

    tensors = peft_format.renamed(model, _peft_tensors(folder))
    if attachment is None:
        return attach_file(model, folder, tensors)
    require_unmerged(model)
    return attachment.read(model, folder, tensors)


def _require_same(attachment: Attachment, stored: StoredAdapter) -> None:
    # what a file can tell a method by: "sparse" is stored as "lora" is
    here, there = (ADAPTERS[m].peft_type if m in ADAPTERS else m for m in (attachment.method, stored.method))
    if here != there:
        raise CheckpointError(f"holds method {stored.method!r}, but {attachment.method!r} is attached")
    for path, own in attachment.targets.items():  # the scale, which no tensor shows
        given = stored.targets.get(path, own)
        if (given.alpha, given.rslora) != (own.alpha, own.rslora):
            file, here = (f"alpha={one.alpha}, rslora={one.rslora}" for one in (given, own))
            remedy = "detach(model) first, then load_adapter attaches as the file says"
            raise CheckpointError(f"{path} has {file}; attached are {here}; {remedy}")


def _read(model: nn.Module, folder: Path) -> StoredAdapter:
    if (folder / peft_format.CONFIG_FILE).is_file():
        config = _read_json(folder / peft_format.CONFIG_FILE)
        if not (folder / PACKED_FILE).is_file():
            return peft_format.read(model, config, peft_format.renamed(model, _peft_tensors(folder)))
        return peft_format.read(model, config, unpack(*_read_tensors(folder / PACKED_FILE)))
    if not (folder / OWN_CONFIG_FILE).is_file():
        below = sorted(path.parent.name for path in folder.glob(f"*/{peft_format.CONFIG_FILE}"))
        named = f"; PEFT keeps a named adapter one folder down: name {folder / below[0]}" if below else ""
        raise CheckpointError(f"no adapter here: neither {peft_format.CONFIG_FILE} nor {OWN_CONFIG_FILE}{named}")
    config, (tensors, _) = _read_json(folder / OWN_CONFIG_FILE), _read_tensors(folder / OWN_TENSORS_FILE)
    method, trained = config.get("method"), config.get("trained", [])
    if method not in ("head", "full"):
        raise CheckpointError(f"method={method!r}: {OWN_CONFIG_FILE} may hold 'head' or 'full'")
    if (config.get("format"), config.get("version")) != ("lorakit", 1):
        found = f"format={config.get('format')!r}, version={config.get('version')!r}"
        raise CheckpointError(f"{OWN_CONFIG_FILE}: {found}; this lorakit reads format 'lorakit', version 1")
    modules = dict(model.named_modules())
    if absent := [path for path in trained if path not in modules]:
        raise CheckpointError(f"the file is for another base: this model has no module {absent[0]}")
    return StoredAdapter(method, AdapterSettings(), {}, trained, tensors)


def _read_json(path: Path) -> dict[str, Any]:
    with retold((ValueError, RecursionError), CheckpointError, f"{path.name} is not JSON"):
        config = json.loads(path.read_text(encoding="utf-8"))
    try:
        ConfigShape.model_validate(config)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise CheckpointError(f"{path.name}: {where or 'the whole'}: {error.errors()[0]['msg']}") from None
    return config


def _peft_tensors(folder: Path) -> dict[str, Tensor]:
    """What PEFT stored, the older pickled form too."""
    pickled = folder / "adapter_model.bin"
    if (folder / peft_format.TENSORS_FILE).is_file() or not pickled.is_file():
        return _read_tensors(folder / peft_format.TENSORS_FILE)[0]
    try:
        loaded = torch.load(pickled, map_location="cpu", weights_only=True)
        return {str(name): tensor.detach() for name, tensor in loaded.items()}
    except Exception as error:  # whatever unpickling raises, or no tensors by name
        raise CheckpointError(f"{pickled.name} is damaged: {' '.join(str(error).split())[:200]}") from None


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file's tensors and metadata."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise CheckpointError(f"{path.name} is missing")
    with retold(SafetensorError, CheckpointError, f"{path.name} is damaged"):
        tensors = load_file(path)
    with open(path, "rb") as file:
        header, found = header_and_digest(file)
    if (metadata := header.get("__metadata__", {})).get(DIGEST, found) != found:  # PEFT's own files say none
        raise CheckpointError(f"{path.name} is damaged: its tensors are not those that were written")
    return tensors, metadata
