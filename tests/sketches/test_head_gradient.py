"""Features of a head's gradient against autograd through a real `nn.Linear`, token by token."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from gate_streams import explicit_sketch, pairs
from torch import Tensor, nn

from lorakit.errors import ParameterError
from lorakit.head import rows
from lorakit.sketches import TensorSketch, gradient_norms, predicted, sketch_batch, sparse_error
from lorakit.sketches.head_gradient import _neighbours, chunk_of, error_norms, group_maxima, top_indices

B, T, H, V = 3, 6, 8, 50
CAP = 4.0
softcaps = pytest.mark.parametrize("softcap", [None, CAP], ids=["plain", "capped"])
kinds = pytest.mark.parametrize("kind", ["causal", "masked", "classify"])


def batch(kind: str, softcap: float | None = None, dtype: torch.dtype = torch.float64):
    """A head, what it was given, the logits as the loss sees them, and labels of which some are ignored."""
    torch.manual_seed(0)
    head = nn.Linear(H, V, dtype=dtype)
    shape = (B * T,) if kind == "classify" else (B, T)
    hidden, labels = torch.randn(*shape, H, dtype=dtype), torch.randint(0, V, shape)
    labels.view(-1)[[1, 6, 7]] = -100
    labels.view(-1)[[2, 3]] = torch.tensor([0, V - 1])
    logits = 3 * head(hidden)  # 3: far enough from a uniform softmax
    return head, hidden, capped(logits, softcap), labels


def capped(raw: Tensor, softcap: float | None) -> Tensor:
    return raw if softcap is None else softcap * torch.tanh(raw / softcap)


def gradients(kind: str, softcap: float | None) -> Tensor:
    """d loss_t / d (3 W) of each predicted token by autograd, (N, V, H)."""
    head, hidden, _, labels = batch(kind, softcap)
    found = []
    for place, y in pairs(labels, kind):
        loss = F.cross_entropy(capped(3 * head(hidden[place]), softcap)[None], torch.tensor([y]))
        found.append(torch.autograd.grad(loss, head.weight)[0] / 3)
    return torch.stack(found)


# rows -----------------------------------------------------------------------------------------------


def test_causal_rows_pair_a_position_with_the_next_label():
    labels = torch.tensor([[10, 11, 12], [20, -100, 22]])
    positions, targets = rows(labels, "causal")
    assert positions.tolist() == [0, 1, 4] and targets.tolist() == [11, 12, 22]
    positions, targets = rows(labels, "masked")
    assert positions.tolist() == [0, 1, 2, 3, 5] and targets.tolist() == [10, 11, 12, 20, 22]
    assert [x.tolist() for x in rows(torch.tensor([3, -100, 1]), "classify")] == [[0, 2], [3, 1]]


@kinds
def test_predicted_pairs(kind):
    _, hidden, logits, labels = batch(kind)
    h, z, y = predicted(hidden, logits, labels, kind)
    wanted = pairs(labels, kind)
    assert torch.equal(h, torch.stack([hidden[place] for place, _ in wanted]))
    assert torch.equal(z, torch.stack([logits[place] for place, _ in wanted]))
    assert y.tolist() == [label for _, label in wanted]


# exact norms ----------------------------------------------------------------------------------------


@softcaps
@kinds
def test_gradient_norms_are_those_of_autograd(kind, softcap):
    _, hidden, logits, labels = batch(kind, softcap)
    found = gradient_norms(hidden, logits, labels, kind, softcap)
    torch.testing.assert_close(found, gradients(kind, softcap).flatten(1).norm(dim=1), rtol=1e-10, atol=0)


def test_error_norm_is_the_closed_form_and_keeps_its_digits_where_that_cancels():
    _, _, logits, labels = batch("classify")
    logits, labels = logits[labels != -100], labels[labels != -100]
    p = logits.softmax(dim=1)
    closed, before = (p.square().sum(1) - 2 * p.gather(1, labels[:, None])[:, 0] + 1).sqrt(), logits.clone()
    torch.testing.assert_close(error_norms(logits, labels), closed, rtol=1e-10, atol=0)
    assert torch.equal(logits, before)  # what is worked in is a copy
    small, cap = logits / 100, 0.5
    torch.testing.assert_close(error_norms(small, labels, cap), error(small, labels, cap).norm(dim=1))
    sure = torch.tensor([[12.0, 0.0]])  # p_y = 1 − 6e-6: the sum in float32 is 0 or 1e-7, its root 50 times too large
    torch.testing.assert_close(error_norms(sure, torch.tensor([0])), torch.tensor([8.69e-6]), rtol=0.05, atol=0)


# sparse error ---------------------------------------------------------------------------------------


def dense(indices: Tensor, values: Tensor, words: int) -> Tensor:
    return torch.zeros(len(values), words, dtype=values.dtype).scatter_add_(1, indices, values)


def error(logits: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
    e = logits.softmax(dim=1) - F.one_hot(labels, logits.shape[1])
    return e if softcap is None else e * (1 - (logits / softcap) ** 2)


def classified(softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """Logits and labels: every other one the most probable word."""
    _, _, logits, labels = batch("classify", softcap)
    logits, labels = logits[labels != -100].detach(), labels[labels != -100]
    return logits, torch.where(torch.arange(len(labels)) % 2 == 0, logits.argmax(1), labels)


@softcaps
@pytest.mark.parametrize("topk", [1, 5, V, V + 7])
def test_sparse_error_has_the_most_probable_and_gold_once_with_the_softmax_of_all(softcap, topk):
    logits, labels = classified(softcap)
    indices, values = sparse_error(logits, labels, topk, softcap)
    assert indices.shape == values.shape and (topk >= V or indices.shape == (len(labels), topk + 1))
    keep = F.one_hot(labels, V).bool().scatter(1, logits.topk(min(topk, V)).indices, True)
    assert {int(row.sum()) - min(topk, V) for row in keep} == ({0, 1} if topk < V else {0})  # gold inside and outside
    expected = torch.where(keep, error(logits, labels, softcap), 0)
    torch.testing.assert_close(dense(indices, values, V), expected, rtol=1e-10, atol=1e-12)


def test_a_normaliser_at_hand_is_used():
    logits, labels = classified()
    given = sparse_error(logits, labels, 4, log_normaliser=logits.logsumexp(1))
    assert all(torch.equal(*both) for both in zip(given, sparse_error(logits, labels, 4), strict=True))


@pytest.mark.parametrize(
    ("words", "topk"),
    [(64 * 20, 3), (64 * 20 + 17, 3), (64 * 9 + 1, 4), (5000, 1), (300, 8), (2**17, 3), (2**17 + 5, 3)],
)
def test_grouped_top_k_is_torchs(words, topk):
    torch.manual_seed(0)
    rising = torch.arange(words).repeat(2, 1).float()
    for logits in (torch.randn(7, words), torch.randn(words, 7).T, torch.randint(0, 9, (7, words)).float(), rising):
        found = top_indices(logits, topk)
        assert torch.equal(found, top_indices(logits, topk, group_maxima(logits)))
        values = logits.gather(1, found).sort(dim=1, descending=True).values
        assert torch.equal(values, logits.topk(topk, dim=1).values)
        assert all(len(set(row)) == topk for row in found.tolist())


def test_words_that_cannot_come_are_no_error():
    logits = torch.full((1, 64 * 9 + 1), -math.inf)
    logits[0, 3] = logits[0, 200] = 0.0
    indices, values = sparse_error(logits, torch.tensor([64 * 9]), 4)
    found = dense(indices, values, 64 * 9 + 1)[0]
    assert found[[3, 200, 64 * 9]].tolist() == [0.5, 0.5, -1.0] and found.abs().sum() == 2


# sketches of batches --------------------------------------------------------------------------------


def sketch(size: int = 64, seed: int = 0) -> TensorSketch:
    return TensorSketch(H, V, size, generator=torch.Generator().manual_seed(seed))


@softcaps
@kinds
def test_batch_sketch_is_the_sketch_of_the_heads_gradient(kind, softcap):
    _, hidden, logits, labels = batch(kind, softcap)
    found = sketch_batch(sketch(), hidden, logits, labels, kind, V, softcap)
    expected = explicit_sketch(sketch(), gradients(kind, softcap).sum(0))
    assert found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("words", "chunk"), [(2**25, 16), (2**20, 32), (2**15, 2**10), (3, 2**25 // 3)])
def test_a_chunks_logits_take_128_mib_but_for_very_many_words(words, chunk):
    assert chunk_of(words) == chunk and (chunk == 16 or 4 * words * chunk <= 2**27 < 4 * words * (chunk + 1))


@pytest.mark.parametrize(
    ("where", "parts"),
    [([], []), ([4, 5, 6], [(4, 7)]), ([0, 2, 3, 7, 9], [(0, 1), (2, 4), (7, 8), (9, 10)]), ([0, 2, 4, 6, 8], None)],
)
def test_neighbours_are_taken_as_they_lie_while_gaps_are_few(where, parts):
    found = [taken for _, taken in _neighbours(torch.tensor(where, dtype=torch.long))]
    if parts is None:
        assert [taken.tolist() for taken in found] == [where]
    else:
        assert found == [slice(*part) for part in parts]


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunks_change_nothing(chunk, monkeypatch):
    _, hidden, logits, labels = batch("causal")
    norms = gradient_norms(hidden, logits, labels, "causal")
    whole = sketch_batch(sketch(), hidden, logits, labels, "causal", 5)
    monkeypatch.setattr("lorakit.sketches.head_gradient.chunk_of", lambda words: chunk)
    torch.testing.assert_close(norms, gradient_norms(hidden, logits, labels, "causal"), rtol=1e-12, atol=0)
    torch.testing.assert_close(sketch_batch(sketch(), hidden, logits, labels, "causal", 5), whole, rtol=1e-5, atol=1e-5)


def test_maxima_and_losses_that_are_at_hand_change_nothing_and_are_not_looked_for_again(monkeypatch):
    torch.manual_seed(0)
    words = 64 * 12 + 5
    hidden, logits, labels = torch.randn(2, 5, H), torch.randn(2, 5, words), torch.randint(0, words, (2, 5))
    labels[0, 1] = labels[1, 3] = -100
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten().clamp(min=0), reduction="none")
    made = TensorSketch(H, words, 64, generator=torch.Generator().manual_seed(0))
    given = (made, hidden, logits, labels, "masked", 3)
    plain, maxima = sketch_batch(*given), group_maxima(logits.flatten(0, 1))
    assert maxima.shape == (10, 13) and torch.equal(maxima[:, 12], logits.flatten(0, 1)[:, -5:].amax(1))
    monkeypatch.setattr("lorakit.sketches.head_gradient.group_maxima", None)
    torch.testing.assert_close(sketch_batch(*given, losses=losses, maxima=maxima), plain, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr("lorakit.sketches.head_gradient.chunk_of", lambda words: 3)
    torch.testing.assert_close(sketch_batch(*given, losses=losses, maxima=maxima), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_computed_in_single_precision(dtype):
    _, hidden, logits, labels = batch("causal")
    hidden, logits = hidden.detach().to(dtype), logits.detach().to(dtype)
    for function in (
        lambda h, z: gradient_norms(h, z, labels, "causal"),
        lambda h, z: sketch_batch(sketch(), h, z, labels, "causal", 5),
    ):
        assert function(hidden, logits).dtype == torch.float32
        assert torch.equal(function(hidden, logits), function(hidden.float(), logits.float()))


def test_padded_positions_do_not_matter_whatever_they_hold():
    _, hidden, logits, labels = batch("masked")
    before = sketch_batch(sketch(), hidden, logits, labels, "masked", 5)
    with torch.no_grad():
        hidden[labels == -100] = math.nan
        logits[labels == -100] = math.nan
    assert torch.equal(sketch_batch(sketch(), hidden, logits, labels, "masked", 5), before)


def test_nothing_predicted_is_a_sketch_of_zeros():
    _, hidden, logits, labels = batch("causal")
    nothing = torch.full_like(labels, -100)
    assert torch.equal(sketch_batch(sketch(), hidden, logits, nothing, "causal", 5), torch.zeros(64))
    assert gradient_norms(hidden, logits, nothing, "causal").shape == (0,)
    assert predicted(hidden, logits, nothing, "causal")[0].shape == (0, H)
    assert sketch_batch(sketch(), hidden[:, :1], logits[:, :1], labels[:, :1], "causal", 5).abs().sum() == 0


@pytest.mark.parametrize("build", ["tiny_gpt2", "tiny_gemma"])
def test_a_models_own_loss_has_this_gradient(build, request):
    """The head's input comes from a pre-hook, the loss from the model; Gemma's caps its logits."""
    options = {"final_logit_softcapping": CAP} if build == "tiny_gemma" else {}
    model = request.getfixturevalue(build)(tie_word_embeddings=False, **options).eval()
    head, seen = model.get_output_embeddings(), []
    with torch.no_grad():
        head.weight.mul_(50)  # logits large enough for the cap to matter
    head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    ids = torch.randint(1, 99, (2, 9))
    labels = ids.clone()
    labels[0, 5:] = -100
    out = model(input_ids=ids, labels=labels)
    out.loss.backward()
    count = len(rows(labels, "causal")[0])
    assert count == 4 + 8
    whole = TensorSketch(32, 99, 256, generator=torch.Generator().manual_seed(0))
    found = sketch_batch(whole, seen[0], out.logits, labels, "causal", 99, options.get("final_logit_softcapping"))
    expected = explicit_sketch(whole, count * head.weight.grad.double()).float()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


# bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_without_a_softmax_are_an_error(bad):
    _, hidden, logits, labels = batch("causal")
    logits = logits.detach().clone()
    logits[0, 1, 3] = bad
    for function in (gradient_norms, lambda *given: sketch_batch(sketch(), *given, 5)):
        with pytest.raises(ParameterError, match="^logits="):
            function(hidden, logits, labels, "causal")


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("^kind=", lambda h, z, y: rows(y, "sequence")),
        ("^labels=", lambda h, z, y: rows(y, "classify")),
        ("^hidden=", lambda h, z, y: gradient_norms(h[:, 1:], z, y, "causal")),
        ("^logits=", lambda h, z, y: gradient_norms(h, z[:, 1:], y, "causal")),
        ("^labels=", lambda h, z, y: gradient_norms(h, z, y.clone().fill_(V), "causal")),
        ("^labels=", lambda h, z, y: gradient_norms(h, z, y.clone().fill_(-7), "causal")),
        ("^topk=", lambda h, z, y: sketch_batch(sketch(), h, z, y, "causal", 0)),
        ("^softcap=", lambda h, z, y: gradient_norms(h, z, y, "causal", softcap=0.0)),
        ("last dimension must be 8", lambda h, z, y: sketch_batch(sketch(), h[..., 1:], z, y, "causal", 5)),
    ],
)
def test_what_does_not_fit_is_an_error(message, call):
    _, *given = batch("causal")
    with pytest.raises(ParameterError, match=message):
        call(*given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_known_loss_saves_the_normaliser_and_changes_nothing(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden, logits = torch.randn(2, 9, 5, generator=generator), 3 * torch.randn(2, 9, 400, generator=generator)
    logits = logits.to(dtype)
    labels = torch.randint(0, 400, (2, 9), generator=generator)
    labels[:, :3] = labels[1, 7] = -100
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), shifted.flatten(), reduction="none")
    made = TensorSketch(5, 400, 64, generator=torch.Generator().manual_seed(1))
    plain, quick = (sketch_batch(made, hidden, logits, labels, "causal", 8, losses=given) for given in (None, losses))
    assert torch.allclose(plain, quick, atol=1e-5 * plain.norm())
    with pytest.raises(ParameterError, match="^logits="):
        sketch_batch(made, hidden, logits, labels, "causal", 8, losses=losses * float("nan"))
