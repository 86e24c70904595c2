"""Small training runs for tests: random token rows with a learnable label, a tiny BERT, the real trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorakit.params import Params
from lorakit.seams import Decision, Gate
from lorakit.settings import GateSettings, SkipSettings, SparseSettings
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
    options = {"compute_metrics": metrics} | options
    return BudgetTrainer(
        model=model,
        args=training_arguments(Params(**values | (params or {})), str(folder)),
        train_dataset=rows(),
        eval_dataset=rows(40, seed=1),
        data_collator=collate,
        kind="classify",
        budget=budget or Budget(20, "steps"),
        **options,
    )


def kill(run, after: int) -> None:
    """Train `run` and stop it before micro-batch `after` + 1, as Ctrl-C does."""
    step, count = run.training_step, iter(range(1, 10**6))

    def stopping(*given):
        if next(count) > after:
            raise KeyboardInterrupt
        return step(*given)

    run.training_step = stopping
    with pytest.raises(KeyboardInterrupt):
        run.train()


def weights(model) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def equal(first, second) -> bool:
    """Bitwise equality of two lists of tensors."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Alternating(Gate):
    """Accepts every other window; its state is the count of windows seen."""

    name, selective = "alternating", True

    def __init__(self):
        self.seen = 0

    def decide(self, measured):
        self.seen += 1
        return Decision(accept=self.seen % 2 == 1, score=float(self.seen))

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


class Closed(Alternating):
    """Rejects every batch."""

    def decide(self, measured):
        return Decision(accept=False, score=0.0)


def tiny_bert(**options):
    """The same small classifier at every call, without dropout."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(
        BertConfig(**{"vocab_size": 99, "pad_token_id": 0, "num_labels": 2} | sizes | still | options)
    )


def tiny_gemma(**options):
    """The same small causal language model at every call."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    return Gemma3ForCausalLM(
        Gemma3TextConfig(**{"vocab_size": 99, "intermediate_size": 64, "pad_token_id": 0} | sizes | options)
    )


def language_rows(count: int = 100, seed: int = 0):
    """Token rows (8 to 16 of 99 words) whose labels are the tokens themselves, the first three unlabelled."""
    from datasets import Dataset

    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(
            1, 99, (int(torch.randint(8, 17, (1,), generator=generator)),), generator=generator
        ).tolist()
        made.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * 3 + ids[3:]})
    return Dataset.from_list(made)


def collate_language(batch):
    pads = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.tensor([row[name] + [pad] * (16 - len(row[name])) for row in batch]) for name, pad in pads.items()
    }


def tiny_masked(**options):
    """The same small masked language model at every call, without dropout."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForMaskedLM(BertConfig(**{"vocab_size": 99, "pad_token_id": 0} | sizes | still | options))


def skipping(mode: str = "prefix", **options: Any) -> SkipSettings:
    return SkipSettings(skip=mode, **{f"skip_{name}": value for name, value in options.items()})


def batch_gate(name: str, **options: Any) -> GateSettings:
    return GateSettings(gate=name, **{f"gate_{name}": value for name, value in options.items()})


def zeros(kind: str = "magnitude", sparsity: float = 0.5, factors: str = "both", **options: Any) -> SparseSettings:
    named = {{"start": "prune_start", "end": "prune_end"}.get(name, name): value for name, value in options.items()}
    return SparseSettings(sparsify=kind, sparsity=sparsity, sparse_factors=factors, **named)
