"""Small random decoders of several architectures, batches for them, and their gradients with chosen tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorakit import models
from lorakit.adapters import attach
from lorakit.settings import Gating
from lorakit.tokens import build_tokens
from lorakit.tokens.selection import Chosen, TokenGate

B, T, WINDOW = 3, 16, 5
SIZES = {
    **{"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "intermediate_size": 64, "pad_token_id": 0},
}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}


def of(name: str, attention: str = "sdpa", **options) -> nn.Module:
    """A small random decoder of one architecture, its own weights large enough for positions and windows to matter."""
    import transformers

    torch.manual_seed(0)
    if name == "toy":
        return models.load("toy-decoder", "causal", attention=attention).model
    given = {"attn_implementation": attention} | options
    if name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=99, n_embd=32, n_head=2, n_positions=64, embd_pdrop=0, attn_pdrop=0,
            initializer_range=0.2, **{"n_layer": 2, "resid_pdrop": 0} | given,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config)
    if name == "opt":
        sizes = {**SIZES, "word_embed_proj_dim": 32, "ffn_dim": 64, "max_position_embeddings": 64, "dropout": 0}
        return transformers.OPTForCausalLM(transformers.OPTConfig(**sizes, init_std=0.2, **given))
    own = {
        "gemma": MIXED | {"head_dim": 16, "query_pre_attn_scalar": 2},
        "qwen2": MIXED | {"use_sliding_window": True, "max_window_layers": 1},
    }
    own |= {"mistral": {"sliding_window": WINDOW}, "qwen3": {"head_dim": 16}, "llama": {}}
    prefix = {"gemma": "Gemma3", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral", "llama": "Llama"}[name]
    make = getattr(transformers, f"{prefix}{'Text' if name == 'gemma' else ''}Config")
    config = make(**SIZES | own[name] | {"initializer_range": 0.2} | given)
    return getattr(transformers, f"{prefix}ForCausalLM")(config)


ALL = ("gemma", "llama", "qwen2", "qwen3", "mistral", "gpt2", "toy")


def adapted(model: nn.Module, method: str = "lora") -> nn.Module:
    """In the state of training; adapters are no longer zero."""
    model = attach(model, method, rank=4, seed=0)
    return prepared(model)


def prepared(model: nn.Module) -> nn.Module:
    model.config.use_cache = False
    return nonzero(model).train()


def nonzero(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("_B") or "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def batch(kind: str = "right") -> dict[str, Tensor]:
    """Three rows of 16, every token a target: padded right or left, after prompts, packed, or bare."""
    ids = torch.randint(1, 99, (B, T), generator=torch.Generator().manual_seed(2))
    labels, mask = ids.clone(), torch.ones_like(ids)
    if kind == "packed":
        positions = torch.tensor([[*range(4), *range(9), *range(3)], [*range(16)], [*range(2), *range(14)]])
        return {"input_ids": ids, "position_ids": positions, "labels": labels.masked_fill(positions == 0, -100)}
    if kind == "bare":
        return {"input_ids": ids, "labels": labels}
    for row, width in ((1, 4), (2, 7)):
        off = slice(0, width) if kind in ("left", "prompt") else slice(T - width, T)
        labels[row, off] = -100
        mask[row, off] = int(kind == "prompt")
    if kind == "left":  # what precedes a first real token is padding
        labels[torch.arange(B), mask.argmax(1)] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def selection(model: nn.Module, kind: str = "causal", **settings) -> TokenGate:
    given = {"method": "random", "topk_tokens": 0.9999, "mode": "fractional"} | settings
    return build_tokens(Gating(**given), model, kind)


def chosen_of(tokens: TokenGate) -> list[Chosen]:
    """What `tokens` will have chosen, batch by batch."""
    found, choose = [], tokens.choose
    tokens.choose = lambda *given: (found.append(choose(*given)), found[-1])[1]
    return found


def split(given: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    return {name: value for name, value in given.items() if name != "labels"}, given["labels"]


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Each gradient's difference relative to its norm, and what float32 leaves of the whole gradient's."""
    assert found.keys() == expected.keys() and found
    whole = torch.stack([value.norm() for value in expected.values()]).norm()
    for name, value in expected.items():
        assert value.norm() > 0, name
        assert (found[name] - value).norm() <= tolerance * (value.norm() + 0.1 * whole), name
