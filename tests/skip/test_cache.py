"""A cached prefix: bitwise the run without, at fewer FLOPs; what is stale, random, trained or damaged is refused."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import training_runs as runs
from safetensors.torch import load_file, save_file

import lorakit
from lorakit.adapters import attach, disabled
from lorakit.errors import DataError, LorakitError, ParameterError
from lorakit.gates import BestRows, build_gate
from lorakit.params import Params, check
from lorakit.skip.cache import PrefixCache, room

UPPER = r".*(layer|layers)\.1\..*(query|key|value|dense|q_proj|k_proj|v_proj|o_proj)"  # the second of two blocks


def lora(build=runs.tiny_bert, targets=UPPER, **options):
    return attach(build(**options), "lora", rank=4, target_modules=targets, seed=0)


def fixed(batch):
    """Padded to one length, so that rows meet the very same padding in every epoch."""
    return runs._padded(batch, 24, input_ids=0, attention_mask=0) | {
        "labels": torch.tensor([r["labels"] for r in batch])
    }


def trainer(folder, cache=None, model=None, language=False, steps=30, **options):
    """More than two epochs of 100 rows, 8 in a batch."""
    model = model or lora(runs.tiny_gemma if language else runs.tiny_bert)
    caches = [] if cache is None else [PrefixCache(model, None if cache == "memory" else cache)]
    collator = {} if language else {"data_collator": fixed}
    given = {"params": {"gradient_accumulation": 1}, "budget": runs.Budget(steps, "steps")} | options
    return runs.trainer(model, folder, language=language, controllers=caches, **collator | given)


def ended(run):
    return runs.weights(run.model), [(p.train_loss, p.validation) for p in run.curve.points]


# the same run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", [False, True])
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_bitwise_the_run_without_at_fewer_flops(tmp_path, language, where):
    plain = runs.ran(trainer(tmp_path / "plain", language=language))
    folder = "memory" if where == "memory" else tmp_path / "cache"
    cached = runs.ran(trainer(tmp_path / "cached", folder, language=language))
    assert runs.equal(ended(cached)[0], ended(plain)[0]) and ended(cached)[1] == ended(plain)[1]
    told = cached.controllers[0].report()
    assert told["rows"] == 100 and told["batches"] == 30 and told["from_cache"] == 30 - 13  # 13 batches an epoch
    saved = plain.ledger.flops_forward - cached.ledger.flops_forward
    assert cached.ledger.flops_backward == plain.ledger.flops_backward
    assert 0.3 < saved / plain.ledger.flops_forward * 30 / 17 < 0.52  # of the batches from the cache: one of two blocks


def test_a_second_run_finds_the_first_ones_states(tmp_path):
    plain = runs.ran(trainer(tmp_path / "plain"))
    for _ in range(2):
        cached = runs.ran(trainer(tmp_path / "run", tmp_path / "cache"))
        assert runs.equal(ended(cached)[0], ended(plain)[0])
    assert cached.controllers[0].report()["from_cache"] == 29  # the first batch is computed, and compared
    assert cached.controllers[0].report()["rows"] == 0


def test_padding_that_differs_moves_states_by_rounding_alone(tmp_path):
    plain, cached = (runs.ran(trainer(tmp_path / str(c), c, data_collator=runs.collate)) for c in (None, "memory"))
    assert runs.near(ended(cached)[0], ended(plain)[0], atol=1e-4) and cached.controllers[0].hits == 17


def test_a_killed_run_resumes_bitwise(tmp_path):
    def made(folder):
        return trainer(tmp_path / folder, tmp_path / f"{folder}-cache", save_steps=10)

    whole, resumed = runs.killed_and_resumed(made, after=15)
    assert runs.equal(ended(whole)[0], ended(resumed)[0])
    told = resumed.controllers[0].report()
    assert told["batches"] == whole.controllers[0].report()["batches"] == 30 and told["rows"] > 20
    assert told["from_cache"] >= 17  # what was computed before the kill, and after its checkpoint, is on the disk


def test_what_is_told_of_a_cache_in_memory_goes_on_where_a_checkpoint_ended():
    cache = PrefixCache(lora())
    cache.load_state_dict({"batches": 7, "hits": 3})
    assert cache.report() == {"rows": 0, "bytes": 0, "batches": 7, "from_cache": 3}
    cache.load_state_dict({})  # as older checkpoints have it
    assert cache.report()["batches"] == 7


def test_states_are_those_of_a_forward_and_evaluation_stays_outside(tmp_path):
    run = runs.ran(trainer(tmp_path, "memory", steps=20))
    cache, model = run.controllers[0], run.model.eval()
    cache.begin()
    batch = fixed([runs.rows()[n] for n in range(8)])
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    model.train()
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True)
        for _ in range(2):
            cache.begin_batch(batch)
            assert torch.equal(model(**inputs).logits, expected.logits)
    mask = batch["attention_mask"].bool()
    kept = torch.cat([*cache._kept.values()])
    assert torch.equal(kept, expected.hidden_states[1][mask])
    cache.begin_batch(batch)
    model.eval()
    other = {name: value.flip(0) for name, value in inputs.items()}  # not what was told of
    torch.testing.assert_close(model(**other).logits, model(**inputs).logits.flip(0), rtol=1e-5, atol=1e-6)
    cache.end()
    assert all("forward" not in vars(block) for block in cache.blocks)


def test_the_base_is_asked_without_the_cache(tmp_path):
    """With the adapters off, the prefix may be another: nothing is taken for it."""
    model = lora(targets=r".*layer\.\d\..*(query|key|value|dense)")
    run = trainer(tmp_path, "memory", model, steps=1)
    cache = run.controllers[0]
    batch = fixed([runs.rows()[n] for n in range(4)])
    for p in cache.blocks[0].parameters():
        p.requires_grad_(False)
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) if p.dim() else 0
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    model.train()
    with torch.no_grad(), disabled(model):
        base = model(**inputs).logits
    adapted = model(**inputs).logits.detach()
    cache.begin()
    for base_first in (False, True, False, True):
        cache.begin_batch(batch)
        if not base_first:
            assert torch.equal(model(**inputs).logits, adapted)
        with torch.no_grad(), disabled(model):
            assert torch.equal(model(**inputs).logits, base)
        if base_first:
            assert torch.equal(model(**inputs).logits, adapted)
    cache.end()


@pytest.mark.parametrize("gate", ["loss_floor", "novelty"])
def test_a_gate_of_examples_chooses_the_same_from_the_cache(gate):
    given = {"gate": gate, "gate_level": "example", "max_train": 64, "budget": 6, "batch_size": 8, "gate_k": 4}
    given |= {"target_modules": r".*layer\.[23]\..*(lin1|lin2|_lin)", "group_by_length": False}
    runs_of = [lorakit.run(runs.QUICK | given | {"prefix_cache": where}) for where in ("none", "memory")]
    losses = [run.final["validation"]["loss"] for run in runs_of]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    forward = [run.costs.flops_forward + run.costs.flops_gate for run in runs_of]
    assert forward[1] < 0.75 * forward[0]


def test_skiplora_is_cached_from_the_end_of_its_warm_up():
    given = {"skip": "prefix", "skip_share": 0.5, "skip_explore": 0.0, "max_train": 64, "budget": 20}
    plain, cached = (lorakit.run(runs.QUICK | given | {"prefix_cache": where}) for where in ("none", "memory"))
    assert cached.final["validation"]["loss"] == pytest.approx(plain.final["validation"]["loss"], rel=1e-4)
    assert (
        cached.details["prefix_cache"]["batches"] == 18 and cached.details["prefix_cache"]["from_cache"] == 12
    )  # but two, and an epoch
    assert cached.details["skip"]["share_skipped"] == plain.details["skip"]["share_skipped"] > 0.4
    assert cached.costs.flops < plain.costs.flops


# what it takes --------------------------------------------------------------------------------------


def test_its_size_is_said_beforehand(tmp_path):
    rows = runs.rows()
    model = lora()
    said, free = room([*rows["input_ids"], rows["input_ids"][0]], model, tmp_path / "not" / "there")
    assert said == sum(map(len, rows["input_ids"])) * 32 * 4 and free > 0
    run = runs.ran(trainer(tmp_path / "run", tmp_path / "cache", model))
    assert run.controllers[0].report()["bytes"] == said
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert said <= sum(path.stat().st_size for path in files) <= 1.1 * said and len(files) == 13


def test_what_does_not_fit_is_refused_before_training(monkeypatch, tmp_path):
    from lorakit.skip import cache

    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    given = {"target_modules": r".*layer\.[23]\..*(lin1|lin2)", "max_train": 32}
    with pytest.raises(ParameterError, match="prefix_cache='disk': its states take .* GiB, of which 9.31e-07 are free"):
        lorakit.run(runs.QUICK | given | {"prefix_cache": "disk"})
    assert not [*tmp_path.iterdir()]


# what cannot be kept --------------------------------------------------------------------------------


def test_a_stale_cache_is_refused(tmp_path):
    runs.ran(trainer(tmp_path / "a", tmp_path / "cache", steps=13))
    for path in (tmp_path / "cache").rglob("*.safetensors"):
        save_file({name: states + 0.1 for name, states in load_file(path).items()}, path)
    with pytest.raises(ParameterError, match="prefix_cache='disk'.*does not hold what this model computes"):
        trainer(tmp_path / "b", tmp_path / "cache").train()


def test_what_is_trained_below_shows_although_a_gate_looks_first(tmp_path):
    """Its look has no graph, in which nothing requires a gradient."""
    model = lora()
    model.bert.embeddings.word_embeddings.weight.requires_grad_(True)
    gate = BestRows(build_gate(runs.batch_gate("loss_floor"), model, "classify"), 2)
    with pytest.raises(ParameterError, match="something below its end is trained"):
        trainer(tmp_path, "memory", model, gate=gate).train()


def test_another_configuration_has_another_cache(tmp_path):
    runs.ran(trainer(tmp_path / "a", tmp_path / "cache", steps=13))
    run = runs.ran(trainer(tmp_path / "b", tmp_path / "cache", lora(num_attention_heads=4), steps=13))
    assert run.controllers[0].report()["rows"] == 100 and len([*(tmp_path / "cache").iterdir()]) == 2


def test_two_runs_at_once_keep_out_of_each_others_files(tmp_path):
    """Batches that begin with the same row, as of two processes with seeds of their own."""
    data, model = runs.rows(), lora().train()
    first, second = PrefixCache(model, tmp_path), PrefixCache(copy.deepcopy(model), tmp_path)
    for cache in (first, second):
        cache.begin()
    for cache, places in ((first, (0, 1, 2)), (second, (0, 3, 4))):
        batch = fixed([data[n] for n in places])
        cache.begin_batch(batch)
        cache.model(**batch)
    assert len([*tmp_path.rglob("*.safetensors")]) == 2
    first.begin_batch(batch := fixed([data[n] for n in (0, 1, 2)]))
    assert first._known
    first.model(**batch)
    first.end(), second.end()


def test_padding_on_the_left_is_refused(tmp_path):
    def left(batch):
        return {name: value.flip(1) if value.dim() == 2 else value for name, value in fixed(batch).items()}

    with pytest.raises(ParameterError, match="padded on the right"):
        trainer(tmp_path, "memory", data_collator=left).train()


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"quantize": "nf4"}, {"precision": "bf16"}])
def test_it_goes_with(changes):
    given = {"target_modules": r".*layer\.[23]\..*(lin1|lin2)", "max_train": 32, "budget": 6} | changes
    plain, cached = (lorakit.run(runs.QUICK | given | {"prefix_cache": where}) for where in ("none", "memory"))
    near = 5e-3 if "precision" in changes else 1e-3  # rows are padded to other lengths, which bf16 rounds otherwise
    assert cached.final["validation"]["loss"] == pytest.approx(plain.final["validation"]["loss"], rel=near)
    assert cached.details["prefix_cache"]["from_cache"] >= 2


def test_rows_out_of_order_are_seen(tmp_path):
    runs.ran(trainer(tmp_path / "a", tmp_path / "cache", steps=13))
    for path in (tmp_path / "cache").rglob("*.safetensors"):
        kept = load_file(path)
        save_file(dict(zip(kept, [*kept.values()][::-1], strict=True)), path)
    with pytest.raises(ParameterError, match="does not hold what this model computes"):
        trainer(tmp_path / "b", tmp_path / "cache").train()


def test_another_model_has_another_cache(tmp_path):
    runs.ran(trainer(tmp_path / "a", tmp_path / "cache", steps=13))
    other = lora()
    other.bert.encoder.layer[0].output.dense.weight.data[0, 0] += 1e-3
    run = runs.ran(trainer(tmp_path / "b", tmp_path / "cache", other, steps=13))
    assert run.controllers[0].report()["from_cache"] == 0 and len([*(tmp_path / "cache").iterdir()]) == 2
    above = copy.deepcopy(lora())
    above.bert.encoder.layer[1].output.dense.base_layer.weight.data += 1.0  # not of the prefix
    run = runs.ran(trainer(tmp_path / "c", tmp_path / "cache", above, steps=13))
    assert run.controllers[0].report()["from_cache"] == 12 and len([*(tmp_path / "cache").iterdir()]) == 2


def test_a_damaged_file_is_named(tmp_path):
    runs.ran(trainer(tmp_path / "a", tmp_path / "cache", steps=3))
    path = next((tmp_path / "cache").rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=f"{path.name} is damaged, remove it"):
        trainer(tmp_path / "b", tmp_path / "cache").train()


def test_what_is_random_trained_or_across_rows_is_refused(tmp_path):
    with pytest.raises(ParameterError, match="draws random numbers, as dropout does: base_dropout false"):
        trainer(tmp_path, "memory", lora(hidden_dropout_prob=0.1)).train()
    with pytest.raises(ParameterError, match="the first block is trained"):
        trainer(tmp_path, "memory", lora(targets="all-linear")).train()
    below = lora()
    below.bert.embeddings.word_embeddings.weight.requires_grad_(True)
    with pytest.raises(ParameterError, match="something below its end is trained"):
        trainer(tmp_path, "memory", below).train()
    normed = lora()
    normed.norm = torch.nn.BatchNorm1d(4)
    with pytest.raises(ParameterError, match="norm.*looks across rows"):
        PrefixCache(normed)
    with pytest.raises(ParameterError, match="no list of blocks"):
        PrefixCache(torch.nn.Linear(2, 2))


BAD = [
    ({"prefix_cache": "memory", "skip": "prefix", "skip_share": 0.5}, "prefix_cache='memory'.*skip_explore 0"),
    ({"prefix_cache": "disk", "skip": "adapter", "skip_explore": 0.0}, "prefix_cache='disk'.*skip_share"),
    ({"prefix_cache": "disk", "skip": "prefix", "skip_share": 0.5, "skip_explore": 0.0, "method": "sparse"}, "lora"),
    ({"prefix_cache": "ram"}, "prefix_cache='ram'"),
]


@pytest.mark.parametrize(("given", "told"), BAD)
def test_what_does_not_go_together_is_refused_by_name(given, told):
    with pytest.raises(ParameterError, match=told):
        check(Params(**given))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"skip": "prefix", "skip_share": 0.5, "skip_explore": 0.0, "dropout": 0.1}, "prefix_cache=.*dropout 0"),
        ({"task": "toy-stories"}, "prefix_cache='memory'.*masks are drawn anew"),
        ({"method": "full"}, "prefix_cache='memory'.*the first block is trained"),
        ({"model": "toy-decoder", "task": "toy-instruct", "packing": True}, "batches also hold position_ids"),
        (
            {"model": "toy-decoder", "task": "toy-instruct", "gating": {"method": "flora", "mode": "fractional"}},
            "once more",
        ),
        (
            {"model": "toy-decoder", "task": "toy-instruct", "gating": {"method": "flora", "score": "updates"}},
            "every layer",
        ),
    ],
)
def test_what_a_run_cannot_keep_is_refused(given, told):
    targets = {} if "method" in given else {"target_modules": r".*layers?\.[23]\..*(lin1|lin2|o_proj|up_proj)"}
    with pytest.raises(LorakitError, match=told):
        lorakit.run(runs.QUICK | {"prefix_cache": "memory", "max_train": 32, "budget": 2} | targets | given)


def test_the_models_own_dropout_can_be_switched_off(tmp_path):
    from lorakit import models
    from lorakit.tasks.toy import tokenizer

    runs.bert(vocab_size=265).save_pretrained(tmp_path)
    tokenizer.encoder_tokenizer().save_pretrained(tmp_path)
    for asked, shares in ((False, {0.0}), (True, {0.1})):
        model = models.load(str(tmp_path), "classify", base_dropout=asked).model
        assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == shares
        assert {model.config.attention_probs_dropout_prob} == shares
    given = {"model": str(tmp_path), "prefix_cache": "memory", "max_train": 32, "budget": 2, "learning_rate": 1e-3}
    given |= {"target_modules": r".*layer\.1\..*(query|value)"}
    with pytest.raises(ParameterError, match="base_dropout false"):
        lorakit.run(runs.QUICK | given)
    assert lorakit.run(runs.QUICK | given | {"base_dropout": False}).status == "done"
    later = {"target_modules": ["query", "value"], "skip": "prefix", "skip_share": 0.5, "skip_explore": 0.0}
    with pytest.raises(ParameterError, match="with skip needs base_dropout false"):  # not at the end of its warm-up
        lorakit.run(runs.QUICK | given | later)
    assert lorakit.run(runs.QUICK | given | later | {"base_dropout": False}).status == "done"
