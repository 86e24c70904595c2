"""A byte is a token, id = byte + 9 after nine special tokens: no vocabulary file, and any text round-trips."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIALS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "<unk>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
VOCAB_SIZE = len(SPECIALS) + 256

# Gemma's turn format: no system turn (its text goes before the first user turn), the assistant is called "model".
# `generation` marks the assistant's tokens for `apply_chat_template(..., return_assistant_tokens_mask=True)`.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- set ns = namespace(system='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{%- set ns.system = (message['content'] | trim) + '\n\n' -%}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ '<start_of_turn>model\n' }}"
    "{%- generation -%}{{ (message['content'] | trim) + '<end_of_turn>' }}{%- endgeneration -%}{{ '\n' }}"
    "{%- else -%}"
    "{{ '<start_of_turn>user\n' + ns.system + (message['content'] | trim) + '<end_of_turn>\n' }}"
    "{%- set ns.system = '' -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)


def byte_tokenizer(single: str, pair: str, **options: object) -> PreTrainedTokenizerFast:
    """Bytes to ids; `single` and `pair` are templates saying where special tokens stand around one or two texts."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # inside `tokenizers` these stand for themselves
    others = [byte for byte in range(256) if byte not in printable]
    code = {byte: byte for byte in printable} | {byte: 256 + rank for rank, byte in enumerate(others)}  # GPT-2's table
    vocab = {token: index for index, token in enumerate((*SPECIALS, *(chr(code[byte]) for byte in range(256))))}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(token, vocab[token]) for token in SPECIALS]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **options,
    )


def encoder_tokenizer() -> PreTrainedTokenizerFast:
    """[CLS] text [SEP], or [CLS] a [SEP] b [SEP] for a pair."""
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return byte_tokenizer("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", **special, model_max_length=256)


def decoder_tokenizer() -> PreTrainedTokenizerFast:
    """<bos> text, with a chat template in Gemma's turn format; [PAD] pads, <eos> ends a text."""
    return byte_tokenizer(
        "<bos> $A",
        "<bos> $A $B",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<start_of_turn>", "<end_of_turn>"],
        chat_template=CHAT_TEMPLATE,
        padding_side="right",
        model_max_length=512,
    )
