"""One batch: forward, gate, backward, step; on the Hugging Face Trainer, until the budget is spent."""

import logging

# On import, which transformers does, bitsandbytes complains of an optional kernel that would have to be downloaded.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

from lorakit.training.budget import Budget, Schedule  # noqa: E402
from lorakit.training.costs import FlopMeter, Ledger  # noqa: E402
from lorakit.training.trainer import BudgetTrainer, Diverged  # noqa: E402

__all__ = ["Budget", "BudgetTrainer", "Diverged", "FlopMeter", "Ledger", "Schedule"]
