"""SLoRA's gate: novelty = 1 − ‖W ẑ‖², z = Σ_t TensorSketch(h_t ⊗ e_t), W the main directions accepted so far."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from lorakit.errors import require, require_finite
from lorakit.gates.simple import ScoredGate
from lorakit.gates.threshold import ThresholdController
from lorakit.head import find_head
from lorakit.modules import usable_device
from lorakit.seams import GATES, Candidate
from lorakit.settings import GateSettings
from lorakit.sketches import FrequentDirections, TensorSketch, head_gradient

# of a gate's arguments those that a run's parameters say, and how these call them where it is not the same
NAMED = {"target_novelty": "rate", "target_novelty_scaler": "beta", "novelty_ema_rate": "ema",
         "reorth_every": "refresh", "k_topk": "topk"}  # fmt: skip
TOLD = (*NAMED, "m", "k", "burn_in", "rows", "decay", "leverage")


class HeadGradientGate(ScoredGate):
    """Gates whole batches by how far their head gradient leaves the span of those accepted before.

    The gradient of a linear head is Σ_t h_t ⊗ e_t with e = softmax(logits) − onehot(label): it needs no backward. Its
    TensorSketch z (m,) is compared with a rank-k basis that Frequent Directions keeps of the accepted ones.

    Used by a trainer through `measure` and `decide`, or by hand, once per batch and in this order::

        z = gate.embed(h, logits, labels)
        novelty = gate.novelty(z)
        if gate.accept(novelty):
            ...  # backward and step, on the forward pass that gave h and logits
            gate.update(z)
        gate.step()

    Args:
        d_hidden: H, width of what the head is given; vocab_size: V, its outputs (classes of a classifier).
        m: size of the sketch, a power of two (any size would work; powers of two keep every FFT fast).
        k: rank of the basis, below m. On isotropic gradients the novelty is 1 − k/m on average.
        target_novelty: the target *acceptance rate*, inside (0, 1); named so in the method's description.
        target_novelty_scaler: β, steepness of the sigmoid per spread of the novelty.
        novelty_ema_rate: weight of the newest batch in the running averages, and the step of the threshold.
        burn_in: batches at the start that are all accepted.
        seed: of sketch and coin; device: of the sketch.
        reorth_every: accepted batches between two refreshes of the basis (the first ones come at 1, 2, 4, 8, …).
        k_topk: logits kept of each error vector, the label's always among them; 0: all.
        kind: "causal" pairs h_t with the label at t + 1, "masked" and "classify" with its own.
        softcap: c of a head that caps its logits at c·tanh(logits / c).
        rows: rows Frequent Directions keeps, at least k + 1; 0: 2k.
        decay: forgetting of old accepted batches per accepted batch, 1 for none.
        leverage: weigh the basis' directions by σ²/(σ² + λ), λ = Σσ²/k: ridge-leverage novelty.

    Names and defaults are the method's as described, for runs of many thousand batches. A run's own parameters
    (`lorakit.settings.GateSettings`) are for runs of hundreds, where those would never leave the burn-in: 20 for 2000
    batches of burn-in, 4 for 128 batches between refreshes, 0.05 for 0.01 of running average.

    Raises:
        ParameterError: a value outside what is said above.
    """

    name = "novelty"
    needs_hidden = scores_novelty = True
    kept = (*ScoredGate.kept, "sketch", "directions", "basis", "updates")

    def __init__(
        self,
        d_hidden: int,
        vocab_size: int,
        m: int = 512,
        k: int = 64,
        target_novelty: float = 0.3,
        target_novelty_scaler: float = 10.0,
        novelty_ema_rate: float = 0.01,
        burn_in: int = 2000,
        seed: int = 0,
        device: str | torch.device = "cpu",
        reorth_every: int = 128,
        k_topk: int = 64,
        *,
        kind: str = "causal",
        softcap: float | None = None,
        rows: int = 0,
        decay: float = 1.0,
        leverage: bool = False,
    ):
        rows = rows or min(2 * k, m)
        require(m >= 2 and m & (m - 1) == 0, "m", m, "must be a power of two, at least 2")
        require(1 <= k < m, "k", k, f"must be at least 1 and below m={m}")
        require(k < rows <= m, "rows", rows, f"must be above k={k} and at most m={m}")
        require(reorth_every >= 1, "reorth_every", reorth_every, "must be at least 1")
        require(k_topk >= 0, "k_topk", k_topk, "must be at least 0 (0: all logits)")
        rates = {"steepness": target_novelty_scaler, "ema_rate": novelty_ema_rate, "burn_in": burn_in}
        super().__init__(ThresholdController(target_novelty, **rates), seed)
        self.d_hidden, self.vocab_size, self.m, self.k = d_hidden, vocab_size, m, k
        self.k_topk, self.reorth_every = min(k_topk or vocab_size, vocab_size), reorth_every
        self.kind, self.softcap, self.leverage = kind, softcap, leverage
        self.device = usable_device(device)
        generator = torch.Generator().manual_seed(seed)
        self.sketch = TensorSketch(d_hidden, vocab_size, m, generator=generator, device=self.device)
        self.directions = FrequentDirections(m, rows, decay=decay, device=self.device)
        self.basis = torch.zeros(0, m, device=self.device)  # (≤ k, m), rows weighted where `leverage`
        self.updates = 0
        self._undecided: tuple[float, bool] | None = None

    @classmethod
    def from_settings(cls, settings: GateSettings, model: torch.nn.Module, kind: str, seed: int) -> HeadGradientGate:
        """As the base class.

        Raises:
            LorakitError: a model without a linear head.
        """
        told = {name: getattr(settings, f"gate_{NAMED.get(name, name)}") for name in TOLD}
        return cls.of_model(model, kind, seed=seed, **told)

    @classmethod
    def of_model(cls, model: torch.nn.Module, kind: str, **told: Any) -> HeadGradientGate:
        """The gate of the head of `model`; `told`: what is not the model's."""
        head = find_head(model, kind)
        of_head = {"softcap": head.softcap, "device": head.module.weight.device}
        return cls(head.d_hidden, head.outputs, kind=kind, **of_head, **told)

    # the description's interface -----------------------------------------------------------------------

    @torch.no_grad()
    def embed(
        self,
        h: torch.Tensor,
        logits: torch.Tensor,
        labels: torch.Tensor,
        losses: torch.Tensor | None = None,
        kind: str | None = None,
        maxima: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sketch of the batch's head gradient, (m,) float32, not normalised: sketches of parts add up.

        Args:
            h: (B, T, H), or (B, H) of a classifier; logits: (B, T, V) or (B, V); labels: (B, T) or (B,), not shifted.
            losses: (B·T,) or (B,), the negative log-likelihood at every position, where it is known: it saves a pass
                over the vocabulary.
            kind: of this batch, where it is not the gate's own.
            maxima: (B·T, …), the logits' `sketches.group_maxima`, where they are known: it saves another.

        Raises:
            ParameterError: sizes that are not this gate's, or logits that are not finite.
        """
        require(h.shape[-1] == self.d_hidden, "h", tuple(h.shape), f"must be d_hidden={self.d_hidden} wide")
        require(logits.shape[-1] == self.vocab_size, "logits", tuple(logits.shape), f"must be {self.vocab_size} wide")
        known = {"softcap": self.softcap, "losses": losses, "maxima": maxima}
        return head_gradient.sketch_batch(self.sketch, h, logits, labels, kind or self.kind, self.k_topk, **known)

    def novelty(self, z: torch.Tensor) -> float:
        """1 − ‖W ẑ‖² in [0, 1]; 1 while the basis is empty, 0 for z = 0, which would teach nothing."""
        length = torch.linalg.vector_norm(z.double())
        require_finite(math.isfinite(length), "z", length.item())
        if length == 0:
            return 0.0
        direction = (z.double() / length).float().to(self.basis.device)
        return float(min(1.0, max(0.0, 1 - torch.sum((self.basis @ direction).double() ** 2).item())))

    def accept(self, novelty: float) -> bool:
        """Draw the decision: yes with probability σ(β(s − τ)), always during the burn-in."""
        drawn = torch.rand((), generator=self.generator, dtype=torch.float64).item()
        accepted = drawn < self.controller.probability(novelty)
        self._undecided = (novelty, accepted)
        return accepted

    @torch.no_grad()
    def update(self, z: torch.Tensor) -> None:
        """Take an accepted batch's sketch (m,) into the basis."""
        length = torch.linalg.vector_norm(z.double())
        if length > 0:
            self.directions.insert((z.double() / length).float().to(self.device))
            self.updates += 1
            early = self.updates < self.reorth_every and self.updates & (self.updates - 1) == 0  # 1, 2, 4, 8, …
            if early or self.updates % self.reorth_every == 0:
                self.basis = self.directions.basis(self.k)
                if self.leverage and len(self.basis):
                    energy = self.directions.singular_values()[: len(self.basis)] ** 2
                    self.basis = self.basis * torch.sqrt(energy / (energy + energy.sum() / self.k)).float()[:, None]

    def step(self) -> None:
        """Close the batch that `accept` decided about: the rate is averaged and the threshold moves."""
        if self._undecided is None:
            raise RuntimeError("HeadGradientGate.step(): call accept() first, once for each batch")
        self.controller.observe(*self._undecided)
        self._undecided = None

    # a trainer's interface -----------------------------------------------------------------------------

    def measure(self, candidate: Candidate) -> torch.Tensor:
        seen = (candidate.hidden, candidate.logits, candidate.labels, candidate.token_losses, candidate.kind)
        return self.embed(*seen, candidate.maxima).double().cpu()

    def score(self, measured: torch.Tensor) -> float:
        return self.novelty(measured[: self.m])

    def learn(self, measured: torch.Tensor) -> None:
        self.update(measured[: self.m])

    def flops(self, candidate: Candidate) -> float:
        """The labels' sketches; the projection; the SVD's share."""
        rows = 2 * self.directions.rows
        sketched = candidate.targets * self.sketch.flops(self.k_topk + 1)
        return sketched + 2 * self.k * self.m + 6 * rows * rows * self.m / self.directions.rows

    def state_bytes(self) -> int:
        """Bytes of everything the gate holds between two batches."""
        held = tree_leaves(self.state_dict())
        return sum(leaf.numel() * leaf.element_size() if torch.is_tensor(leaf) else 8 for leaf in held)

    def report(self) -> dict[str, Any]:
        settings = {"m": self.m, "k": self.k, "rows": self.directions.rows, "k_topk": self.k_topk}
        return super().report() | settings | {"state_bytes": self.state_bytes()}


GATES[HeadGradientGate.name] = HeadGradientGate
