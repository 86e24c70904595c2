"""`lorakit.SkipLoRA` on the plain Trainer, with anyone's PEFT model."""

from __future__ import annotations

import pytest
import torch
import training_runs as runs
from skipping import at_work, plain_peft
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import lorakit
from lorakit.errors import ParameterError
from lorakit.skip.choice import threshold

STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
NOW = {"warmup": 0.0, "explore": 0.0}
EVERYTHING = 1e9  # a threshold that no M reaches
DEEP = r".*layer\.1\..*"


class Gradients(TrainerCallback):
    """Of every optimizer step, which adapters have a gradient, before they are cleared."""

    def __init__(self):
        self.seen: list[set[str]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        named = {name for name, p in model.named_parameters() if p.grad is not None and "lora_" in name}
        self.seen.append({name.split(".lora_")[0] for name in named})


def model(tiny_bert) -> nn.Module:
    """PEFT's LoRA, at work, on twelve layers of two blocks."""
    torch.manual_seed(0)
    return at_work(plain_peft(tiny_bert(**STILL)))


def trained(network: nn.Module, folder, callbacks=(), **given) -> Gradients:
    arguments = {
        **{"per_device_train_batch_size": 8, "max_steps": 5, "learning_rate": 1e-2, "use_cpu": True},
        **{"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "weight_decay": 0.1},
    }
    watch, args = Gradients(), TrainingArguments(str(folder), **arguments | given)
    data = {"train_dataset": runs.rows(), "data_collator": runs.collate}
    Trainer(network, args, callbacks=[*callbacks, watch], **data).train()
    return watch


@pytest.mark.parametrize("decide", ["forward", "ema"])
@pytest.mark.parametrize("skip", ["adapter", "prefix"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_threshold_zero_is_the_plain_run_bitwise(tmp_path, tiny_bert, decide, skip, accumulation):
    given = {"gradient_accumulation_steps": accumulation}
    plain, ours = model(tiny_bert), model(tiny_bert)
    trained(plain, tmp_path / "a", **given)
    callback = lorakit.SkipLoRA(ours, threshold=0.0, decide=decide, skip=skip, warmup=0.0)
    trained(ours, tmp_path / "b", [callback], **given)
    assert runs.equal(runs.weights(plain), runs.weights(ours))
    assert callback.steps == 5 and callback.report()["share_skipped"] == 0


def test_a_large_threshold_skips_all_but_the_last_adapter_which_alone_has_gradients_and_moves(tmp_path, tiny_bert):
    network = model(tiny_bert)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    callback = lorakit.SkipLoRA(network, threshold=EVERYTHING, **NOW)
    watch = trained(network, tmp_path, [callback])
    assert watch.seen == [{callback.paths[-1]}] * 5
    moved = {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}
    assert {name.split(".lora_")[0] for name in moved} == {callback.paths[-1]}
    assert callback.report()["share_skipped"] == pytest.approx(11 / 12)
    assert not any(hasattr(module, "probe") for module in network.modules())  # as it was


def test_a_mapping_skips_what_it_names_and_nothing_else(tmp_path, tiny_bert):
    network = model(tiny_bert)
    callback = lorakit.SkipLoRA(network, {"query": EVERYTHING, DEEP: EVERYTHING, "output.dense": 0.0}, **NOW)
    watch = trained(network, tmp_path, [callback])
    skipped = {path for path in callback.paths if path.endswith("query") or ".layer.1." in path}
    kept = {*callback.paths} - skipped
    assert len(skipped) == 7 and watch.seen == [kept] * 5
    shares = dict(zip(callback.paths, callback.report()["share_skipped_per_adapter"], strict=True))
    assert {path for path, share in shares.items() if share} == skipped


def test_before_the_warm_up_is_over_nothing_is_skipped(tmp_path, tiny_bert):
    network = model(tiny_bert)
    callback = lorakit.SkipLoRA(network, EVERYTHING, warmup=0.4, explore=0.0)
    watch = trained(network, tmp_path, [callback])
    assert list(map(len, watch.seen)) == [12, 12, 1, 1, 1]


@pytest.mark.parametrize("decide", ["forward", "ema"])
def test_a_mapping_in_a_run_of_params(tmp_path, decide):
    given = runs.QUICK | {
        "skip": "adapter",
        "skip_decide": decide,
        "skip_warmup": 0.3,
        "skip_explore": 0.0,
        "budget": 6,
    }
    record = lorakit.run(given | {"skip_threshold": {"q_lin": EVERYTHING}} | {"model": "toy-encoder"})
    skip = record.details["skip"]
    pairs = zip(skip["adapters"], skip["share_skipped_per_adapter"], strict=True)
    assert {path.endswith("q_lin"): share > 0 for path, share in pairs} == {True: True, False: False}
    assert record.resolved["skip_threshold"] == {"q_lin": EVERYTHING}


def test_the_first_name_that_fits_counts():
    settings = runs.skipping(threshold={"layer.0.query": 0.3, "query": 0.2, r".*layer\.1.*": 0.1})
    paths = {"layer.0.query": 0.3, "layer.1.query": 0.2, "layer.1.key": 0.1, "layer.0.key": 0.0, "myquery": 0.0}
    assert {path: threshold([], settings, path) for path in paths} == paths


@pytest.mark.parametrize(
    ("given", "told"),
    [({"threshold": -0.1}, "skip_threshold=-0.1: .*greater than or equal to 0"),
     ({"threshold": {"query": -0.1}}, "skip_threshold=.*greater than or equal to 0"),
     ({"threshold": {"q_proj": 0.1}}, "skip_threshold='q_proj': no adapter is called so; there are .*query"),
     ({"threshold": {"(": 0.1}}, r"skip_threshold='\(': not a regular expression"),
     ({"decide": "later"}, "skip_decide='later'"), ({"skip": "none"}, "skip='none': must be adapter or prefix"),
     ({"warm": 0.1}, "skip_warm=0.1: unknown parameter; did you mean 'skip_warmup'"),
     ({"min_active": 13}, "12 adapters")],
)  # fmt: skip
def test_bad_input_is_named(tiny_bert, given, told):
    with pytest.raises(ParameterError, match=told):
        lorakit.SkipLoRA(model(tiny_bert), **given)


def test_several_processes_are_sent_elsewhere(tiny_bert):
    from types import SimpleNamespace

    callback = lorakit.SkipLoRA(model(tiny_bert))
    with pytest.raises(ParameterError, match=r"several processes decide together in SLoRATrainer\(…, controllers="):
        callback.on_train_begin(SimpleNamespace(world_size=2), None, None)


def test_in_our_own_trainers_it_is_a_controller_and_no_callback(tmp_path, tiny_bert):
    network = model(tiny_bert)
    with pytest.raises(ParameterError, match=r"callbacks=\['SkipLoRA'\]: is a controller here: controllers="):
        lorakit.SLoRATrainer(network, TrainingArguments(str(tmp_path)), callbacks=[lorakit.SkipLoRA(network)])
