"""Two models small enough to be committed: DistilBERT's and Gemma 3's architectures, pre-trained on the toy grammar.

Weights are stored and loaded as fp32; `scripts/pretrain_toy.py` writes them. A third, GPT-2's architecture, has random
weights: it is for trying code that needs that architecture, and learns little.
"""

from pathlib import Path

import transformers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from lorakit.errors import require
from lorakit.tasks.toy import tokenizer as tokenizers

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
    """The architecture, as it was pre-trained (GPT-2's: as it was initialised), by the packaged `config.json`.

    The encoder's `initializer_range` is 1 / sqrt(dim) there: the default of 0.02 is for wide models.
    """
    return transformers.AutoConfig.from_pretrained(folder(name), local_files_only=True)


def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The byte tokenizer this model was pre-trained with."""
    folder(name)  # refuses unknown names
    return tokenizers.encoder_tokenizer() if name == "toy-encoder" else tokenizers.decoder_tokenizer()


def build(name: str, random: bool = False) -> PreTrainedModel:
    """The model with its language-modelling head: as packaged, or as torch's seed initialises it if `random`.

    The packaged GPT-2 is what seed 0 makes.
    """
    auto = getattr(transformers, "AutoModelForMaskedLM" if name == "toy-encoder" else "AutoModelForCausalLM")
    return auto.from_config(config(name)) if random else auto.from_pretrained(folder(name), local_files_only=True)
