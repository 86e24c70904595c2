"""Two models small enough to be committed: DistilBERT's and Gemma 3's architectures, pre-trained on the toy grammar.

Weights are stored and loaded as fp32; `scripts/pretrain_toy.py` writes them. A third, GPT-2's architecture, has random
weights: it is for trying code that needs that architecture, and learns little.
"""

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from lorakit.tasks.toy import tokenizer as tokenizers

PRETRAINED = ("toy-encoder", "toy-decoder")
NAMES = (*PRETRAINED, "toy-gpt2")
NOTES = {"toy-gpt2": ("toy-gpt2: GPT-2's architecture at toy size with random weights, not pre-trained",)}


def folder(name: str) -> Path:
    """Where the packaged `config.json` and `model.safetensors` of this model are.

    The encoder's `initializer_range` is 1 / sqrt(dim) there: the default of 0.02 is for wide models. GPT-2 is what seed
    0 makes.
    """
    return Path(__file__).parent / "weights" / name


def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The byte tokenizer this model was pre-trained with."""
    return tokenizers.encoder_tokenizer() if name == "toy-encoder" else tokenizers.decoder_tokenizer()
