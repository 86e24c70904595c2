"""A byte is a token, id = byte + 9 after nine special tokens: no vocabulary file, and any text round-trips."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lorakit.files import CONFIGS

SPECIALS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "<unk>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
VOCAB_SIZE = len(SPECIALS) + 256
CHAT_TEMPLATE = CONFIGS / "toy_chat.jinja"


def byte_tokenizer(single: str, pair: str, **options: object) -> PreTrainedTokenizerFast:
    """Bytes to ids; `single` and `pair` are templates saying where special tokens stand around one or two texts."""
    # GPT-2's table: the character that stands for a byte inside `tokenizers`
    vocab = {token: index for index, token in enumerate((*SPECIALS, *map(bytes_to_unicode().get, range(256))))}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    ids = [(token, vocab[token]) for token in SPECIALS]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    options |= {"pad_token": "[PAD]", "unk_token": "<unk>", "clean_up_tokenization_spaces": False}
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=names, **options)


def encoder_tokenizer() -> PreTrainedTokenizerFast:
    """[CLS] text [SEP], or [CLS] a [SEP] b [SEP] for a pair."""
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return byte_tokenizer("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", **special, model_max_length=256)


def decoder_tokenizer() -> PreTrainedTokenizerFast:
    """<bos> text, with a chat template in Gemma's turn format; [PAD] pads, <eos> ends a text."""
    turns = ["<start_of_turn>", "<end_of_turn>"]
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "additional_special_tokens": turns}
    form = {"chat_template": CHAT_TEMPLATE.read_text(encoding="utf-8"), "padding_side": "right"}
    return byte_tokenizer("<bos> $A", "<bos> $A $B", **special, **form, model_max_length=512)
