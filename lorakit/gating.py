"""What a token selection is told: the keys of `gating:` in a params file."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from lorakit.errors import require


class Gating(BaseModel):
    """Which tokens get a backward.

    method: "baseline": all; "random": a share drawn uniformly; "flora": chosen by `score`.
    topk_tokens: share of the predictions that is kept, in (0, 1]; 1 is the baseline, whatever the method.
    score: "sketch": ‖TensorSketch(h ⊗ e)‖ from the most probable words; "gradient_norm": ‖h‖·‖e‖, which that estimates;
        "loss"; "entropy" of the prediction; "hidden_gradient": ‖W_Uᵀe‖, the gradient that reaches the last layer.
    sketch_dim: size m of the sketch; topk_logits: words kept of each error, the label's always among them; 0: all.
    policy: "topk": those with the largest scores, biased; "pps": drawn with probability proportional to the score and
        weighted by its inverse (Horvitz and Thompson 1952), unbiased for the gradient of the mean loss in mode
        "gather".
    per: "batch": the share is of the whole (micro-)batch's predictions; "sequence": of each sequence's own.
    mode: "gather": the chosen hidden states go through the head, all tokens through the layers; "fractional": only the
        chosen tokens run through the layers a second time, against the recorded keys and values of all (TokenTune).
        Where a frozen head's logits of the chosen can be kept while all are scored (top-k), the head runs once.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    method: Literal["baseline", "random", "flora"] = "baseline"
    topk_tokens: float = Field(0.2, gt=0, le=1)
    score: Literal["sketch", "gradient_norm", "loss", "entropy", "hidden_gradient"] = "sketch"
    sketch_dim: int = Field(512, ge=2)
    topk_logits: int = Field(64, ge=0)
    policy: Literal["topk", "pps"] = "topk"
    per: Literal["batch", "sequence"] = "batch"
    mode: Literal["gather", "fractional"] = "gather"

    def check(self, precision: str, gradient_checkpointing: bool, skips: bool) -> None:
        """Refuse what does not go together with the rest of a run.

        Raises:
            ParameterError: fp16; checkpointing, or skipped layers, in mode "fractional".
        """
        if not self.selective:
            return
        scaler = "fp16's gradient scaler needs a backward every step, a batch without labels has none; use bf16 or fp32"
        require(precision != "fp16", "precision", precision, scaler)
        twice = self.mode == "fractional"
        dropped = "drops the keys that gating.mode 'fractional' records; leave it out, or use 'gather'"
        require(not twice or not gradient_checkpointing, "gradient_checkpointing", True, dropped)
        require(not twice or not skips, "gating.mode", self.mode, "does not go with SkipLoRA; use 'gather' with it")

    @property
    def selective(self) -> bool:
        return self.method != "baseline" and self.topk_tokens < 1

    @property
    def weighted(self) -> bool:
        """Whether the chosen are weighted by their inverse probabilities."""
        return self.method == "flora" and self.policy == "pps"
