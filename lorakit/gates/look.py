"""A batch gate that looks on while tokens are chosen: at a batch's predictions in chunks, whose measurements add up."""

import torch
from torch import Tensor

from lorakit.head import Head
from lorakit.seams import Candidate, Gate


class GateLook:
    """Called with every chunk of a micro-batch's predictions, see `lorakit.seams.Look`.

    Args:
        gate: measures each chunk. per_label: what turns a sum of losses into the batch's share of the window's mean.
        head: of the model.
    """

    def __init__(self, gate: Gate, per_label: float, head: Head):
        self.gate, self.per_label, self.head = gate, per_label, head
        self.rate = gate.target_rate  # the share of batches whose loss will be asked for
        self.grouped = gate.needs_hidden  # whether `group_maxima` of the logits are wanted
        self._measured: Tensor | None = None

    def __call__(
        self, hidden: Tensor, logits: Tensor, labels: Tensor, losses: Tensor, maxima: Tensor | None = None
    ) -> None:
        loss = losses.double().sum() * self.per_label
        seen = {"hidden": hidden[None], "softcap": self.head.softcap, "token_losses": losses, "maxima": maxima}
        # nothing is left to shift
        measured = self.gate.measure(Candidate(loss, logits[None], labels[None], kind="masked", **seen))
        self._measured = measured if self._measured is None else self._measured + measured

    def measured(self) -> Tensor:
        """The micro-batch's measurement, (n,) float64: zeros where it had no prediction."""
        if self._measured is None:
            device = self.head.module.weight.device
            hidden, logits = (torch.zeros(0, n, device=device) for n in (self.head.d_hidden, self.head.outputs))
            self(hidden, logits, torch.zeros(0, dtype=torch.long, device=device), torch.zeros(0, device=device))
        return self._measured
