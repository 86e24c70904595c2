"""SkipLoRA where a forward does not visit every adapter: what it does not visit counts for nothing."""

from __future__ import annotations

import pytest
import torch
import training_runs as runs
from skipping import ALWAYS, at_work
from torch import nn

from lorakit.adapters import attach
from lorakit.errors import LorakitError
from lorakit.skip.controller import SkipLoRA


class Encoder(nn.Module):
    """PyTorch's own encoder, whose attention reads the weights of `out_proj` without calling it."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.encoder(x)[:, 0])


class Dropped(nn.Module):
    """LayerDrop: every step leaves out the layers it is told to."""

    def __init__(self):
        super().__init__()
        self.layers, self.out = nn.ModuleList(nn.Linear(16, 16) for _ in range(4)), ()

    def forward(self, x):
        for place, layer in enumerate(self.layers):
            x = x if place in self.out else x + layer(x).tanh()
        return x.mean(1)


def started(model, targets, **options):
    torch.manual_seed(0)
    model = at_work(attach(model, "lora", rank=4, target_modules=targets, trainable=(), seed=0).train())
    skip = SkipLoRA(model, settings=runs.skipping(**ALWAYS | options))
    skip.begin()
    return model, skip


def step(model, skip, optimizer=None):
    skip.begin_step(0.5)
    model(torch.randn(3, 5, 16)).square().sum().backward()
    skip.after_step(0.5, optimizer)
    model.zero_grad()


@pytest.mark.parametrize("decide", ["ema", "forward"])
def test_a_prefix_that_is_not_cut_is_refused(decide):
    """The weights that attention reads for itself are adapted, so that a gradient goes through them all the same."""
    model, skip = started(Encoder(), ["linear1", "linear2", "out_proj"], mode="prefix", decide=decide, share=0.5)
    with pytest.raises(LorakitError, match="linear1 requires a gradient"):
        for _ in range(4):
            step(model, skip)


@pytest.mark.parametrize("decide", ["ema", "forward"])
def test_an_encoder_of_pytorch_skips_what_its_forward_visits(decide):
    model, skip = started(Encoder(), ["linear1", "linear2", "out_proj"], mode="adapter", decide=decide, share=0.5)
    visited = [not path.endswith("out_proj") for path in skip.paths]
    for _ in range(4):
        step(model, skip)
    with pytest.warns(UserWarning, match="no forward called them: encoder.layers.0.self_attn.out_proj, "):
        skip.end()
    assert [m is not None for m in skip.metric] == visited and sum(visited) == 8
    idle = [path for path, count in zip(skip.paths, skip.skipped, strict=True) if count]
    assert idle and not any(path.endswith("out_proj") for path in idle)
    assert max(skip.skipped) == 3  # all but the first step, which measured
    again = SkipLoRA(model, settings=skip.settings)
    again.load_state_dict(skip.state_dict())
    assert again.metric == skip.metric


@pytest.mark.parametrize("decide", ["ema", "forward"])
@pytest.mark.parametrize("out", [[(0,), (), (1, 2)], [(), (0, 1), (3,)], [(0, 1, 2, 3), (), ()]])
def test_a_dropped_layer_keeps_what_was_measured_of_it(out, decide):
    model, skip = started(Dropped(), r"layers\.[0-9]", mode="adapter", decide=decide, threshold=0.0)
    for dropped in out:
        before = skip.metric
        model.out = dropped
        step(model, skip) if len(dropped) < 4 else empty(skip)
        assert skip.metric is None or all(
            m == (before and before[place]) if place in dropped else m > 0 for place, m in enumerate(skip.metric)
        )
    assert None not in skip.metric


def empty(skip):
    """A step whose forward visits nothing."""
    skip.begin_step(0.5)
    skip.after_step(0.5, None)
