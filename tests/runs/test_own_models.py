"""A model of the reader's own: what the adapters serve trains, what they do not is refused before data are read."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import architectures
import pytest
from torch import nn
from transformers import AutoTokenizer, RobertaConfig, RobertaForSequenceClassification

import lorakit
from lorakit import models
from lorakit.cli import main
from lorakit.errors import LorakitError, ParameterError

QUICK = {"budget": 2, "evaluations": 1, "batch_size": 4, "rank": 2, "max_length": 16, "latency_repeats": 0}
QUICK |= {"predict_memory": False}
EAGER = {"attention": "eager"}
ALL_AT_ONCE = {
    **{"quantize": "nf4", "skip": "prefix", "skip_share": 0.5, "skip_warmup": 0.0, "skip_explore": 0.0},
    **{"gate": "novelty", "gate_burn_in": 1, "gate_m": 64, "gate_k": 8, "gating": {"method": "flora"}, "budget": 3},
}
BOTH = ("deberta-v2", "opt")  # read as classifiers too, beside these
CLASSIFIERS = ("bert", "modernbert", "phi3", *BOTH)
READERS = [name for name in architectures.DECODERS | architectures.ENCODERS if name not in CLASSIFIERS or name in BOTH]


def asked(name: str, root: Path, task: str) -> dict:
    """A quick run on a model of that name; DeBERTa has no other attention than its own."""
    own = EAGER if name == "deberta-v2" else {}
    data = architectures.rows(root / "rows.jsonl")
    return QUICK | own | {"model": architectures.saved(name, root), "task": task, "data_files": data}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_trains_by_hira_on_every_linear_layer_of_its_base(tmp_path, name):
    record = lorakit.run(given := asked(name, tmp_path, "labelled") | {"method": "hira"})
    assert (record.status, record.costs.accepted_steps) == ("done", 2)
    whole = models.load(given["model"], "classify", attention=given.get("attention", "sdpa")).model
    base = getattr(whole, whole.base_model_prefix)
    linear = [layer.weight.shape for layer in base.modules() if isinstance(layer, nn.Linear)]
    head = whole.num_parameters() - base.num_parameters()
    assert record.parameters.trainable == given["rank"] * sum(map(sum, linear)) + head


@pytest.mark.parametrize("name", READERS)
def test_a_language_model_trains_by_all_four_answers_at_once(tmp_path, name):
    """4 bits, skipped layers, gated batches, chosen tokens."""
    record = lorakit.run(asked(name, tmp_path, "text") | ALL_AT_ONCE)
    assert (record.status, record.costs.accepted_steps) == ("done", 3)
    skip, blocks = record.details["skip"], {}
    for block, share in zip(skip["blocks"], skip["share_skipped_per_adapter"], strict=True):
        blocks.setdefault(block, set()).add(share > 0)
    assert blocks[0] == {True} and blocks[max(blocks)] == {False}
    assert record.details["tokens"] and record.details["weights"] and record.details["gate"]["decisions"] >= 3


# refused before data are read, which are not there ----------------------------------------------------


def without(folder: str, *patterns: str) -> None:
    for pattern in patterns:
        for path in Path(folder).glob(pattern):
            path.unlink()


def no_padding(folder: str) -> None:
    architectures.tokenizer(False, eos_token=None).save_pretrained(folder)


def padding_added(folder: str) -> None:
    words = AutoTokenizer.from_pretrained(folder)
    words.add_special_tokens({"pad_token": "[NEW]"})
    words.save_pretrained(folder)


def edited(folder: str, **changes: int) -> None:
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


NEOX = "query_key_value, dense, dense_h_to_4h, dense_4h_to_h"
REFUSED = {  # model, what is done to its folder, what is asked, what is said
    "encoder-decoder": ("t5", None, {}, "model='{0}': t5 is an encoder-decoder; must be an encoder or a decoder"),
    "vision": ("vit", None, {}, "model='{0}': vit has neither a masked nor a causal"),
    "no such head": ("mamba", None, {}, "kind='classify': not there for a mamba model"),
    "no config": ("opt", lambda f: without(f, "config.json"), {}, "model='{0}': the folder has no config.json"),
    "no weights": ("opt", lambda f: without(f, "*.safetensors"), {}, "model='{0}': the folder has no weights"),
    "no tokenizer": ("opt", lambda f: without(f, "token*"), {}, "model='{0}' .*: its tokenizer cannot be read"),
    "no padding": ("opt", no_padding, {}, "model='{0}': its tokenizer has neither a padding nor"),
    "larger vocabulary": (
        "opt", lambda f: architectures.tokenizer(False, 120).save_pretrained(f), {},
        "model='{0}': its tokenizer has token 'w114', number 119, its embedding 99 rows"),
    "padding added": ("opt", padding_added, {}, "model='{0}': its tokenizer has token '.NEW.', number 99"),
    "target_modules": (
        "gpt_neox", None, {"target_modules": ["q_proj"]},
        f"target_modules=.*'q_proj' matches no module; the model's linear layers are {NEOX}"),
    "PEFT's target_modules": (
        "gpt_neox", None, {"method": "peft", "peft_type": "VERA", "target_modules": ["q_proj"]},
        "target_modules=.*'q_proj' matches no module"),
    "attention": ("deberta-v2", None, {}, "attention='sdpa': not there for a deberta-v2 model; use 'eager', or mend"),
    "flash attention": (
        "opt", None, {"attention": "flash_attention_2", "dtype": "bf16"},
        "attention='flash_attention_2': not there for a opt model; use 'eager', or mend "),
    "a broken config": (
        "opt", lambda f: edited(f, num_attention_heads=3), {},
        "attention='sdpa': .* or mend {0}/config.json: embed_dim must be divisible by num_heads"),
    "layers of a class of its own": (
        "falcon", None, {"quantize": "nf4"},
        "quantize='nf4': transformer.h.0.self_attention.query_key_value is a FalconLinear, not a plain nn.Linear"),
    "an encoder's chats": ("bert", None, {"task": "chat"}, "task='chat': is generation, which an encoder cannot do"),
    "fractional": (
        "bert", None, {"task": "text", "gating": {"method": "flora", "mode": "fractional"}},
        "gating.mode='fractional': needs a causal language model"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name_before_data_are_read(tmp_path, case):
    name, spoil, given, told = REFUSED[case]
    folder = architectures.saved(name, tmp_path)
    if spoil:
        spoil(folder)
    run = QUICK | {"model": folder, "task": "labelled", "data_files": str(tmp_path / "none.csv")} | given
    run |= {"run_dir": str(tmp_path / "run")}
    with pytest.raises(LorakitError, match=told.format(folder)) as caught:
        lorakit.run(run)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_special_token_that_no_text_has_is_no_reason(tmp_path):
    """An image's, say, in the tokenizer of Gemma's text models; and what is left to refuse are the data."""
    folder = architectures.saved("opt", tmp_path)
    words = AutoTokenizer.from_pretrained(folder)
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    words.save_pretrained(folder)
    with pytest.raises(LorakitError, match="data_files='none.csv': no file"):
        lorakit.run(QUICK | {"model": folder, "task": "labelled", "data_files": "none.csv"})


def test_flash_attention_computes_in_16_bits():
    with pytest.raises(ParameterError, match="attention='flash_attention_2': computes in 16 bits only"):
        lorakit.run({"attention": "flash_attention_2"})
    for asked in (
        {"budget_unit": "flops", "budget": 1e9},
        {"packing": True, "model": "toy-decoder", "task": "toy-instruct"},
    ):
        with pytest.raises(ParameterError, match="mixes packed rows, and its FLOPs are not counted"):
            lorakit.run({"attention": "flash_attention_2", "dtype": "bf16"} | asked)


def test_a_run_whose_memory_cannot_be_predicted_is_a_run(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no fake tensors\nfor this")

    monkeypatch.setattr("lorakit.measure.memory.predict_step_memory", fails)
    record = lorakit.run(QUICK | {"predict_memory": True})
    assert record.status == "done" and record.costs.predicted_memory is None
    assert "memory not predicted: no fake tensors for this" in record.notes


def test_what_is_longer_than_the_model_s_positions_is_refused_and_no_longer_limit(tmp_path, capsys):
    """In training, where a row in fact is; in an answer; a classifier's text is cut."""
    given = QUICK | {"model": "toy-encoder", "task": "labelled", "max_length": 1000}
    for words, fine in ((20, True), (300, False)):
        rows = "".join(f"{'late ' * words}{n},{n % 2}\n" for n in range(30))
        (tmp_path / "rows.csv").write_text("text,label\n" + rows)
        told = "max_length=1000: a row has [0-9]+ tokens, the model 256 positions"
        with nullcontext() if fine else pytest.raises(ParameterError, match=told):
            assert lorakit.run(given | {"data_files": str(tmp_path / "rows.csv")}).status == "done"
    argv, chat = ["generate", "toy-gpt2", "--prompt", "the cat " * 20, "--max-new-tokens"], {"role": "user"}
    form = {"add_generation_prompt": True, "return_dict": True}
    asked = models.tokenizer("toy-gpt2").apply_chat_template([chat | {"content": argv[3]}], **form)
    length = len(asked["input_ids"])
    assert main([*argv, str(257 - length)]) == 0
    assert main([*argv, str(258 - length)]) == 2
    told = f"--max-new-tokens={258 - length}: with a prompt of {length} tokens these are more than the model's 256 pos"
    assert told in capsys.readouterr().err
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = RobertaConfig(vocab_size=300, max_position_embeddings=66, pad_token_id=0, type_vocab_size=1, **sizes)
    RobertaForSequenceClassification(config).save_pretrained(tmp_path / "roberta")
    tokenizer = models.tokenizer("toy-encoder")
    tokenizer.model_max_length = int(1e30)
    tokenizer.save_pretrained(tmp_path / "roberta")
    assert main(["predict", str(tmp_path / "roberta"), "--text", "late " * 100]) == 0


@pytest.mark.parametrize(("name", "most"), [("bert", 66), ("roberta", 65), ("opt", 64), ("phi3", sys.maxsize)])
def test_only_learned_positions_end(name, most):
    assert models.positions(architectures.MODELS[name]()) == most
