"""Mode "fractional": the baseline's gradient where all is chosen, else that of a model cut at all other tokens."""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest
import torch
from decoders import ALL, B, T, adapted, assert_close, batch, chosen_of, gradients, of, prepared, selection, split
from torch import Tensor, nn

from lorakit.adapters import quantize_nf4
from lorakit.tokens import positions as rows_of_their_own
from lorakit.tokens.fractional import FreshKeys
from lorakit.tokens.positions import places, row_width
from lorakit.training.loss import MeanLoss


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    total = sum((found[name] - value).square().sum() for name, value in expected.items())
    return (total / sum(value.square().sum() for value in expected.values())).sqrt().item()


# everything chosen ----------------------------------------------------------------------------------


def both(model: nn.Module, given: dict[str, Tensor], autocast: bool = False, **settings):
    """Gradients of the two passes, all predictions chosen, and of the plain model."""
    inputs, labels = split(given)
    context = (lambda: torch.autocast("cpu", torch.bfloat16)) if autocast else contextlib.nullcontext
    tokens = selection(model, **settings)
    tokens.verify(model, inputs, labels)
    with context():
        made = tokens.select(model, inputs, labels)
        assert made.chosen == made.predictions == tokens.divisor(labels) > 20
        loss = made.finish() / made.chosen
    found = gradients(model, loss)
    with context():
        plain = MeanLoss("causal")(model(**inputs), labels)
    torch.testing.assert_close(loss, plain, rtol=2e-2 if autocast else 1e-5, atol=0)
    return found, gradients(model, plain)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["right", "left", "packed"])
@pytest.mark.parametrize("name", ALL)
def test_with_everything_chosen_the_gradient_is_the_baselines(name, kind, attention):
    assert_close(*both(adapted(of(name, attention)), batch(kind)), 1e-5)


@pytest.mark.parametrize("kind", ["right", "left"])
def test_a_model_that_counts_positions_by_its_mask(kind):
    """OPT's own positions leave padding out. A label may follow padding, too, whose place is one of its own there."""
    given = batch(kind)
    if kind == "left":
        given["labels"] = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    assert_close(*both(adapted(of("opt")), given), 1e-5)


@pytest.mark.parametrize(("method", "kind"), [("lora", "bare"), ("hira", "right"), ("full", "right")])
def test_other_methods_and_no_attention_mask(method, kind):
    """The trained embedding and norms too: every prediction's token is chosen, the last one's input is not needed."""
    assert_close(*both(adapted(of("gemma"), method), batch(kind)), 1e-5)


@pytest.mark.parametrize("kind", ["right", "left", "packed"])
def test_a_peft_model(kind):
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "v_proj", "k_proj", "down_proj"]
    model = get_peft_model(of("gemma"), LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    assert_close(*both(prepared(model), batch(kind)), 1e-5)


@pytest.mark.parametrize(("compute", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-3)])
def test_a_four_bit_base(compute, tolerance):
    model = quantize_nf4(of("gemma", hidden_size=64), compute_dtype=compute)
    assert_close(*both(adapted(model), batch("right")), tolerance)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["right", "packed"])
def test_bf16_autocast(kind, attention):
    found, expected = both(adapted(of("gemma", attention)), batch(kind), autocast=True)
    assert difference(found, expected) < 0.03


def test_a_prediction_of_padding_is_chosen_as_well():
    """A pad position that predicts the first real token sees nothing but itself, or nothing: finite at least."""
    given = batch("left")
    given["labels"] = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    model = adapted(of("gemma"))
    inputs, labels = split(given)
    found = gradients(model, selection(model).select(model, inputs, labels).finish())
    assert all(torch.isfinite(gradient).all() for gradient in found.values())


# a fraction chosen ----------------------------------------------------------------------------------


@contextlib.contextmanager
def cut(model: nn.Module, kept: Tensor):
    """While inside, nothing of the model's tokens but `kept` (B, T) is differentiated: each part's output is detached.

    Parts are all modules without children (those of LoRA with the weight they adapt), the layers and the embedding.
    """

    def hook(module: nn.Module, arguments: tuple, output):
        hidden = output[0] if isinstance(output, tuple) else output
        if not torch.is_tensor(hidden) or hidden.shape[:2] != kept.shape or not hidden.is_floating_point():
            return None
        hidden = torch.where(kept.view(*kept.shape, *[1] * (hidden.dim() - 2)), hidden, hidden.detach())
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    parts = [m for m in model.modules() if not list(m.children()) or hasattr(m, "lora_A") or hasattr(m, "mlp")]
    handles = [module.register_forward_hook(hook) for module in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def truncated(model: nn.Module, given: dict[str, Tensor], chosen) -> dict[str, Tensor]:
    """The oracle: the whole model's gradient of the chosen predictions' loss, through chosen tokens only."""
    inputs, labels = split(given)
    kept = torch.zeros(B, T, dtype=torch.bool)
    kept.view(-1)[chosen.where] = True
    masked = torch.full_like(labels, -100).flatten()
    masked[chosen.where + 1] = chosen.targets
    weights = torch.zeros(B * T)
    weights[chosen.where] = 1.0 if chosen.weights is None else chosen.weights
    with cut(model, kept):
        logits = model(**inputs).logits
    shifted = nn.functional.pad(masked.view(B, T)[:, 1:], (0, 1), value=-100).flatten()
    losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), shifted, reduction="none")
    return gradients(model, (losses * weights).sum())


SOME = [
    {"topk_tokens": 0.3},
    {"topk_tokens": 0.1, "per": "sequence"},
    {"topk_tokens": 0.03},  # one token: most rows have none
    {"topk_tokens": 0.6, "method": "flora", "score": "loss"},
    {"topk_tokens": 0.3, "method": "flora", "policy": "pps", "score": "entropy"},
]


def assert_truncated(model: nn.Module, given: dict[str, Tensor], **settings) -> None:
    tokens = selection(model, **settings)
    found = chosen_of(tokens)
    ours = gradients(model, tokens.select(model, *split(given)).finish())
    assert_close(ours, truncated(model, given, found[0]), 1e-5)


@pytest.mark.parametrize("kind", ["right", "left", "packed"])
@pytest.mark.parametrize("settings", SOME, ids=lambda settings: "-".join(map(str, settings.values())))
@pytest.mark.parametrize("name", ["gemma", "llama", "gpt2"])
def test_the_gradient_flows_through_chosen_tokens_only(name, settings, kind):
    assert_truncated(adapted(of(name)), batch(kind), **settings)


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3", "toy"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_in_every_architecture(name, attention):
    assert_truncated(adapted(of(name, attention)), batch("right"), topk_tokens=0.4)


def test_full_training_is_cut_at_the_same_places():
    assert_truncated(adapted(of("llama"), "full"), batch("right"), topk_tokens=0.4)


def test_the_truncated_gradient_is_another_one_than_gathers():
    model, given = adapted(of("gemma")), batch("right")
    inputs, labels = split(given)
    made = [
        gradients(model, selection(model, topk_tokens=0.3, mode=mode).select(model, inputs, labels).finish())
        for mode in ("fractional", "gather")
    ]
    assert 0.01 < difference(*made) < 1


def test_rows_of_different_length_and_rows_without_a_choice():
    where = torch.tensor([2, 5, 7, 12, 14, 56, 57, 164])  # of 5 rows of 40 tokens: 5, 2, 0, 0 and 1 of them
    at = places(where, 40)
    assert at.sequences.tolist() == [0, 1, 4] and at.batch.tolist() == [0, 0, 1, 4] and at.columns.shape == (4, 3)
    assert at.columns.tolist() == [[2, 5, 7], [12, 14, 14], [16, 17, 17], [4, 4, 4]]
    assert at.row.tolist() == [0, 0, 0, 1, 1, 2, 2, 3] and at.slot.tolist() == [0, 1, 2, 0, 1, 0, 1, 0]
    assert at.column.tolist() == [2, 5, 7, 12, 14, 16, 17, 4]


@pytest.mark.parametrize(
    ("counts", "length", "width"),
    [
        ([51, 51, 51, 51], 256, 51),  # nothing to gain
        ([95, 50, 40, 19], 256, 50),  # 5 rows of 50 for 204 tokens; 4 of 95 would be 380
        ([200, 2, 1, 1], 256, 40),
        ([255], 256, 255),
        ([1, 1], 8, 1),
        ([10, 1], 80, 10),  # 2 · (10 + 80 / 16) as 3 · (5 + 80 / 16)
    ],
)
def test_long_rows_are_split_where_that_saves_padding(counts, length, width):
    assert row_width(counts, length) == width


def test_every_chosen_token_has_one_slot():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        chances = torch.rand(6, 1, generator=generator) ** 3
        where = (torch.rand(6, 40, generator=generator) < chances).flatten().nonzero().squeeze(1)
        if len(where):
            at = places(where, 40)
            assert torch.equal(at.batch[at.row] * 40 + at.columns[at.row, at.slot], where)
            assert len({*zip(at.row.tolist(), at.slot.tolist(), strict=True)}) == len(where)
            assert set((at.batch[:, None] * 40 + at.columns).flatten().tolist()) == set(where.tolist())


def test_a_sequence_in_several_rows_has_the_gradient_of_one(monkeypatch):
    model, given = adapted(of("gemma")), batch("right")
    made, shapes = [], []
    for width in (None, 1, 2, 15):
        with monkeypatch.context() as patch:
            if width:
                patch.setattr(rows_of_their_own, "row_width", lambda counts, length, width=width: width)
            one = selection(model, topk_tokens=0.4).select(model, *split(given))
            shapes.append(one.ran)
            made.append(gradients(model, one.finish()))
    assert len(set(shapes)) == 4
    for other in made[1:]:
        assert_close(other, made[0], 1e-5)


def test_one_row_alone():
    model, given = adapted(of("gemma")), {name: value[:1] for name, value in batch("right").items()}
    made = selection(model, topk_tokens=0.3).select(model, *split(given))
    assert made.chosen == made.backpropagated == 5
    assert all(torch.isfinite(g).all() and g.any() for g in gradients(model, made.finish()).values())


def test_second_pass_runs_the_chosen_tokens_only():
    model, given = adapted(of("gemma")), batch("right")
    tokens = selection(model, topk_tokens=0.3, per="sequence")
    made = tokens.select(model, *split(given))
    seen = []
    model.model.layers[0].register_forward_hook(lambda module, args, out: seen.append(tuple(args[0].shape[:2])))
    made.finish()
    assert seen == [(4, 3)]  # of 15, 11 and 8 predictions 5, 3 and 2 are chosen, the 5 in two rows
    assert (made.chosen, made.backpropagated, made.predictions) == (10, 10, 34)
    assert made.ran == (4 * 3, 4 * 3 * 16) and tokens.two_pass


def test_a_batch_without_labels_needs_no_second_pass():
    model, given = adapted(of("gemma")), batch("right")
    given["labels"][:] = -100
    tokens = selection(model, topk_tokens=0.3)
    inputs, labels = split(given)
    tokens.verify(model, inputs, labels)  # there is nothing to compare
    made = tokens.select(model, inputs, labels)
    assert (made.chosen, made.predictions, made.backpropagated) == (0, 0, 0)
    made.finish().backward()
    assert all(p.grad is None for p in model.parameters())


def test_positions_shared_by_all_rows_may_be_given_once():
    model, given = adapted(of("gemma")), batch("bare")
    given["position_ids"] = torch.arange(T)[None]
    given["attention_mask"] = torch.ones(B, T, dtype=torch.long)
    given["labels"][0, 4:] = -100  # the row with most predictions is not the first
    assert_close(*both(model, given), 1e-5)


# memory ---------------------------------------------------------------------------------------------


def test_recorded_keys_are_given_up_layer_by_layer(monkeypatch):
    model, given = adapted(of("gemma", num_hidden_layers=4, layer_types=["full_attention"] * 4)), batch("right")
    tokens = selection(model, topk_tokens=0.3)
    recorded, graph, alive = [], [], []
    record, update = tokens._record, FreshKeys.update

    def recording(*given):
        made = record(*given)
        tensors = [t for layer in made[1].layers for t in (layer.keys, layer.values)]
        recorded.extend(weakref.ref(t.untyped_storage()) for t in tensors)
        graph.extend(t.requires_grad for t in tensors)
        assert made[1].layers[0].keys.shape == (B, 1, T, 16)
        return made

    def updating(self, *given, **options):
        gc.collect()
        alive.append(sum(storage() is not None for storage in recorded))
        return update(self, *given, **options)

    tokens._record = recording
    monkeypatch.setattr(FreshKeys, "update", updating)
    made = tokens.select(model, *split(given))
    assert len(recorded) == 8 and all(storage() is not None for storage in recorded)
    assert not any(graph)
    loss = made.finish()
    gc.collect()
    assert alive == [8, 6, 4, 2]
    assert all(storage() is None for storage in recorded)
    loss.backward()
