"""A tensor with zeros in ⌈n/8⌉ + b·nnz bytes, one bit per entry and the values that are not zero, instead of b·n."""

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from lorakit.errors import CheckpointError

PACKED_FILE = "lorakit_packed.safetensors"
BITMAP, VALUES = "::bitmap", "::values"  # no tensor of a module has a colon in its name
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """`tensors` as they are stored, and the file's metadata; each is packed only where that takes fewer bytes.

    Entry i is bit i mod 8 of byte i // 8 of the bitmap, and set unless all bits of the entry are zero: −0 and NaN are
    values, so that unpacking is exact to the bit. The shapes of what is packed are in the metadata.
    """
    stored: dict[str, Tensor] = {}
    shapes: dict[str, torch.Size] = {}
    for name, tensor in tensors.items():
        if stored_bytes(tensor) < tensor.nbytes:
            nonzero = _nonzero(tensor)
            bits = torch.nn.functional.pad(nonzero, (0, -len(nonzero) % 8)).view(-1, 8)
            stored[name + BITMAP] = (bits << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)
            stored[name + VALUES] = tensor.flatten()[nonzero]
            shapes[name] = tensor.shape
        else:
            stored[name] = tensor
    return stored, {"format": "lorakit-packed", "version": "1", "shapes": json.dumps(shapes, sort_keys=True)}


def unpack(stored: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """What `pack` was given.

    Raises:
        CheckpointError: another format, or parts that are missing or do not belong together.
    """
    if (metadata.get("format"), metadata.get("version")) != ("lorakit-packed", "1"):
        raise CheckpointError(f"{PACKED_FILE} is not of format lorakit-packed, version 1")
    tensors = {name: tensor for name, tensor in stored.items() if not name.endswith((BITMAP, VALUES))}
    for name, shape in json.loads(metadata.get("shapes", "{}")).items():
        bitmap, values = stored.get(name + BITMAP), stored.get(name + VALUES)
        count = torch.Size(shape).numel()
        if bitmap is None or values is None or len(bitmap) != -(-count // 8):
            raise CheckpointError(f"{PACKED_FILE} is damaged: {name} {tuple(shape)} lacks its bitmap or values")
        nonzero = (bitmap.view(-1, 1) >> torch.arange(8, dtype=torch.uint8) & 1).flatten()[:count].bool()
        if (found := nonzero.sum()) != len(values):
            raise CheckpointError(f"{PACKED_FILE} is damaged: {name} has {len(values)} values, {found} bits")
        tensors[name] = torch.zeros(count, dtype=values.dtype).masked_scatter_(nonzero, values).view(shape)
    return tensors


def stored_bytes(tensor: Tensor) -> int:
    """Bytes of `tensor` in a packed file, without its header: packed, or dense where that is smaller."""
    return min(-(-tensor.numel() // 8) + int(_nonzero(tensor).sum()) * tensor.element_size(), tensor.nbytes)


def _nonzero(tensor: Tensor) -> Tensor:
    """(n,) bool: entries with any bit set."""
    return tensor.flatten().view(_INTEGERS[tensor.element_size()]) != 0
