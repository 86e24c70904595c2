"""Two models small enough to be committed: DistilBERT's and Gemma 3's architectures, pre-trained on the toy grammar.

Weights are stored and loaded as fp32; `scripts/pretrain_toy.py` writes them. A third, GPT-2's architecture, has random
weights: it is for trying code that needs that architecture, and learns little.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.errors import require
from lorakit.tasks.toy.tokenizer import SPECIALS, VOCAB_SIZE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

NAMES = ("toy-encoder", "toy-decoder")
UNTRAINED = "toy-gpt2"


def folder(name: str) -> Path:
    """Where the packaged `config.json` and `model.safetensors` of this model are.

    Raises:
        ParameterError: no toy model has this name.
    """
    require(name in (*NAMES, UNTRAINED), "model", name, f"toy models are {', '.join(NAMES)}, {UNTRAINED}")
    return Path(__file__).parent / "weights" / name


def config(name: str) -> PreTrainedConfig:
    """The architecture, as it was pre-trained."""
    require(name in NAMES, "model", name, f"toy models are {', '.join(NAMES)}")
    return _encoder_config() if name == "toy-encoder" else _decoder_config()


def _encoder_config() -> PreTrainedConfig:
    from transformers import DistilBertConfig

    return DistilBertConfig(
        vocab_size=VOCAB_SIZE,
        dim=64,
        hidden_dim=192,
        n_layers=4,
        n_heads=4,
        max_position_embeddings=256,
        pad_token_id=SPECIALS.index("[PAD]"),
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
        initializer_range=0.125,  # 1 / sqrt(dim); the default 0.02 is for wide models
    )


def gpt2_config() -> PreTrainedConfig:
    """The architecture of the untrained one."""
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_embd=48,
        n_layer=2,
        n_head=4,
        n_positions=256,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=SPECIALS.index("[PAD]"),
        bos_token_id=SPECIALS.index("<bos>"),
        eos_token_id=SPECIALS.index("<eos>"),
    )


def build_untrained() -> PreTrainedModel:
    """The untrained one with its language-modelling head, from seed 0; how its packaged weights were made."""
    import torch
    from transformers import GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return GPT2LMHeadModel(gpt2_config())


def _decoder_config() -> PreTrainedConfig:
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=24,
        query_pre_attn_scalar=24,
        max_position_embeddings=512,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention"] * 2,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        initializer_range=0.05,
        pad_token_id=SPECIALS.index("[PAD]"),
        bos_token_id=SPECIALS.index("<bos>"),
        eos_token_id=[SPECIALS.index("<eos>"), SPECIALS.index("<end_of_turn>")],
    )


def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The byte tokenizer this model was pre-trained with."""
    from lorakit.tasks.toy import tokenizer as tokenizers

    require(name in (*NAMES, UNTRAINED), "model", name, f"toy models are {', '.join(NAMES)}, {UNTRAINED}")
    return tokenizers.encoder_tokenizer() if name == "toy-encoder" else tokenizers.decoder_tokenizer()


def build(name: str, random: bool = False) -> PreTrainedModel:
    """The model with its language-modelling head: as pre-trained, or as torch's seed initialises it if `random`.

    Raises:
        ParameterError: no toy model has this name.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    require(name in NAMES, "model", name, f"toy models are {', '.join(NAMES)}")
    auto = AutoModelForMaskedLM if name == "toy-encoder" else AutoModelForCausalLM
    return _random(auto, name) if random else auto.from_pretrained(folder(name), local_files_only=True)


def _random(auto: type, name: str) -> PreTrainedModel:
    return auto.from_config(config(name))
