"""Tiny random models of many architectures in folders of their own, with a word-level tokenizer, and rows for them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
import transformers as hf

SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 64, "max_position_embeddings": 66, "pad_token_id": 0}
GROUPED = SIZES | {"num_key_value_heads": 1}
OPT = {"vocab_size": 99, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2}
T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
VIT = {name: SIZES[name] for name in [*SIZES][1:5]} | {"image_size": 32, "patch_size": 16}
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
DECODERS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=16)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**GROUPED)),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SIZES)),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**OPT, num_attention_heads=2, max_position_embeddings=64)),
}
ENCODERS = {
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES)),
    "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**SIZES)),
    "deberta-v2": lambda: hf.DebertaV2ForMaskedLM(hf.DebertaV2Config(**SIZES, **DISENTANGLED, pooler_hidden_size=32)),
    "electra": lambda: hf.ElectraForMaskedLM(hf.ElectraConfig(**SIZES, embedding_size=16)),
    "modernbert": lambda: hf.ModernBertForMaskedLM(hf.ModernBertConfig(**SIZES)),
}
OTHERS = {
    "falcon": lambda: hf.FalconForCausalLM(hf.FalconConfig(**SIZES)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**VIT)),
    "mamba": lambda: hf.MambaForCausalLM(hf.MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2)),
}
MODELS = DECODERS | ENCODERS | OTHERS
OF_ENCODER = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "pad_token": "[PAD]"}
OF_DECODER = {"bos_token": "[CLS]", "eos_token": "[SEP]"}


def tokenizer(encoder: bool, size: int = 99, **special: str | None) -> hf.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", *(f"w{n}" for n in range(size - 5))]
    made = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    named = {"unk_token": "[UNK]"} | (OF_ENCODER if encoder else OF_DECODER) | special
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, **named)


def saved(name: str, root: Path) -> str:
    """The folder of the model of that name."""
    torch.manual_seed(0)
    folder = root / name
    MODELS[name]().save_pretrained(folder)
    tokenizer(name in ENCODERS).save_pretrained(folder)
    return str(folder)


def rows(path: Path, count: int = 60) -> str:
    """Texts of twelve words and their class, told by the first word, as a file."""
    draw = random.Random(0)
    texts = [[f"w{draw.randrange(90)}" for _ in range(12)] for _ in range(count)]
    told = ({"text": " ".join(words), "label": int(words[0][1:]) % 2} for words in texts)
    path.write_text("".join(json.dumps(row) + "\n" for row in told))
    return str(path)
