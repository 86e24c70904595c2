"""Scores of tokens against autograd through a real model's head; the sketch's against the exact one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import training_runs as runs
from gate_streams import pairs
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit.errors import ParameterError
from lorakit.head import Head, rows
from lorakit.settings import Gating
from lorakit.tokens import build_tokens
from lorakit.tokens.head_loss import HeadLoss
from lorakit.tokens.scores import TokenScore
from lorakit.tokens.selection import TokenGate

CAP = 3.0
models = pytest.mark.parametrize(("kind", "softcap"), [("causal", None), ("causal", CAP), ("masked", None)])


def model_of(kind: str, softcap: float | None = None) -> nn.Module:
    """Logits far from uniform; the head's weights are its own."""
    options = {"tie_word_embeddings": False}
    model = runs.tiny_masked(**options) if kind == "masked" else runs.tiny_gemma(**options)
    model.config.final_logit_softcapping = softcap
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model.eval()


def batch() -> dict[str, Tensor]:
    """Three rows of 21 tokens: prompts of several lengths, padding, a row's gap without labels."""
    ids = torch.randint(1, 99, (3, 21), generator=torch.Generator().manual_seed(1))
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[0, :4] = labels[1, 9:12] = labels[2, 17:] = -100
    mask[2, 17:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def scorer(name: str, head: Head, **settings) -> TokenScore:
    return TokenScore(Gating(method="flora", score=name, **{k: v for k, v in settings.items() if k != "seed"}), head,
                      nn.Module(), settings.get("seed", 0))  # fmt: skip


def gate(model: nn.Module, kind: str, score: str, **settings) -> TokenGate:
    return build_tokens(Gating(method="flora", score=score, **settings), model, kind)


def seen(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What the head was given, (B, T, H), and the logits, both with their graph."""
    given = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: given.append(args[0]))
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    handle.remove()
    return given[0], logits


def oracle(name: str, model: nn.Module, kind: str) -> Tensor:
    """The score of every prediction by autograd through the model's own logits, (N,)."""
    hidden, logits = seen(model, batch())
    head, found = model.get_output_embeddings(), []
    for (b, t), word in pairs(batch()["labels"], kind):
        loss = F.cross_entropy(logits[b, t][None], torch.tensor([word]))
        if name == "loss":
            found.append(loss.detach())
        elif name == "entropy":
            found.append(torch.distributions.Categorical(logits=logits[b, t].detach()).entropy())
        elif name == "gradient_norm":
            found.append(torch.autograd.grad(loss, head.weight, retain_graph=True)[0].norm())
        else:
            found.append(torch.autograd.grad(loss, hidden, retain_graph=True)[0][b, t].norm())
    return torch.stack(found)


def scores(model: nn.Module, kind: str, score: str, **settings) -> tuple[Tensor, Tensor]:
    hidden, _ = seen(model, batch())
    return gate(model, kind, score, **settings).scored(hidden.detach(), *rows(batch()["labels"], kind))


# exact scores ---------------------------------------------------------------------------------------


@models
@pytest.mark.parametrize("name", ["gradient_norm", "loss", "entropy", "hidden_gradient"])
def test_scores_are_those_of_autograd(name, kind, softcap):
    model = model_of(kind, softcap)
    found, losses = scores(model, kind, name)
    assert found.dtype == losses.dtype == torch.float32
    torch.testing.assert_close(found, oracle(name, model, kind), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses, oracle("loss", model, kind), rtol=1e-4, atol=1e-6)


@models
def test_the_sketch_of_a_large_size_is_the_exact_norm(kind, softcap):
    model = model_of(kind, softcap)
    found, losses = scores(model, kind, "sketch", sketch_dim=2**16, topk_logits=0)
    torch.testing.assert_close(found, oracle("gradient_norm", model, kind), rtol=0.05, atol=1e-6)
    torch.testing.assert_close(losses, oracle("loss", model, kind), rtol=1e-4, atol=1e-6)


# the sketch -----------------------------------------------------------------------------------------

H, V = 16, 300


def predictions(count: int = 200) -> tuple[Head, Tensor, Tensor, Tensor]:
    """Random predictions, from sure and right to sure and wrong; logits of their own, not the head's."""
    generator = torch.Generator().manual_seed(0)
    scale = 6 * torch.rand(count, 1, generator=generator)
    hidden = torch.randn(count, H, generator=generator) * (0.2 + torch.rand(count, 1, generator=generator))
    logits = scale * torch.randn(count, V, generator=generator)
    labels = torch.where(torch.arange(count) % 3 == 0, logits.argmax(1), torch.randint(0, V, (count,)))
    return Head(nn.Linear(H, V, bias=False), H, V, None), hidden, logits, labels


def score(name: str, **settings) -> Tensor:
    head, hidden, logits, labels = predictions()
    return scorer(name, head, **settings)(hidden, logits.clone(), labels)[0]


def spearman(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()


def test_the_sketchs_order_tends_to_the_exact_one_as_it_grows():
    exact = score("gradient_norm")
    by_size = [
        sum(spearman(score("sketch", sketch_dim=m, topk_logits=0, seed=seed), exact) for seed in range(8)) / 8
        for m in (4, 32, 256)
    ]
    assert by_size[0] + 0.02 < by_size[1] < by_size[2] and by_size[2] > 0.99, by_size
    assert spearman(score("sketch", sketch_dim=512, topk_logits=16), exact) > 0.98  # few logits keep the order


def test_kept_words_have_the_probabilities_of_the_whole_vocabulary():
    head, hidden, logits, labels = predictions()
    error = logits.softmax(1) - nn.functional.one_hot(labels, V)
    kept = torch.zeros_like(error).scatter(1, torch.cat([logits.topk(3, dim=1).indices, labels[:, None]], 1), 1.0)
    found = scorer("sketch", head, sketch_dim=2**16, topk_logits=3)(hidden, logits.clone(), labels)[0]
    torch.testing.assert_close(found, hidden.norm(dim=1) * (error * kept).norm(dim=1), rtol=0.05, atol=1e-4)


def test_the_squared_norm_of_a_sketch_is_unbiased_with_all_logits():
    head, hidden, logits, labels = (x[:5] if torch.is_tensor(x) else x for x in predictions())
    exact = scorer("gradient_norm", head)(hidden, logits.clone(), labels)[0].square()
    drawn = torch.stack(
        [
            scorer("sketch", head, sketch_dim=16, topk_logits=0, seed=seed)(hidden, logits.clone(), labels)[0]
            for seed in range(1500)
        ]
    ).square()
    error = drawn.std(0) / len(drawn) ** 0.5
    assert (error < 0.05 * exact).all()
    assert ((drawn.mean(0) - exact).abs() < 4 * error).all()


def test_a_label_outside_the_top_k_is_not_dropped():
    """Flat predictions of a rare word are the hardest; their top k alone would rank them last."""
    generator = torch.Generator().manual_seed(0)
    hidden, logits = torch.randn(40, H, generator=generator), 0.1 * torch.randn(40, V, generator=generator)
    hidden /= hidden.norm(dim=1, keepdim=True)
    labels = logits.argmin(1)
    easy = slice(20, 40)
    labels[easy] = 7
    logits[easy, 7] += 7.0  # probability 0.8
    head = Head(nn.Linear(H, V, bias=False), H, V, None)
    found = scorer("sketch", head, sketch_dim=4096, topk_logits=4)(hidden, logits.clone(), labels)[0]
    assert sorted(found.topk(20).indices.tolist()) == list(range(20))
    torch.testing.assert_close(found[:20], torch.ones(20), rtol=0.05, atol=0)


# chunks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sketch", "gradient_norm", "hidden_gradient", "entropy", "loss"])
def test_chunks_change_nothing(monkeypatch, name):
    model = model_of("causal", CAP)
    whole = scores(model, "causal", name)
    monkeypatch.setattr(HeadLoss, "chunk", 16)  # of 50 predictions
    for a, b in zip(whole, scores(model, "causal", name), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class Widest(TorchDispatchMode):
    """The most rows that a tensor `words` wide had."""

    def __init__(self, words: int):
        super().__init__()
        self.words, self.rows = words, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(out):
            weight = func is torch.ops.aten.t.default  # the head's own, (V, H)
            if torch.is_tensor(leaf) and leaf.ndim and leaf.shape[-1] == self.words and not weight:
                self.rows = max(self.rows, leaf.numel() // self.words)
        return out


@pytest.mark.parametrize("mode", ["gather", "fractional"])
@pytest.mark.parametrize("name", ["sketch", "gradient_norm", "hidden_gradient", "entropy", "loss"])
def test_logits_of_all_tokens_never_exist_at_once(monkeypatch, name, mode):
    monkeypatch.setattr(HeadLoss, "chunk", 16)
    model = runs.tiny_gemma(vocab_size=211).train()
    model.config.use_cache = False
    model.get_output_embeddings().weight.requires_grad_(False)  # its gradient is as wide
    tokens = gate(model, "causal", name, topk_tokens=0.2, mode=mode)
    inputs = batch()
    labels = inputs.pop("labels")
    with Widest(211) as widest:
        tokens.select(model, inputs, labels).finish().backward()
    assert 10 <= widest.rows <= 16  # chunks of 16, 10 chosen of 50; the batch has 63 tokens


# bad input ------------------------------------------------------------------------------------------


def test_what_cannot_be_scored_is_an_error():
    model = model_of("causal")
    tokens, hidden = gate(model, "causal", "sketch"), seen(model, batch())[0].detach()
    with pytest.raises(ParameterError, match=r"^labels=\(\d+, 99\): must be from 0 to 98, or -100"):
        tokens.choose(hidden, batch()["labels"].masked_fill(batch()["labels"] == 98, 99))
    labels = batch()["labels"]
    labels[0, 8] = -1
    with pytest.raises(ParameterError, match=r"^labels=\(-1, \d+\): must be from 0 to 98, or -100"):
        tokens.choose(hidden, labels)
    labels[0, 8] = 0
    tokens.choose(hidden, labels)
    with pytest.raises(ParameterError, match="^logits='non-finite loss'"):
        tokens.choose(hidden * float("nan"), batch()["labels"])


@pytest.mark.parametrize(("topk", "kept"), [(3, 3), (0, 10), (64, 10)])  # of 10 words
def test_flops_grow_with_the_predictions(topk, kept):
    head = Head(nn.Linear(4, 10), 4, 10, None)
    assert scorer("loss", head).flops(7) == 7 * 5 * 10
    sketch = 4 * 10 + 2 * (4 + kept + 1) + 5 * 16 * 4 + 3 * 16
    assert scorer("sketch", head, sketch_dim=16, topk_logits=topk).flops(7) == 7 * sketch
