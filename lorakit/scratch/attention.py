"""Pre-norm attention with rotary positions: x += Attention(LN x); x += FeedForward(LN x)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MakeLinear = Callable[[int, int], nn.Linear]
PROJECTIONS = "qkvo"


def rotary_angles(length: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, head_dim/2) of the rotary positions (Su et al. 2021, arXiv:2104.09864)."""
    frequencies = 10_000.0 ** -(torch.arange(0, head_dim, 2, device=device) / head_dim)
    angles = torch.arange(length, device=device)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turn pairs of features of x (B, heads, T, head_dim) by their position's angle: q.k depends on distance only."""
    cos, sin = (part.to(x.dtype) for part in angles)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def visible_keys(attention_mask: Tensor, causal: bool) -> Tensor:
    """(B, 1, T, T), True where query (row) may look at key (column). attention_mask: (B, T), true where not padding."""
    length = attention_mask.shape[1]
    visible = attention_mask.bool()[:, None, None, :].expand(-1, 1, length, length)
    if causal:
        visible = visible.tril()
    # a padding position sees itself: a row with nothing to see would be a softmax over nothing
    return visible | torch.eye(length, dtype=torch.bool, device=visible.device)


class SelfAttention(nn.Module):
    """Multi-head attention; `linear` makes the projections, one maker for each letter of "qkvo"."""

    def __init__(self, d_model: int, num_heads: int, causal: bool, linear: dict[str, MakeLinear]):
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (linear[name](d_model, d_model) for name in PROJECTIONS)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], visible: Tensor | None) -> Tensor:
        projected = (projection(x) for projection in (self.q_proj, self.k_proj, self.v_proj))  # (B, T, D) each
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in projected)  # (B, heads, T, head_dim)
        q, k = rotate(q, angles), rotate(k, angles)
        # `visible` holds the causal triangle already
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=self.causal and visible is None)
        return self.o_proj(h.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One layer: attention and a feed-forward of four times the width, each normalised before and added after."""

    def __init__(self, d_model: int, attention: SelfAttention, linear: MakeLinear):
        super().__init__()
        self.attention_norm, self.feedforward_norm = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.attention = attention
        self.up_proj, self.down_proj = linear(d_model, 4 * d_model), linear(4 * d_model, d_model)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], visible: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), angles, visible)
        return x + self.down_proj(F.gelu(self.up_proj(self.feedforward_norm(x))))
