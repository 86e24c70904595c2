"""A language model with LoRA built in: train its base, freeze it, then train, store, switch and merge adapters."""

from __future__ import annotations

import doctest
import math
from collections.abc import Iterator
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.errors import CheckpointError, require
from lorakit.scratch.attention import PROJECTIONS, Block, SelfAttention, rotary_angles, visible_keys
from lorakit.scratch.layer import SIGMA, LoRALinear


class LoRATransformer(nn.Module):
    """A language model with LoRA built in; embeddings and output share one (never adapted) matrix.

    Args:
        vocab_size, d_model, num_heads, num_layers: its size; d_model / num_heads must be even (rotary positions).
        lora_r, lora_alpha, lora_dropout, lora_sigma: of every adapted projection, as `LoRALinear`'s.
        adapt_attention: put LoRA on the attention projections named in `attention_targets`.
        adapt_feedforward: put LoRA on both feed-forward projections.
        causal: each position sees itself and earlier ones only; False: all (an encoder).
        attention_targets: letters out of "qkvo".

    Raises:
        ParameterError: a size below 1, sizes that do not divide, nothing adapted, or a bad LoRA parameter.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model = LoRATransformer(vocab_size=50, d_model=32, num_heads=4, num_layers=2, adapt_feedforward=True)
    >>> ids = torch.randint(50, (4, 16))
    >>> later = torch.cat([ids[:, :8], ids[:, 8:].flip(1)], dim=1)
    >>> new = model.configure_lora_training()(ids).detach()
    >>> torch.allclose(new[:, :8], model(later)[:, :8], atol=1e-5)  # no position sees a later one
    True
    >>> model.store_adapter("new")
    >>> base, optimizer = model.base_state_dict(), torch.optim.AdamW(model.parameters(), lr=1e-2)
    >>> losses = []
    >>> for _ in range(20):
    ...     loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    ...     loss.backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    ...     losses.append(loss.item())
    >>> losses[-1] < 0.5 * losses[0]  # LoRA learns
    True
    >>> all(torch.equal(tensor, base[name]) for name, tensor in model.base_state_dict().items())  # the base does not
    True
    >>> trained = model(ids).detach()
    >>> model.merge()
    >>> torch.allclose(model(ids), trained, atol=1e-4), model.merged  # the same, at the base's cost
    (True, True)
    >>> model.switch_adapter("new")
    >>> model.unmerge()
    >>> torch.equal(model(ids), new)  # the stored adapter, bit for bit
    True
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        num_heads: int,
        num_layers: int,
        lora_r: int = 8,
        lora_alpha: float = 16.0,
        adapt_attention: bool = True,
        adapt_feedforward: bool = False,
        *,
        causal: bool = True,
        attention_targets: str = PROJECTIONS,
        lora_dropout: float = 0.0,
        lora_sigma: float | None = SIGMA,
    ):
        super().__init__()
        sizes = {"vocab_size": vocab_size, "d_model": d_model, "num_heads": num_heads, "num_layers": num_layers}
        for name, size in sizes.items():
            require(isinstance(size, int) and size >= 1, name, size, "must be an integer >= 1")
        step = 2 * num_heads  # heads of one even width
        require(d_model % step == 0, "d_model", d_model, f"must be a multiple of 2 * num_heads = {step}")
        known = bool(attention_targets) and set(attention_targets) <= set(PROJECTIONS)
        require(known, "attention_targets", attention_targets, 'must be one or more of the letters "qkvo"')
        allowed = "must be True where adapt_feedforward is False: nothing to train"
        require(adapt_attention or adapt_feedforward, "adapt_attention", adapt_attention, allowed)
        lora = partial(LoRALinear, r=lora_r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, lora_sigma=lora_sigma)
        attention = {name: lora if adapt_attention and name in attention_targets else nn.Linear for name in PROJECTIONS}
        feedforward = lora if adapt_feedforward else nn.Linear
        self.head_dim = d_model // num_heads
        self.embedding = nn.Embedding(vocab_size, d_model)
        nn.init.normal_(self.embedding.weight, std=d_model**-0.5)  # as output weights: logits of unit variance
        attentions = (SelfAttention(d_model, num_heads, causal, attention) for _ in range(num_layers))
        self.blocks = nn.ModuleList(Block(d_model, own, feedforward) for own in attentions)
        self.final_norm = nn.LayerNorm(d_model)
        self._adapters: dict[str, dict[str, Tensor]] = {}

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) for tokens (B, T); attention_mask (B, T) is true (or 1) where a token is not padding."""
        angles = rotary_angles(input_ids.shape[1], self.head_dim, input_ids.device)
        visible = None if attention_mask is None else visible_keys(attention_mask, self.blocks[0].attention.causal)
        x = self.embedding(input_ids)  # (B, T, D)
        for block in self.blocks:
            x = block(x, angles, visible)
        return F.linear(self.final_norm(x), self.embedding.weight)

    # what is trained

    def configure_lora_training(self) -> LoRATransformer:
        """Freeze everything but the LoRA factors (unmerging first)."""
        self.unmerge()
        adapter = self._lora_parameters()
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in adapter)
        return self

    def configure_pretraining(self) -> LoRATransformer:
        """Train every weight of the base and leave the LoRA factors alone (unmerging first)."""
        self.configure_lora_training()
        for parameter in self.parameters():
            parameter.requires_grad_(not parameter.requires_grad)
        return self

    def get_parameter_stats(self) -> dict[str, float]:
        """Counts of scalars: total, trainable, frozen, lora, base; and reduction_factor = total / trainable."""
        total = sum(p.numel() for p in self.parameters())
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        lora = sum(p.numel() for p in self._lora_parameters().values())
        counts = {"total": total, "trainable": trainable, "frozen": total - trainable, "lora": lora}
        return counts | {"base": total - lora, "reduction_factor": total / trainable if trainable else math.inf}

    # adapters: saved, loaded, stored, switched

    def lora_state_dict(self) -> dict[str, Tensor]:
        """Copies of A and B by parameter name; with `base_state_dict()` it makes up `state_dict()`."""
        return {name: p.detach().clone() for name, p in self._lora_parameters().items()}

    def base_state_dict(self) -> dict[str, Tensor]:
        """Copies of all weights but A and B; refused while merged."""
        lora = self._lora_parameters()
        return {name: tensor.clone() for name, tensor in self.state_dict().items() if name not in lora}

    def load_lora_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over an adapter; the base stays where it is, and a merged model stays merged, with the new adapter.

        Raises:
            CheckpointError: a factor is missing, unknown or of another shape; the model is then unchanged.
        """
        parameters = self._lora_parameters()
        for name in parameters.keys() ^ state.keys():
            raise CheckpointError(f"adapter {'lacks' if name in parameters else 'has an unknown'} factor {name}")
        for name, parameter in parameters.items():
            if state[name].shape != parameter.shape:
                raise CheckpointError(f"adapter's {name} is {tuple(state[name].shape)}, not {tuple(parameter.shape)}")
        merged = self.merged
        self.unmerge()
        self.load_state_dict(state, strict=False)
        if merged:
            self.merge()

    def store_adapter(self, name: str) -> None:
        """Keep a copy of the current adapter under `name`."""
        self._adapters[name] = self.lora_state_dict()

    def switch_adapter(self, name: str) -> None:
        """Use a stored adapter.

        Raises:
            ParameterError: none is stored under `name`.
        """
        require(name in self._adapters, "name", name, f"stored adapters are {', '.join(self._adapters) or 'none'}")
        self.load_lora_state_dict(self._adapters[name])

    def reset_lora(self) -> None:
        """Start a new adapter, at zero change; refused while merged."""
        for layer in self.lora_layers():
            layer.reset_lora()

    # inference at the base's cost

    @property
    def merged(self) -> bool:
        """Whether the updates are added into the weights."""
        return any(layer.merged for layer in self.lora_layers())

    def merge(self) -> None:
        """Add every update into its weight: the forward then costs what the base's costs."""
        for layer in self.lora_layers():
            layer.merge()

    def unmerge(self) -> None:
        """Give the base's weights back, bit for bit."""
        for layer in self.lora_layers():
            layer.unmerge()

    def lora_layers(self) -> Iterator[LoRALinear]:
        """Every adapted projection, in the order of the forward."""
        return (module for module in self.modules() if isinstance(module, LoRALinear))

    def _lora_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if name.rpartition(".")[2] in ("lora_A", "lora_B")}


if __name__ == "__main__":  # tries the examples above, and says so
    raise SystemExit(min(doctest.testmod(verbose=True).failed, 1))
