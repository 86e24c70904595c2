"""What the tests of adapter files share: a trained adapter's file, and changes to it."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file, save_file
from small_models import trained_tensors
from torch import nn

from lorakit.adapters import attach, save_adapter

IDS = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(1))
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def twin(build):
    torch.manual_seed(7)
    return build()


def saved(build, folder, method="lora", **options):
    """A trained adapter's file, and its logits."""
    model = attach(twin(build), method, seed=0, **options)
    with torch.no_grad():
        for tensor in trained_tensors(model).values():
            tensor.add_(0.1 * torch.randn_like(tensor))
    save_adapter(model, folder)
    return logits(model)


def edit(folder, change=None, **fields):
    if change is not None:
        save_file(change(load_file(folder / TENSORS)), folder / TENSORS)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def multiplied(value, tensors):
    return {name: tensor * value for name, tensor in tensors.items()}


def cast(dtype, tensors):
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def without(part, tensors):
    return {name: tensor for name, tensor in tensors.items() if part not in name}


class Nested(nn.Module):
    """Layers whose paths are the ends of others', which differ from those in rank."""

    def __init__(self):
        super().__init__()
        self.query, self.inner = nn.Linear(8, 8), nn.ModuleDict({"query": nn.Linear(8, 8), "qXuery": nn.Linear(8, 8)})

    def forward(self, x):
        return self.inner["qXuery"](self.inner["query"](self.query(x)))
