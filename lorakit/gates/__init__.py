"""Which batches, and which tokens of them, get a backward pass."""

from lorakit.gates.batches import AlwaysOpen, Candidate, Decision, Gate
from lorakit.gates.tokens import AllTokens, TokenSelection

__all__ = ["AllTokens", "AlwaysOpen", "Candidate", "Decision", "Gate", "TokenSelection"]
