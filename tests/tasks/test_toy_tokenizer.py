"""The byte tokenizer: any text survives, ids are bytes, special tokens and Gemma's turns stand where they should."""

from __future__ import annotations

import pytest

from lorakit.tasks.toy.grammar import chats
from lorakit.tasks.toy.tokenizer import SPECIALS, VOCAB_SIZE, decoder_tokenizer, encoder_tokenizer

TEXTS = [
    "", " ", "the plot is not dull.", "  two  spaces , isn't it ?  ", "tabs\tand\nlines\r\n\n",
    "naïve Zürich Ελλάδα 日本語", "🤖👩‍👩‍👧‍👦 e\u0301 \u00e9", "\x00\x7f\u2028\ufffd",
    "".join(map(chr, range(1, 0x250))),
]  # fmt: skip


@pytest.fixture(scope="module", params=[encoder_tokenizer, decoder_tokenizer])
def tokenizer(request):
    return request.param()


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_the_bytes_of_any_text_which_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [index - len(SPECIALS) for index in ids] == list(text.encode())


def test_vocabulary_is_specials_and_bytes(tokenizer):
    assert len(tokenizer) == tokenizer.vocab_size == VOCAB_SIZE == 265
    assert tokenizer.convert_ids_to_tokens(list(range(len(SPECIALS)))) == list(SPECIALS)


def test_encoder_frames_one_text_and_a_pair():
    tokenizer = encoder_tokenizer()
    cls, sep, a, b = tokenizer.cls_token_id, tokenizer.sep_token_id, 9 + ord("a"), 9 + ord("b")
    assert tokenizer("a")["input_ids"] == [cls, a, sep]
    assert tokenizer("a", "b")["input_ids"] == [cls, a, sep, b, sep]
    assert tokenizer(["a" * 500], truncation=True, max_length=16)["input_ids"][0][-1] == sep
    assert set(tokenizer("a")) == {"input_ids", "attention_mask"}
    assert tokenizer("[MASK]")["input_ids"] == [cls, tokenizer.mask_token_id, sep]


def test_padding_is_masked(tokenizer):
    batch = tokenizer(["a", "abc"], padding=True)
    assert batch["input_ids"][0][-2:] == [tokenizer.pad_token_id] * 2 == [0, 0]
    assert batch["attention_mask"][0][-2:] == [0, 0]


def test_turns_are_gemmas():
    tokenizer = decoder_tokenizer()
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " hi "}]
    chat += [{"role": "assistant", "content": "yes\n"}, {"role": "user", "content": "why"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<bos><start_of_turn>user\nBe brief.\n\nhi<end_of_turn>\n<start_of_turn>model\nyes<end_of_turn>\n"
        "<start_of_turn>user\nwhy<end_of_turn>\n<start_of_turn>model\n"
    )


def test_turn_markers_are_single_tokens_and_the_mask_covers_answers_only():
    tokenizer = decoder_tokenizer()
    for chat in chats(40, 0):
        encoded = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        assert ids.count(tokenizer.bos_token_id) == 1 and ids.count(SPECIALS.index("<start_of_turn>")) == len(chat)
        answered = [index for index, on in zip(ids, mask, strict=True) if on]
        answers = "".join(m["content"] + "<end_of_turn>" for m in chat if m["role"] == "assistant")
        assert tokenizer.decode(answered) == answers


def test_saved_tokenizer_loads_and_agrees(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = " any\ttext 🤖\n"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.chat_template == tokenizer.chat_template
