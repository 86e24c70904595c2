"""Small models in folders, with all that `models.load` looks for, and a hub that cannot be reached."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

SPECIALS = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]


def save_tokenizer(folder: Path, **special: str) -> None:
    """A word-level tokenizer of 99 tokens, as transformers stores one."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = SPECIALS + [f"w{i}" for i in range(99 - len(SPECIALS))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special).save_pretrained(folder)


@pytest.fixture
def bert(tmp_path, tiny_bert) -> str:
    """A folder with a BERT base model: no head of any kind."""
    tiny_bert().bert.save_pretrained(tmp_path / "bert")
    save_tokenizer(tmp_path / "bert", pad_token="[PAD]", mask_token="[MASK]")
    return str(tmp_path / "bert")


@pytest.fixture
def gpt2(tmp_path, tiny_gpt2) -> str:
    """A folder with a GPT-2 that has, as the real one, no padding token."""
    model = tiny_gpt2()
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    model.save_pretrained(tmp_path / "gpt2")
    save_tokenizer(tmp_path / "gpt2", eos_token="[CLS]")
    return str(tmp_path / "gpt2")


@pytest.fixture
def gemma(tmp_path, tiny_gemma) -> str:
    tiny_gemma().to(torch.bfloat16).save_pretrained(tmp_path / "gemma")
    save_tokenizer(tmp_path / "gemma", pad_token="[PAD]", eos_token="[CLS]", bos_token="[SEP]")
    return str(tmp_path / "gemma")


@pytest.fixture
def no_hub(monkeypatch):
    """No network, no hub cache; counts the questions asked."""
    asked = []

    def model_info(self, name, **_):
        asked.append(name)
        raise ConnectionError("name or service not known\nsecond line")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    return asked


@pytest.fixture(name="save_tokenizer")
def _save_tokenizer():
    return save_tokenizer
