"""One batch: forward, gate, backward, step; on the Hugging Face Trainer, until the budget is spent."""

from lorakit.training.budget import Budget, Schedule
from lorakit.training.costs import FlopMeter, Ledger
from lorakit.training.trainer import BudgetTrainer, Diverged

__all__ = ["Budget", "BudgetTrainer", "Diverged", "FlopMeter", "Ledger", "Schedule"]
