"""FLoRA: which tokens of a batch get a backward, by a score of their gradient, and how far the backward goes."""

from lorakit.tokens.build import build_tokens
