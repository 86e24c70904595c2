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
from lorakit.training.loss import MeanLoss

# parameters of a whole run that is over soon
QUICK = {"evaluations": 1, "latency_repeats": 0, "predict_memory": False, "max_test": 8, "max_validation": 8}


def _random_rows(count: int, seed: int, shortest: int, above: int, labels):
    from datasets import Dataset

    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(shortest, above, (1,), generator=generator))
        ids = torch.randint(1, 99, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels(ids)})
    return Dataset.from_list(made)


def rows(count: int = 100, seed: int = 0):
    """Rows of 5 to 20 tokens; the label is whether the first token is odd."""
    return _random_rows(count, seed, 5, 20, lambda ids: ids[0] % 2)


def _padded(batch, width: int, **pads: int) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([r[name] + [pad] * (width - len(r[name])) for r in batch]) for name, pad in pads.items()}


def collate(batch):
    width = -(-max(len(row["input_ids"]) for row in batch) // 8) * 8
    labels = torch.tensor([row["labels"] for row in batch])
    return _padded(batch, width, input_ids=0, attention_mask=0) | {"labels": labels}


def metrics(prediction) -> dict[str, float]:
    statistics = prediction.predictions
    return {
        "loss": float(statistics[:, 0].sum() / statistics[:, 1].sum()),
        "accuracy": float((statistics[:, 2] == statistics[:, 3]).mean()),
    }


def trainer(model, folder, *, budget=None, params=None, language=False, **options) -> BudgetTrainer:
    """A BudgetTrainer on the random rows."""
    values = {"batch_size": 8, "gradient_accumulation": 2, "learning_rate": 1e-2, "seed": 3, "dropout": 0.0}
    made, collator = (language_rows, collate_language) if language else (rows, collate)
    data = {
        "train_dataset": made(),
        "eval_dataset": made(40, seed=1),
        "data_collator": collator,
        "compute_metrics": metrics,
    }
    return BudgetTrainer(
        model=model,
        args=training_arguments(Params(**values | (params or {})), str(folder)),
        kind="causal" if language else "classify",
        budget=budget or Budget(20, "steps"),
        **data | options,
    )


def plain(model, arguments, language=False, own_loss=False):
    """transformers' Trainer on the random rows, with the mean loss or the model's own."""
    from transformers import Trainer

    made, collator = (language_rows, collate_language) if language else (rows, collate)
    loss = None if own_loss else MeanLoss("causal" if language else "classify")
    return Trainer(model, arguments, collator, made(), compute_loss_func=loss)


def ran(run, **options):
    """The trainer, once it has trained."""
    run.train(**options)
    return run


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


def killed_and_resumed(made, after: int):
    """A whole run of `made("whole")`, and one of `made("killed")` that was stopped and resumed."""
    whole = ran(made("whole"))
    kill(made("killed"), after)
    return whole, ran(made("killed"), resume_from_checkpoint=True)


def weights(model) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def equal(first, second) -> bool:
    """Bitwise equality of two lists of tensors."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def near(first, second, atol: float = 1e-6) -> bool:
    return all(torch.allclose(a, b, atol=atol) for a, b in zip(first, second, strict=True))


class Open(Gate):
    """Accepts everything, but through the window's end like every gate that selects."""

    name, selective = "open", True


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


TINY = {"vocab_size": 99, "pad_token_id": 0, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY |= {"intermediate_size": 64}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert(head: str = "SequenceClassification", **options):
    """A small BERT with random weights."""
    import transformers

    return getattr(transformers, f"BertFor{head}")(transformers.BertConfig(**TINY | options))


def tiny_bert(**options):
    """The same small classifier at every call, without dropout."""
    torch.manual_seed(0)
    return bert(**STILL | options)


def tiny_masked(**options):
    """The same small masked language model at every call, without dropout."""
    torch.manual_seed(0)
    return bert("MaskedLM", **STILL | options)


def tiny_gemma(**options):
    """The same small causal language model at every call."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    return Gemma3ForCausalLM(Gemma3TextConfig(**TINY | {"num_key_value_heads": 1, "head_dim": 16} | options))


def language_rows(count: int = 100, seed: int = 0):
    """Token rows (8 to 16 of 99 words) whose labels are the tokens themselves, the first three unlabelled."""
    return _random_rows(count, seed, 8, 17, lambda ids: [-100] * 3 + ids[3:])


def half_empty(count: int = 80, every: int = 16):
    """Language rows of which the first eight of every 16 (or `every`) have no label."""
    return language_rows(count).map(
        lambda row, i: {"labels": [-100] * len(row["labels"])} if i % every < 8 else row, with_indices=True
    )


def collate_language(batch):
    return _padded(batch, 16, input_ids=0, attention_mask=0, labels=-100)


def skipping(mode: str = "prefix", **options: Any) -> SkipSettings:
    return SkipSettings(skip=mode, **{f"skip_{name}": value for name, value in options.items()})


def batch_gate(name: str, **options: Any) -> GateSettings:
    return GateSettings(gate=name, **{f"gate_{name}": value for name, value in options.items()})


def zeros(kind: str = "magnitude", sparsity: float = 0.5, factors: str = "both", **options: Any) -> SparseSettings:
    named = {{"start": "prune_start", "end": "prune_end"}.get(name, name): value for name, value in options.items()}
    return SparseSettings(sparsify=kind, sparsity=sparsity, sparse_factors=factors, **named)
