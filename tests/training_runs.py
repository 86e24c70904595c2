"""Small training runs for tests: random token rows with a learnable label, a tiny BERT, the real trainer."""

from __future__ import annotations

import torch

from lorakit.gates import Decision
from lorakit.params import Params
from lorakit.training import Budget, BudgetTrainer
from lorakit.training.arguments import training_arguments


def rows(count: int = 100, seed: int = 0):
    """Rows of 5 to 20 tokens; the label is whether the first token is odd."""
    from datasets import Dataset

    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(5, 20, (1,), generator=generator))
        ids = torch.randint(1, 99, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "attention_mask": [1] * length, "labels": ids[0] % 2})
    return Dataset.from_list(made)


def collate(batch):
    width = -(-max(len(row["input_ids"]) for row in batch) // 8) * 8
    padded = {
        name: [row[name] + [0] * (width - len(row[name])) for row in batch] for name in ("input_ids", "attention_mask")
    }
    return {
        **{name: torch.tensor(value) for name, value in padded.items()},
        "labels": torch.tensor([r["labels"] for r in batch]),
    }


def metrics(prediction) -> dict[str, float]:
    statistics = prediction.predictions
    return {
        "loss": float(statistics[:, 0].sum() / statistics[:, 1].sum()),
        "accuracy": float((statistics[:, 2] == statistics[:, 3]).mean()),
    }


def trainer(model, folder, *, budget=None, params=None, **options) -> BudgetTrainer:
    """A BudgetTrainer on the random rows."""
    values = {"batch_size": 8, "gradient_accumulation": 2, "learning_rate": 1e-2, "seed": 3, "dropout": 0.0}
    return BudgetTrainer(
        model=model,
        args=training_arguments(Params(**values | (params or {})), str(folder)),
        train_dataset=rows(),
        eval_dataset=rows(40, seed=1),
        data_collator=collate,
        compute_metrics=metrics,
        kind="classify",
        budget=budget or Budget(20, "steps"),
        **options,
    )


def weights(model) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def equal(first, second) -> bool:
    """Bitwise equality of two lists of tensors."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Alternating:
    """Accepts every other batch; its state is the count of batches seen."""

    def __init__(self):
        self.seen = 0

    def decide(self, candidate):
        self.seen += 1
        return Decision(accept=self.seen % 2 == 1, score=float(self.seen))

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


class Closed(Alternating):
    """Rejects every batch."""

    def decide(self, candidate):
        return Decision(accept=False, score=0.0)
