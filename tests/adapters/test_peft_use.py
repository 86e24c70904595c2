"""Method "peft" in use: parameters, files, the trainer, AdaLoRA's schedule."""

from __future__ import annotations

import copy
import json

import peft_types
import pytest
import torch
from peft_types import IN_THE_TRAINER, attached, batch, logits, train
from training_runs import equal, kill, trainer, weights

from lorakit.adapters import (
    adapter_bytes,
    adapter_state,
    attach,
    detach,
    is_merged,
    load_adapter,
    merge,
    merged,
    parameter_stats,
    save_adapter,
    unmerge,
)
from lorakit.adapters.peft.config import quiet
from lorakit.adapters.peft.files import stored_tensors
from lorakit.adapters.peft.schedule import PeftSchedule
from lorakit.errors import CheckpointError, LorakitError, ParameterError
from lorakit.params import Params
from lorakit.training import Budget

build, light_collections = peft_types.build, peft_types.light_collections


# --- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"peft_type": "NOPE"}, r"peft_type='NOPE': must be one of PROMPT_TUNING, .*DEFT, DORA, RSLORA"),
        ({"peft_type": ""}, r"peft_type='': must be one of"),
        (
            {"peft_type": "VERA", "peft_options": {"ranks": 4}},
            r"peft_options.*unknown option 'ranks' of VERA; known are .*r,",
        ),
        ({"peft_type": "VERA", "peft_options": {"peft_type": "LORA"}}, r"unknown option 'peft_type'"),
        ({"peft_type": "LORA", "peft_options": {"init_lora_weights": "pissa"}}, r"'pissa' changes the base"),
        ({"peft_type": "LORA", "peft_options": {"bias": "all"}}, r"bias='all' changes the base"),
        ({"peft_type": "ADAMSS", "peft_options": {"use_asa": True}}, r"checkpoints cannot follow"),
        ({"peft_type": "SHADOW", "peft_options": {"auxiliary_loss_weight": 0.1}}, r"needs labels"),
        ({"peft_type": "ADALORA"}, r"peft_options.total_step=None: must be the number of optimizer steps"),
        ({"peft_type": "TRAINABLE_TOKENS", "trainable": ()}, r"peft_options.token_indices"),
        ({"peft_type": "IA3", "rank": 4}, r"rank=4: PEFT's IA3 has no rank"),
        ({"peft_type": "VERA", "alpha": 3}, r"alpha=3.0: PEFT's VERA has no alpha"),
        ({"peft_type": "IA3", "dropout": 0.1}, r"dropout=0.1: PEFT's IA3 has no dropout"),
        ({"peft_type": "LOHA", "rslora": True}, r"PEFT's LOHA has no rslora"),
        ({"peft_type": "C3A", "peft_options": {"block_size": 7}}, r"PEFT refuses: .*block size"),
        ({"peft_type": "OFT", "peft_options": {"r": 3, "oft_block_size": 5}}, r"PEFT's OFT: "),
        ({"peft_type": "SUPERTUNING", "dropout": 0.1}, r"dropout=0.1: PEFT's SUPERTUNING has no dropout"),
        ({"peft_type": "LOHA", "init": "gaussian"}, r"PEFT's LOHA has no init"),
        ({"peft_type": "DORA", "target_modules": ["nope"]}, r"'nope' matches no module"),
    ],
)
def test_mistakes_are_named_and_change_nothing(build, given, message):
    refused(build("bert"), message, given)


def refused(model, message, given):
    modules, flags, known = list(model.modules()), [p.requires_grad for p in model.parameters()], set(vars(model))
    with pytest.raises(ParameterError, match=message):
        attach(model, "peft", **given)
    assert list(model.modules()) == modules and [p.requires_grad for p in model.parameters()] == flags
    assert set(vars(model)) == known


def test_a_layer_refused_halfway_leaves_the_model_as_it_was(build):
    model = build("bert", intermediate_size=36)  # blocks of 8 fit the attention's layers, which come first
    refused(model, "PEFT refuses: .*block size", {"peft_type": "C3A", "peft_options": {"block_size": 8}})


def test_parameters_reach_the_config_and_options_win(build):
    model = build("bert")
    wrapper = attach(model, "peft", peft_type="dora", rank=4, alpha=12, dropout=0.25, init="gaussian")
    config = wrapper.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_dora) == (4, 12, 0.25, True)
    assert config.init_lora_weights == "gaussian" and "classifier" in config.modules_to_save
    assert wrapper.lorakit_attachment.trained == ("classifier",)  # PEFT's list has names of its own too
    assert not any(module.training for module in wrapper.modules())
    detach(wrapper)
    wrapper = attach(
        model, "peft", peft_type="Hira", rank=4, dropout=0.5, peft_options={"r": 2}, target_modules=["key"]
    )
    config = wrapper.peft_config["default"]
    assert (config.r, config.hira_dropout) == (2, 0.5)
    assert all(path.endswith("key") for path in config.target_modules)
    detach(wrapper)
    config = attach(model, "peft", peft_type="ADALORA", rank=4, total_steps=50).peft_config["default"]
    assert (config.target_r, config.init_r, config.total_step) == (4, 6, 50)


def test_adaloras_penalty_begun_again_is_there_once_and_gone_at_the_end(build):
    from torch.optim import optimizer

    before = len(optimizer._global_optimizer_pre_hooks)
    model = attach(build("bert"), "peft", peft_type="ADALORA", rank=4, total_steps=50)
    (schedule,) = model.lorakit_attachment.controllers(model, Params())
    for count in (1, 1):  # as where a batch was too large
        schedule.begin()
        assert len(optimizer._global_optimizer_pre_hooks) == before + count
    schedule.end()
    assert len(optimizer._global_optimizer_pre_hooks) == before


@pytest.mark.parametrize("peft_type", ["LORA", "PROMPT_TUNING", "LOKR", "VBLORA"])
def test_a_seed_gives_the_same_start_and_leaves_the_global_generator_alone(build, peft_type):
    starts = []
    for seed in (3, 3, 4):
        model = build("bert")
        before = torch.get_rng_state()
        wrapper = attached(model, peft_type, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        starts.append(list(stored_tensors(wrapper).values()))
    assert equal(starts[0], starts[1]) and not equal(starts[0], starts[2])
    attached(build("bert"), peft_type, seed=None)
    assert not torch.equal(torch.get_rng_state(), before)


def test_two_adapters_are_refused(build):
    wrapper = attached(build("bert"), "DORA")
    with pytest.raises(ParameterError, match="the model already has 'peft'"):
        attach(wrapper, "lora")


@pytest.mark.parametrize("peft_type", ["DORA", "IA3", "VERA", "PREFIX_TUNING"])
def test_outputs_and_gradients_are_pefts_own(build, peft_type):
    from peft import get_peft_model

    ours = attached(build("bert"), peft_type)
    config = copy.deepcopy(ours.peft_config["default"])
    with quiet():
        theirs = get_peft_model(build("bert"), config).eval()
    theirs.load_state_dict(ours.state_dict())
    for model in (ours, theirs):
        model(**batch(ours)).loss.backward()
    assert torch.equal(logits(ours), theirs(**{k: v for k, v in batch(ours).items() if k != "labels"}).logits)
    grads = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (ours, theirs)]
    assert grads[0].keys() == grads[1].keys() and all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


def test_parameters_are_counted_once(build):
    model = build("bert")
    base = sum(p.numel() for p in model.parameters())
    own = parameter_stats(attach(build("bert"), "lora", rank=4, seed=0))
    assert parameter_stats(attach(model, "peft", peft_type="LORA", rank=4, seed=0)) == own
    assert own.total == base + own.trainable - 66  # the head is among both


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_file_goes_into_what_is_attached_or_is_refused(build, tmp_path):
    saved = attached(build("bert"), "IA3")
    train(saved)
    save_adapter(saved, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    other = attached(build("bert"), "IA3")
    assert load_adapter(other, tmp_path) is other
    assert torch.equal(logits(other), logits(saved))
    for peft_type, message in (("LN_TUNING", "holds PEFT's IA3, but LN_TUNING is attached"), ("VERA", "IA3, but VERA")):
        with pytest.raises(CheckpointError, match=message):
            load_adapter(attached(build("bert"), peft_type), tmp_path)
    narrow = attached(build("bert"), "IA3", target_modules=["key"])
    with pytest.raises(CheckpointError, match="target_modules|feedforward_modules"):
        load_adapter(narrow, tmp_path)
    with pytest.raises(CheckpointError, match="IA3"):
        load_adapter(attach(build("bert"), "lora"), tmp_path)
    with pytest.raises(CheckpointError):
        load_adapter(build("gpt2"), tmp_path)


def test_of_several_settings_that_differ_the_first_by_name_is_told(build, tmp_path):
    save_adapter(attached(build("bert"), "DORA", rank=4), tmp_path)
    other = attached(build("bert"), "DORA", rank=2, alpha=3, dropout=0.5, init="gaussian", target_modules=["key"])
    with pytest.raises(CheckpointError, match=r"init_lora_weights=True, attached is 'gaussian'; detach"):
        load_adapter(other, tmp_path)


def test_a_file_with_a_tensor_missing_leaves_the_model_bare(build, tmp_path):
    from safetensors.torch import load_file, save_file

    save_adapter(attached(build("bert"), "VERA"), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors.pop(next(name for name in tensors if "vera_lambda_b" in name))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model = build("bert")
    modules = list(model.modules())
    with pytest.raises(CheckpointError, match="1 missing tensors: .*vera_lambda_b"):
        load_adapter(model, tmp_path)
    assert list(model.modules()) == modules and not hasattr(model, "peft_config")


@pytest.mark.parametrize(
    ("peft_type", "given"),
    [("P_TUNING", {}), ("PREFIX_TUNING", {"prefix_projection": True, "encoder_hidden_size": 16})],
)
def test_a_prompt_encoders_file_is_for_inference_alone(build, tmp_path, peft_type, given):
    saved = attached(build("bert"), peft_type, **({"peft_options": given} if given else {}))
    save_adapter(saved, tmp_path)
    with pytest.raises(CheckpointError, match="stores what its encoder gives"):
        load_adapter(saved, tmp_path)


def test_saving_and_training_while_merged_are_refused(build, tmp_path):
    wrapper = merge(attached(build("bert"), "DORA"))
    assert merge(wrapper) is wrapper and is_merged(wrapper)
    save_adapter(attached(build("bert"), "DORA"), tmp_path)
    calls = (lambda: save_adapter(wrapper, tmp_path), lambda: adapter_state(wrapper))
    for refused in (*calls, lambda: load_adapter(wrapper, tmp_path)):
        with pytest.raises(CheckpointError, match="merged"):
            refused()
    with pytest.raises(LorakitError, match="unmerge"):
        wrapper.train()(**batch(wrapper))
    unmerge(wrapper)(**batch(wrapper)).loss.backward()


def test_merging_a_tied_head_leaves_the_embedding_alone(build):
    model = build("gpt2")
    embedding = model.transformer.wte.weight.detach().clone()
    wrapper = attach(model, "peft", peft_type="LORA", target_modules=["lm_head"], seed=0)
    train(wrapper)
    expected = logits(wrapper)
    with merged(wrapper):
        torch.testing.assert_close(logits(wrapper), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(model.transformer.wte.weight, embedding)
    assert detach(wrapper).lm_head.weight is model.transformer.wte.weight


def test_a_model_that_moved_while_merged_unmerges_where_it_is(build):
    wrapper = attached(build("bert"), "LORA")
    train(wrapper)
    expected = logits(wrapper)
    unmerge(merge(wrapper).double())
    assert {p.dtype for p in wrapper.parameters()} == {torch.float64}
    torch.testing.assert_close(logits(wrapper).float(), expected, atol=1e-4, rtol=1e-4)


def test_inputs_may_be_given_by_place_and_the_task_is_the_first_unless_told(build):
    wrapper = attached(build("bert"), "POLY", peft_options={"n_tasks": 2}).eval()
    train(wrapper)
    ids = batch(wrapper)["input_ids"]
    by_task = [wrapper(input_ids=ids, task_ids=torch.full((4,), task)).logits for task in (0, 1)]
    assert torch.equal(wrapper(ids).logits, by_task[0]) and torch.equal(wrapper(input_ids=ids).logits, by_task[0])
    assert not torch.equal(*by_task)


def test_the_loss_of_a_prompted_masked_model_is_that_of_its_real_tokens(build):
    wrapper = attached(build("masked"), "PROMPT_TUNING")
    inputs = batch(wrapper)
    out, labels = wrapper(**inputs), inputs["labels"]
    expected = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(out.loss, expected)


def test_packed_rows_are_refused_for_prompts(build):
    wrapper = attached(build("gpt2"), "PROMPT_TUNING")
    with pytest.raises(LorakitError, match="packed rows"):
        wrapper(**batch(wrapper), position_ids=torch.arange(9).expand(4, 9))
    other = attached(build("gpt2"), "LORA")
    given = batch(other) | {"position_ids": torch.arange(9).expand(4, 9)}
    assert torch.equal(other(**given).logits, other(**batch(other)).logits)


# --- the trainer and AdaLoRA's schedule ------------------------------------------------------------------------------


@pytest.mark.parametrize("peft_type", IN_THE_TRAINER)
def test_a_type_trains_in_the_trainer(tiny_bert, tmp_path, peft_type):
    model = attached(tiny_bert(num_labels=2), peft_type)
    schedule = PeftSchedule(model)
    run = trainer(model, tmp_path, budget=Budget(4, "steps"), evaluations=2, controllers=(schedule,))
    run.train()
    assert run.ledger.steps == 4 and run.ledger.tokens > 0
    assert run.ledger.flops_forward > 0 and run.ledger.flops_backward > 0
    assert [point.validation.keys() for point in run.curve.points if point.validation] == [{"loss", "accuracy"}] * 2
    assert json.loads(json.dumps(schedule.report())) == schedule.report()
    stats = parameter_stats(model)
    assert 0 < stats.trainable < stats.total and adapter_bytes(model) > 0
    assert run.curve.points[0].train_loss != run.curve.points[-1].train_loss


def test_adalora_ends_with_its_ranks_and_saves_only_those(tiny_bert, tmp_path):
    from safetensors.torch import load_file, save_file

    torch.manual_seed(7)
    base = tiny_bert()
    model = attach(copy.deepcopy(base), "peft", peft_type="ADALORA", rank=2, total_steps=12, seed=0)
    schedule = PeftSchedule(model)
    start = schedule.report()["ranks"]
    run = trainer(model, tmp_path / "run", budget=Budget(12, "steps"), controllers=(schedule,))
    run.train()
    ranks = schedule.report()["ranks"]
    assert sum(ranks.values()) == 2 * len(ranks) and set(start.values()) == {0}  # E starts at zero
    save_adapter(model, tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(t.shape[0] for name, t in stored.items() if "lora_E" in name) == sum(ranks.values())
    expected = logits(model.eval())
    again = load_adapter(copy.deepcopy(base), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(again), expected)
    save_adapter(again, tmp_path / "again")
    torch.testing.assert_close(logits(load_adapter(copy.deepcopy(base), tmp_path / "again").eval()), expected)
    assert load_adapter(model, tmp_path / "adapter") is model  # whose pattern says which ranks the file has
    torch.testing.assert_close(logits(model), expected)
    with pytest.raises(CheckpointError, match="lora_.* is .*, this model has"):
        load_adapter(
            attach(copy.deepcopy(base), "peft", peft_type="ADALORA", rank=2, total_steps=12), tmp_path / "adapter"
        )
    # weights of an earlier step have ranks that the last pattern has not: none of them may be lost
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_E" in name:
                p.fill_(0.1)
    save_adapter(model, tmp_path / "whole")
    whole = load_adapter(copy.deepcopy(base), tmp_path / "whole").eval()
    torch.testing.assert_close(logits(whole), logits(model))
    stored.popitem()
    save_file(stored, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="1 unexpected|1 missing|does not fit"):
        load_adapter(copy.deepcopy(base), tmp_path / "adapter")


def test_adalora_resumes_bitwise(tiny_bert, tmp_path):
    def start(folder):
        torch.manual_seed(7)
        model = attach(tiny_bert(), "peft", peft_type="ADALORA", rank=2, total_steps=12, seed=0)
        controllers = (PeftSchedule(model),)
        return trainer(model, tmp_path / folder, budget=Budget(12, "steps"), save_steps=5, controllers=controllers)

    whole = start("whole")
    whole.train()
    killed = start("killed")
    kill(killed, 16)  # two batches a step
    resumed = start("killed")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.ledger.steps == 12
    assert equal(weights(whole.model), weights(resumed.model))
    assert whole.controllers[0].report() == resumed.controllers[0].report()


def test_adaloras_penalty_has_pefts_gradient(build):
    model = attached(build("bert"), "ADALORA")
    factors = {n: p for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n}
    inputs = batch(model)
    labels = inputs.pop("labels")
    optimizer, schedule = torch.optim.SGD(model.parameters(), lr=0.0), PeftSchedule(model)
    schedule.begin()
    optimizer.step()  # without gradients to add to
    schedule.end()
    model(**inputs, labels=labels).loss.backward()
    pefts = {name: p.grad.clone() for name, p in factors.items()}
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(**inputs).logits, labels).backward()
    schedule.begin()
    torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.0).step()  # another's
    optimizer.step()
    schedule.end()
    optimizer.step()  # no longer
    for name, gradient in pefts.items():
        assert gradient.norm() > 1e-3
        torch.testing.assert_close(factors[name].grad, gradient, atol=1e-6, rtol=1e-4)


def test_a_step_without_a_backward_is_no_step_of_the_schedule(build):
    model = attached(build("bert"), "ADALORA")
    schedule = PeftSchedule(model)
    schedule.after_step(0.1, torch.optim.SGD(model.parameters(), lr=0.1))
    assert schedule.step == 0
    model(**batch(model)).loss.backward()
    schedule.after_step(0.1, torch.optim.SGD(model.parameters(), lr=0.1))
    assert schedule.step == 1 and schedule.state_dict()["ipt"]
