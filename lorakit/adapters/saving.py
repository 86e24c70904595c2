"""What was trained, written: as PEFT's adapter file, as our own for "head" and "full", or whole, merged, for anyone."""

import hashlib
import json
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from lorakit.adapters import peft_format
from lorakit.adapters.attachment import Attachment, attachment_of, is_merged, merged, require_unmerged, tied_names
from lorakit.adapters.layer import ADAPTERS
from lorakit.adapters.packed import PACKED_FILE, pack
from lorakit.base.nf4 import dense, is_four_bit
from lorakit.errors import require
from lorakit.files import require_empty, written
from lorakit.modules import once, replace_modules, require_own_names, set_until, unwrapping

OWN_CONFIG_FILE, OWN_TENSORS_FILE = "lorakit_config.json", "lorakit_trained.safetensors"
DIGEST = "lorakit_sha256"
RESUMED_FILE = "model.safetensors"  # what the Trainer resumes from and looks for its best model in


@unwrapping
def save_adapter(model: nn.Module, folder: str | Path, packed: bool = False) -> Path:
    """Write what was trained, task head included, to `folder`: whole, or nothing.

    An adapter is written as PEFT does (`PeftModel.from_pretrained` reads it); "head" and "full" as
    `lorakit_config.json` and `lorakit_trained.safetensors`. Other files in `folder` stay.

    Args:
        packed: store the tensors of an adapter in `lorakit_packed.safetensors`, those with enough zeros as a bitmap and
            their non-zero values: smaller, exact, and read by `load_adapter` alone; PEFT cannot read it.

    Raises:
        CheckpointError: the adapter is merged.
        LorakitError: nothing is attached.
        ParameterError: `folder` is a file, or `packed` where no adapter is attached ("head", "full").
    """
    require_unmerged(model)
    folder = Path(folder).expanduser()
    _save(model, folder, packed)
    return folder


def adapter_bytes(model: nn.Module) -> int:
    """Bytes of the tensors `save_adapter` stores (the file's header, a few kilobytes, not counted)."""
    return sum(tensor.nbytes for tensor in attachment_of(model).stored(model).values())


def _save(model: nn.Module, folder: Path, packed: bool = False, resumable: bool = False) -> None:
    attachment = attachment_of(model)
    require_own_names(model)
    require(not folder.exists() or folder.is_dir(), "folder", str(folder), "is a file; name a folder")
    if moved := attachment.moved(model):
        told = f"{moved[0]}: running statistics of {len(moved)} frozen layers moved in train()"
        remedy = "name the layers in `trainable`, keep them in eval(), or export(model)"
        warnings.warn(f"{told}, and an adapter file does not hold them: {remedy}", stacklevel=3)
    adapter = attachment.method in ADAPTERS
    require(adapter or not packed, "packed", packed, f"is for adapters, not {attachment.method!r}")
    with written(folder, folder=True) as temporary:
        if attachment.foreign:
            attachment.write(model, temporary)
        else:
            _write(model, attachment, temporary, packed)
        if resumable:
            trained = {*attachment.tensors(model).values()}  # each once, by its name in the model's `state_dict`
            named = once(model.state_dict(keep_vars=True)).items()
            save_file({name: t.contiguous() for name, t in named if t in trained}, temporary / RESUMED_FILE)
        # what stood there goes before the new files come: a crash never leaves a mixed pair
        for name in (peft_format.CONFIG_FILE, OWN_CONFIG_FILE, peft_format.TENSORS_FILE, OWN_TENSORS_FILE, PACKED_FILE):
            (folder / name).unlink(missing_ok=True)


def _write(model: nn.Module, attachment: Attachment, folder: Path, packed: bool) -> None:
    method = attachment.method
    stored = attachment.stored(model)
    again = tied_names(model)  # safetensors shares no memory
    tensors = {name: t.to("cpu", copy=name in again).contiguous() for name, t in stored.items()}
    metadata = {"format": "pt"}
    if method in ADAPTERS:
        config_file, tensors_file = peft_format.CONFIG_FILE, peft_format.TENSORS_FILE
        config = peft_format.to_config(model, attachment)
        tensors = {peft_format.name_in_file(method, name): tensor for name, tensor in tensors.items()}
    else:
        config_file, tensors_file = OWN_CONFIG_FILE, OWN_TENSORS_FILE
        config = {"format": "lorakit", "version": 1, "method": method, "trained": attachment.trained}
    if packed:
        tensors_file, (tensors, metadata) = PACKED_FILE, pack(tensors)
    save_file(tensors, folder / tensors_file, metadata=metadata | {DIGEST: "0" * 64})
    with open(folder / tensors_file, "r+b") as file:
        header, found = header_and_digest(file)  # its metadata in any order: the same tensors shall make the same file
        header["__metadata__"] = dict(sorted((header["__metadata__"] | {DIGEST: found}).items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    (folder / config_file).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def header_and_digest(file: BinaryIO) -> tuple[dict[str, Any], str]:
    """The header of a safetensors file, and the sha256 of its data, which lorakit's own say and PEFT passes over."""
    header = file.read(int.from_bytes(file.read(8), "little"))
    return json.loads(header), hashlib.file_digest(file, "sha256").hexdigest()


@unwrapping
def export(model: nn.Module, folder: str | Path) -> Path:
    """Write `model` with its adapter merged in and gone, as a plain transformers model: `from_pretrained` reads it.

    What was in 4 bits is written dense. `model` itself stays as it is, merged or not.

    Args:
        folder: new, or empty.

    Raises:
        LorakitError: nothing is attached, it cannot be merged, or merged weights are not finite.
        ParameterError: `folder` holds something, or `model` is no transformers model.
    """
    attachment, folder = attachment_of(model), Path(folder).expanduser()
    require_empty(folder, "folder")
    with merged(model, safe=True), attachment.bare(model) as plain:
        known = hasattr(plain, "save_pretrained")
        require(known, "model", type(plain).__name__, "is no transformers model, which alone has save_pretrained")
        packed = [module for module in plain.modules() if is_four_bit(module)]
        with ExitStack() as stack, written(folder, folder=True) as temporary:
            replace_modules(plain, new := {module: dense(module) for module in packed})
            stack.callback(replace_modules, plain, {module: old for old, module in new.items()})
            for config in (plain.config, plain.config.get_text_config()):
                if getattr(config, "tie_word_embeddings", False):
                    inputs, outputs = plain.get_input_embeddings, plain.get_output_embeddings()
                    # a model without outputs may name no inputs either
                    set_until(stack, config, tie_word_embeddings=outputs is None or inputs().weight is outputs.weight)
            of_packed = [(plain, name) for name in ("hf_quantizer", "_hf_peft_config_loaded", "_weight_conversions")]
            for owner, name in [*of_packed, (plain.config, "quantization_config")]:
                if vars(owner).get(name) is not None:
                    stack.callback(setattr, owner, name, vars(owner).pop(name))
            type(plain).save_pretrained(plain, temporary)
    return folder


def save_pretrained(
    model: nn.Module, save_directory: str | Path, is_main_process: bool = True, push_to_hub: bool = False, **_: Any
) -> None:
    """An adapted model's own: PEFT's adapter files; of a merged one, the whole model without adapter.

    transformers' own would write names that nobody can load. `RESUMED_FILE` is for a plain Trainer, whose checkpoints
    this writes.

    Raises:
        ParameterError: a whole model is in that folder, as the adapter's base may be.
    """
    require(not push_to_hub, "push_to_hub", True, "is not for adapted models; model.push_to_hub(…) is")
    if not is_main_process:
        return
    if is_merged(model):
        export(model, save_directory)
    else:
        folder = Path(save_directory).expanduser()
        files = [*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")]
        # transformers' say their format, ours nothing
        whole = any(file.name != RESUMED_FILE or safe_open(file, "pt").metadata() for file in files)
        told = "holds a whole model, which is not written over; name another folder"
        require(not (whole and (folder / "config.json").is_file()), "save_directory", str(folder), told)
        _save(model, folder, resumable=True)
