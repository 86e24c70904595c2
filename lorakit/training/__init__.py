"""One batch: forward, gate, backward, step; on the Hugging Face Trainer, until the budget is spent."""

from lorakit.training.costs import Budget, FlopMeter, Ledger, Schedule
from lorakit.training.flora import FLoRATrainer
from lorakit.training.gated import GatedTrainer
from lorakit.training.slora import SLoRATrainer
from lorakit.training.trainer import BudgetTrainer
from lorakit.training.window import Diverged
