"""SkipLoRA: M against its definition, exact gradients above the cut, weights and moments of the skipped left alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import training_runs as runs
from skipping import ALWAYS, HALF, at_work, backward, batch, both, decisions, modes, ours, plain_peft, prepared
from torch import nn

from lorakit.adapters import adapter_layers, attach
from lorakit.errors import LorakitError, ParameterError
from lorakit.measure.flops import FlopCount
from lorakit.skip.controller import SkipLoRA
from lorakit.training import Budget, SLoRATrainer


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# what a skip does -----------------------------------------------------------------------------------


@both
def test_active_gradients_above_a_skipped_prefix_are_exactly_those_of_full_backprop(build, tiny_bert):
    model, skip = prepared(build, tiny_bert, share=0.5)
    reference = at_work(build(tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).train())
    reference.load_state_dict(model.state_dict())
    backward(model, skip, HALF)
    reference(**batch()).loss.backward()
    full, part = gradients(reference), gradients(model)
    assert {name for name in full if "layer.0." not in name} == part.keys()
    assert all(torch.equal(part[name], full[name]) for name in part)


@both
@modes
def test_outputs_do_not_change(build, mode, tiny_bert):
    model, skip = prepared(build, tiny_bert, mode=mode, share=0.5)
    before = model(**batch()).logits.detach()
    skip.metric = list(torch.linspace(0.01, 0.9, 12).tolist())
    skip.begin_step(0.5)
    torch.testing.assert_close(model(**batch()).logits.detach(), before, rtol=0, atol=1e-6)
    skip.end()
    assert torch.equal(model(**batch()).logits.detach(), before)
    model.eval()
    assert all(layer.probe is None for layer in adapter_layers(model).values())


@both
def test_a_detached_adapter_passes_no_gradient_to_its_input_either(build, tiny_bert):
    """The description's meaning: Δh is detached, so the layer's input gets the base layer's gradient alone."""
    model, skip = prepared(build, tiny_bert, mode="adapter", share=0.9)
    skip.metric = [0.5 - 0.01 * place for place in range(12)]
    path = skip.paths[11]
    layer, seen = model.get_submodule(path), {}

    def keep(module, args):
        args[0].retain_grad()
        seen["x"] = args[0]

    handle = layer.register_forward_pre_hook(keep)
    outputs = []
    layer.register_forward_hook(lambda m, a, out: outputs.append(out) or out.retain_grad())
    backward(model, skip)
    handle.remove()
    expected = F.linear(outputs[0].grad, layer.base_layer.weight.T)
    torch.testing.assert_close(seen["x"].grad, expected, rtol=1e-4, atol=1e-8)


@both
@decisions
@modes
def test_a_skipped_step_leaves_weights_and_moments_bitwise_alone(build, decide, mode, tiny_bert):
    model, skip = prepared(build, tiny_bert, mode=mode, decide=decide, threshold=0.0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)

    def step():
        backward(model, skip)
        optimizer.step()
        skip.after_step(0.5, optimizer)

    for _ in range(3):  # everything has moments
        step()
        optimizer.zero_grad()
    cut = sorted(skip.metric)[6] if mode == "adapter" else max(skip.metric[:6]) + 1e-6
    skip.settings = runs.skipping(**ALWAYS | {"mode": mode, "decide": decide, "threshold": cut})
    before = {id(p): (p.detach().clone(), copy.deepcopy(optimizer.state[p])) for p in trained}
    step()
    idle = [probe for probe in skip.probes if not probe.active]
    assert 1 <= len(idle) < 12
    for probe in skip.probes:
        for parameter in probe.parameters:
            value, moments = before[id(parameter)]
            same = torch.equal(parameter, value) and all(
                torch.equal(moments[name], optimizer.state[parameter][name]) for name in ("exp_avg", "exp_avg_sq")
            )
            assert same == (not probe.active), probe.path
            assert (parameter.grad is None) == (not probe.active)


@both
@modes
def test_gradients_of_zeros_left_by_the_optimizer_are_no_step_of_the_skipped(build, mode, tiny_bert):
    """`zero_grad(set_to_none=False)` leaves zeros, with which AdamW would still decay the weights."""
    model, skip = prepared(build, tiny_bert, mode=mode, share=0.5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    model(**batch()).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    before = [[p.detach().clone() for p in probe.parameters] for probe in skip.probes]
    backward(model, skip, HALF)
    optimizer.step()
    pairs = zip(skip.probes, before, strict=True)
    moved = [not all(map(torch.equal, probe.parameters, values)) for probe, values in pairs]
    assert moved == [probe.active for probe in skip.probes] == [False] * 6 + [True] * 6


@both
@pytest.mark.parametrize("min_active", [1, 3])
@modes
def test_decided_in_the_forward_the_last_adapters_stay_active(build, mode, min_active, tiny_bert):
    """In the forward no one knows which will be the largest: the floor is the last ones reached."""
    model, skip = prepared(build, tiny_bert, mode=mode, decide="forward", threshold=10.0, min_active=min_active)
    backward(model, skip)
    assert [probe.active for probe in skip.probes] == [False] * (12 - min_active) + [True] * min_active


@modes
def test_backward_flops_fall_with_the_prefix_and_hardly_without(mode, tiny_bert):
    model, skip = prepared(ours, lambda **o: tiny_bert(num_hidden_layers=4, hidden_size=64, **o), mode=mode, share=0.5)
    counts = {}
    for name, metric in (("full", None), ("half", [0.01] * 12 + [0.5] * 12 if mode == "prefix" else [0.01, 0.5] * 12)):
        skip.metric = metric
        skip.begin_step(0.5)
        loss = model(**batch(8, 32)).loss
        with FlopCount() as count:
            loss.backward()
        counts[name] = count.total
    ratio = counts["half"] / counts["full"]
    assert ratio < 0.52 if mode == "prefix" else 0.8 < ratio < 1


def test_learns_from_b_zero(tmp_path, tiny_bert):
    """Every M is 0 at the start; warm-up, floor and exploration keep training going."""
    model = attach(tiny_bert(), "lora", rank=4, seed=0)
    frozen = [p.detach().clone() for p in model.parameters() if not p.requires_grad]
    for options in ({"warmup": 0.2}, {"warmup": 0.0, "explore": 0.0}, {"warmup": 0.0, "decide": "forward"}):
        twin = copy.deepcopy(model)
        skip = SkipLoRA(twin, settings=runs.skipping(threshold=10.0, mode="adapter", **options))
        trainer = runs.trainer(twin, tmp_path, budget=Budget(30, "steps"), controllers=[skip])
        trainer.train()
        norms = [float(layer.lora_B.norm()) for layer in adapter_layers(twin).values()]
        assert sum(norm > 0 for norm in norms) >= (13 if options["warmup"] else 1)
        assert 0 < skip.report()["share_skipped"] < 1
        assert runs.equal(frozen, [p.detach() for p in twin.parameters() if not p.requires_grad])


def test_threshold_zero_is_plain_lora_bitwise(tmp_path, tiny_bert):
    model = attach(tiny_bert(), "lora", rank=4, seed=0)
    twin = copy.deepcopy(model)
    runs.trainer(model, tmp_path / "a").train()
    skip = SkipLoRA(twin, settings=runs.skipping(threshold=0.0))
    runs.trainer(twin, tmp_path / "b", controllers=[skip]).train()
    assert runs.equal(runs.weights(model), runs.weights(twin))
    assert skip.report()["share_skipped"] == 0


@decisions
@modes
def test_resume_is_bitwise(mode, decide, tmp_path, tiny_bert):
    def made(folder):
        torch.manual_seed(0)
        model = attach(tiny_bert(), "lora", rank=4, seed=0)
        settings = runs.skipping(mode=mode, decide=decide, share=0.5, warmup=0.1, explore=0.3, measure_every=2)
        skip = SkipLoRA(model, settings=settings, seed=3)
        return skip, runs.trainer(model, folder, budget=Budget(14, "steps"), controllers=[skip], save_steps=5)

    skip, whole = made(tmp_path / "whole")
    whole.train()
    runs.kill(made(tmp_path / "cut")[1], 14)  # two batches a step
    again, resumed = made(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert runs.equal(runs.weights(whole.model), runs.weights(resumed.model))
    assert again.report() == skip.report()
    assert resumed.ledger.flops_backward > 0


def test_one_decision_for_all_batches_of_a_step(tiny_bert):
    model, skip = prepared(ours, tiny_bert, decide="forward", mode="adapter", threshold=0.0)
    backward(model, skip)
    skip.after_step(0.5, None)
    first = sorted(skip.metric)
    skip.settings = runs.skipping(**ALWAYS | {"decide": "forward", "mode": "adapter", "threshold": first[6]})
    backward(model, skip)
    decided = [probe.active for probe in skip.probes]
    for name, parameter in model.named_parameters():  # the next batch would be decided otherwise
        if "lora_B" in name:
            parameter.data.mul_(100)
    model(**batch(4, 7)).loss.backward()
    assert [probe.active for probe in skip.probes] == decided and not all(decided)


@both
def test_under_bf16_autocast_and_checkpointing(build, tiny_bert):
    model, skip = prepared(build, tiny_bert, share=0.5)
    skip.metric, expected = HALF, None
    for checkpointed in (False, True):
        if checkpointed:
            bert = next(module for module in model.modules() if type(module).__name__.startswith("BertFor"))
            bert.activation_checkpointing_enable({"use_reentrant": False})
            skip.begin()  # what the Trainer does, in this order
        model.zero_grad()
        skip.begin_step(0.5)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch()).loss
        loss.backward()
        squares = [probe.squares.clone() for probe in skip.probes]
        expected = expected or (gradients(model), squares)
        assert gradients(model).keys() == expected[0].keys() and all("layer.1." in name for name in expected[0])
        for name, value in gradients(model).items():
            torch.testing.assert_close(value, expected[0][name], rtol=1e-2, atol=1e-5)
        torch.testing.assert_close(squares, expected[1])  # the recomputation is not measured again


@both
def test_a_cut_that_would_be_undone_is_refused(build, tiny_bert):
    model, skip = prepared(build, tiny_bert, share=0.5)
    skip.metric = HALF
    model.enable_input_require_grads()
    skip.begin_step(0.5)
    with pytest.raises(LorakitError, match="enable_input_require_grads"):
        model(**batch())


def test_reentrant_checkpointing_is_refused(tiny_bert):
    model, skip = prepared(ours, tiny_bert, share=0.5)
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(LorakitError, match="use_reentrant=False"):
        skip.begin()


def test_hugging_face_trainer_with_peft(tmp_path, tiny_bert):
    model = plain_peft(tiny_bert())
    skip = SkipLoRA(model, settings=runs.skipping(share=0.5, warmup=0.2, explore=0.0))
    plain = runs.trainer(model, tmp_path)
    plain.args.max_steps = 10
    trainer = SLoRATrainer(model, plain.args, runs.rows(), data_collator=runs.collate, controllers=[skip])
    trainer.train()
    assert skip.report()["share_skipped_per_adapter"] == [0.8] * 6 + [0.0] * 6
    assert all(probe.active for probe in skip.probes) and not any(probe.handles for probe in skip.probes)


def test_a_share_of_blocks_is_skipped_however_it_is_decided(tmp_path, tiny_bert):
    """Where the prefix ends is known beforehand, so that there is nothing to decide in the forward."""
    shares = []
    for decide in ("ema", "forward"):
        model = attach(tiny_bert(), "lora", rank=4, seed=0)
        skip = SkipLoRA(model, settings=runs.skipping(decide=decide, share=0.5, warmup=0.25, explore=0.0))
        runs.trainer(model, tmp_path / decide, controllers=[skip], evaluations=1).train()
        shares.append(skip.report()["share_skipped_per_adapter"])
    assert shares[0] == shares[1] and max(shares[0]) > 0.5


def test_the_ledger_of_a_run(tmp_path, tiny_bert):
    model = attach(tiny_bert(), "lora", rank=4, seed=0)
    skip = SkipLoRA(model, settings=runs.skipping(share=0.5, warmup=0.25, explore=0.0))
    trainer = runs.trainer(model, tmp_path, controllers=[skip], evaluations=2)
    trainer.train()
    history = skip.report()["history"]
    assert len(history["step"]) == len(trainer.curve.points) == len(history["metric"]) and history["step"][-1] == 20
    assert len(skip.report()["adapters"]) == len(history["active"][-1]) == 13
    assert history["active"][-1][0] == 0.0 and history["active"][-1][-1] == 1.0
    plain = runs.trainer(attach(tiny_bert(), "lora", rank=4, seed=0), tmp_path / "plain")
    plain.train()
    assert trainer.ledger.flops_backward < 0.85 * plain.ledger.flops_backward
    assert trainer.ledger.flops_forward == pytest.approx(plain.ledger.flops_forward, rel=0.02)


# when -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "steps", "options", "active", "measures"),
    [(0.4, 1, {}, "111111111111", True), (0.5, 1, {}, "000000111111", False),  # warm-up ends at its share
     (0.5, 3, {}, "000000111111", True), (0.5, 4, {}, "000000111111", False),
     (0.5, 1, {"decide": "forward", "mode": "adapter"}, "111111111111", True)],  # until the forward asks
)  # fmt: skip
def test_a_step_measures_while_warm_and_every_so_often(share, steps, options, active, measures, tiny_bert):
    _, skip = prepared(ours, tiny_bert, share=0.5, warmup=0.5, measure_every=3, **options)
    skip.metric, skip.steps = HALF, steps
    skip.begin_step(share)
    assert skip.signature() == (active, measures)


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@modes
def test_decided_in_the_forward_exploration_is_each_adapters_or_the_prefixs(mode, seed, tiny_bert):
    model, skip = prepared(ours, tiny_bert, mode=mode, decide="forward", threshold=10.0, explore=0.4)
    skip.generator.manual_seed(seed)
    backward(model, skip)
    drawn = (torch.rand(12, generator=torch.Generator().manual_seed(seed)) < 0.4).tolist()
    explored = drawn if mode == "adapter" else drawn[:1] * 12
    assert [probe.active for probe in skip.probes] == (explored if any(explored) else [False] * 11 + [True])


def test_points_and_reports_by_hand(tiny_bert):
    (_, skip), (_, again) = (prepared(ours, tiny_bert) for _ in range(2))
    skip.at_point(0)
    skip.metric, skip.steps, skip.skipped = [0.12345678, None, *[0.5] * 10], 3, [1, 3, *[0] * 10]
    skip.at_point(7)
    again.load_state_dict(copy.deepcopy(skip.state_dict()))
    for one in (skip, again):
        one.steps, one.skipped[0] = 4, 2
        one.at_point(9)
        one.at_point(9)  # no step since
        history = one.report()["history"]
        assert history["step"] == [0, 7, 9, 9] and history["metric"][:2] == [[], [0.123457, 0.0, *[0.5] * 10]]
        assert [active[:3] for active in history["active"]] == [[1, 1, 1], [0.6667, 0, 1], [0, 1, 1], [1, 1, 1]]
        assert one.report()["share_skipped"] == 5 / 48 and one.report()["blocks"] == [0] * 6 + [1] * 6
        assert one.report()["share_skipped_per_adapter"][:3] == [0.5, 0.75, 0.0]


# bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [({"mode": "suffix"}, "skip='suffix'"), ({"decide": "later"}, "skip_decide='later'"),
     ({"threshold": -0.1}, "skip_threshold=-0.1"), ({"share": 1.0}, "skip_share=1.0"),
     ({"warmup": 1.0}, "skip_warmup=1.0"), ({"min_active": 0}, "skip_min_active=0"),
     ({"explore": 1.5}, "skip_explore=1.5"), ({"ema": 0.0}, "skip_ema=0.0"),
     ({"measure_every": 0}, "skip_measure_every=0")],
)  # fmt: skip
def test_bad_settings(options, named):
    with pytest.raises(ParameterError, match=named.replace(".", r"\.")):
        runs.skipping(**options)


def test_models_that_cannot_be_skipped(tiny_bert):
    from peft import LoraConfig, get_peft_model

    with pytest.raises(ParameterError, match="no LoRA adapter"):
        SkipLoRA(attach(tiny_bert(), "head"), settings=runs.skipping())
    with pytest.raises(ParameterError, match="cannot skip a HiRALayer"):
        SkipLoRA(attach(tiny_bert(), "hira"), settings=runs.skipping())
    with pytest.raises(ParameterError, match="skip_min_active=14.*13 adapters"):
        SkipLoRA(attach(tiny_bert(), "lora"), settings=runs.skipping(min_active=14))
    SkipLoRA(attach(tiny_bert(), "lora"), settings=runs.skipping(min_active=13))
    with pytest.raises(ParameterError, match="LoRA variant"):
        SkipLoRA(
            get_peft_model(tiny_bert(), LoraConfig(use_dora=True, target_modules=["query"])), settings=runs.skipping()
        )
    two = get_peft_model(tiny_bert(), LoraConfig(target_modules=["query"]))
    two.add_adapter("other", LoraConfig(target_modules=["query"]))
    two.base_model.set_adapter(["default", "other"])
    with pytest.raises(ParameterError, match="one active PEFT LoRA adapter per layer, has 2"):
        SkipLoRA(two, settings=runs.skipping())
    image = get_peft_model(nn.Sequential(nn.Conv2d(1, 2, 3)), LoraConfig(target_modules=["0"]))
    with pytest.raises(ParameterError, match="linear layers only"):
        SkipLoRA(image, settings=runs.skipping())
