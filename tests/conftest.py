"""What tests share: one thread, fixed seeds, small random models, and the reasons why a test is skipped."""

from __future__ import annotations

import os
import tempfile

for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MPLBACKEND": "agg",
}.items():
    os.environ.setdefault(_name, _value)  # before torch is imported
if os.environ.get("LORAKIT_HUB") != "1":
    os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs the hub says so

_kept = tempfile.TemporaryDirectory(prefix="lorakit-tests-")  # what `datasets` stores; removed at the end
os.environ["HF_DATASETS_CACHE"] = _kept.name

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

TINY = {"vocab_size": 99, "pad_token_id": 0}


# files whose tests take longest, by starting processes or compiling: a worker that began one last would end alone
LONG = ("test_equal_processes.py", "test_distributed.py", "test_sweep.py", "test_resuming.py",
        "test_experiment.py", "test_runner.py", "test_compiled.py", "test_skip.py")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))
    for item in items:
        for mark in item.iter_markers():
            if reason := MISSING[mark.name](*mark.args) if mark.name in MISSING else "":
                item.add_marker(pytest.mark.skip(reason=reason))


def _missing_assets(*names: str) -> str:
    """Why the assets named (all of them, where none is) cannot be used; empty where they can."""
    from lorakit import assets

    missing = [name for name in names or assets.ASSETS if assets.path(name) is None]
    return f"not cached: {', '.join(missing)} (lorakit fetch NAME)" if missing else ""


MISSING = {
    "data": lambda: "" if os.environ.get("LORAKIT_DATA") else "LORAKIT_DATA is not set",
    "hub": lambda: "" if os.environ.get("LORAKIT_HUB") == "1" else "LORAKIT_HUB=1 is not set",
    "cuda": lambda: "" if torch.cuda.is_available() else "no CUDA device",
    "assets": _missing_assets,
}


@pytest.fixture(autouse=True)
def _seeds() -> None:
    torch.manual_seed(0)


@pytest.fixture
def data_files() -> Path:
    """Folder with the real data sets."""
    if not os.environ.get("LORAKIT_DATA"):
        pytest.skip("LORAKIT_DATA is not set")
    return Path(os.environ["LORAKIT_DATA"])


@pytest.fixture
def tiny_bert():
    """Factory of 2-layer BERT sequence classifiers with random weights."""

    import training_runs

    return training_runs.bert


@pytest.fixture
def tiny_gpt2():
    """Factory of 2-layer GPT-2 causal language models with random weights."""

    def build(**overrides):
        from transformers import GPT2Config, GPT2LMHeadModel

        config = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 1}
        return GPT2LMHeadModel(GPT2Config(**(TINY | config | overrides)))

    return build


@pytest.fixture
def tiny_gemma():
    """Factory of 2-layer Gemma-3 text models (one sliding, one full attention layer) with random weights."""

    def build(**overrides):
        from transformers import Gemma3ForCausalLM, Gemma3TextConfig

        config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
        config |= {"head_dim": 16, "intermediate_size": 64, "max_position_embeddings": 64, "sliding_window": 8}
        config |= {"layer_types": ["sliding_attention", "full_attention"], "bos_token_id": 2, "eos_token_id": 1}
        return Gemma3ForCausalLM(Gemma3TextConfig(**(TINY | config | overrides)))

    return build


@pytest.fixture
def build(tiny_bert, tiny_gpt2, tiny_gemma):
    """`build(kind)`: the same small model at every call."""
    import transformers

    def distilbert(**overrides):
        config = {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "pad_token_id": 0}
        config = transformers.DistilBertConfig(**config | overrides)
        return transformers.DistilBertForSequenceClassification(config)

    def gpt2_classifier(**overrides):
        return transformers.GPT2ForSequenceClassification(tiny_gpt2(**overrides).config)

    def masked(**overrides):
        return transformers.BertForMaskedLM(tiny_bert(**overrides).config)

    kinds = {"bert": tiny_bert, "gpt2": tiny_gpt2, "gemma": tiny_gemma, "masked": masked}
    kinds |= {"distilbert": distilbert, "gpt2_classifier": gpt2_classifier}

    def build(kind, **overrides):
        torch.manual_seed(7)
        return kinds[kind](**overrides).eval()

    return build


@pytest.fixture(scope="session")
def encoder():
    """The toy encoder's tokenizer."""
    from lorakit.tasks.toy import tokenizer as toy

    return toy.encoder_tokenizer()


@pytest.fixture(scope="session")
def decoder():
    """The toy decoder's tokenizer."""
    from lorakit.tasks.toy import tokenizer as toy

    return toy.decoder_tokenizer()
