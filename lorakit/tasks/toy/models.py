"""Two models small enough to be committed: DistilBERT's and Gemma 3's architectures, pre-trained on the toy grammar.

Weights are stored and loaded as fp32; `scripts/pretrain_toy.py` writes them. A third, GPT-2's architecture, has random
weights: it is for trying code that needs that architecture, and learns little.
"""

from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lorakit.errors import require
from lorakit.tasks.toy import tokenizer as tokenizers
from lorakit.tasks.toy.tokenizer import SPECIALS, VOCAB_SIZE

PRETRAINED = ("toy-encoder", "toy-decoder")
NAMES = (*PRETRAINED, "toy-gpt2")
NOTES = {"toy-gpt2": ("toy-gpt2: GPT-2's architecture at toy size with random weights, not pre-trained",)}


def folder(name: str) -> Path:
    """Where the packaged `config.json` and `model.safetensors` of this model are.

    Raises:
        ParameterError: no toy model has this name.
    """
    require(name in NAMES, "model", name, f"toy models are {', '.join(NAMES)}")
    return Path(__file__).parent / "weights" / name


def config(name: str) -> PreTrainedConfig:
    """The architecture, as it was pre-trained (GPT-2's: as it was initialised)."""
    import transformers

    folder(name)  # refuses unknown names
    pad, bos, eos, turn = map(SPECIALS.index, ("[PAD]", "<bos>", "<eos>", "<end_of_turn>"))
    if name == "toy-encoder":
        return transformers.DistilBertConfig(
            vocab_size=VOCAB_SIZE,
            dim=64,
            hidden_dim=192,
            n_layers=4,
            n_heads=4,
            max_position_embeddings=256,
            pad_token_id=pad,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
            initializer_range=0.125,  # 1 / sqrt(dim); the default 0.02 is for wide models
        )
    if name == "toy-gpt2":
        sizes = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 256}
        no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        tokens = {"pad_token_id": pad, "bos_token_id": bos, "eos_token_id": eos}
        return transformers.GPT2Config(vocab_size=VOCAB_SIZE, **sizes, **no_dropout, **tokens)
    return transformers.Gemma3TextConfig(
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
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=[eos, turn],
    )


def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The byte tokenizer this model was pre-trained with."""
    folder(name)  # refuses unknown names
    return tokenizers.encoder_tokenizer() if name == "toy-encoder" else tokenizers.decoder_tokenizer()


def build(name: str, random: bool = False) -> PreTrainedModel:
    """The model with its language-modelling head: as packaged, or as torch's seed initialises it if `random`.

    The packaged GPT-2 is what seed 0 makes.
    """
    auto = AutoModelForMaskedLM if name == "toy-encoder" else AutoModelForCausalLM
    return auto.from_config(config(name)) if random else auto.from_pretrained(folder(name), local_files_only=True)
