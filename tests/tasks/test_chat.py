"""Chat tasks: turns, labels, packing against separate rows, exact match."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pyarrow
import pytest
import torch
from pyarrow import parquet

import lorakit
from lorakit import tasks
from lorakit.errors import DataError, ParameterError
from lorakit.tasks import chat, collate, conversations
from lorakit.tasks.collate import IGNORED
from lorakit.tasks.exact_match import exact_match, generate, gsm8k_answer


def say(*contents, system=None):
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + turns


def write(path, chats):
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats), encoding="utf-8")


@pytest.fixture
def instruct(tmp_path):
    write(tmp_path / "train.jsonl", [say(f"add {i} and 1", f"{i} + 1\n#### {i + 1}") for i in range(30)])
    write(tmp_path / "validation.jsonl", [say(f"add {i} and 2", f"so #### {i + 2}") for i in range(20)])
    return tmp_path


def test_turns_and_labels_of_a_hand_made_chat(decoder):
    messages = say("Hi", " Yo ", "Bye", "Ok", system="Be brief.")
    text = (
        "<start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nYo<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\nOk<end_of_turn>\n"
    )
    assert "".join(text for text, _ in chat.segments(messages)) == text
    [ids], [labels] = chat.encode([messages], decoder, 500)
    assert ids == decoder("<bos>" + text, add_special_tokens=False)["input_ids"]
    assert ids == decoder.apply_chat_template(messages)["input_ids"]
    assert ids.count(decoder.bos_token_id) == 1
    runs = "".join(decoder.decode([label]) if label != IGNORED else "|" for label in labels)
    assert [run for run in runs.split("|") if run] == ["Yo<end_of_turn>", "Ok<end_of_turn>"]
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))


def test_labels_are_the_template_s_assistant_tokens(decoder):
    messages = say("one\ntwo", "three\n\nfour", "five", "six")
    [ids], [labels] = chat.encode([messages], decoder, 500)
    template = decoder.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    assert ids == template["input_ids"]
    assert [int(label != IGNORED) for label in labels] == template["assistant_masks"]


def test_prompt_is_everything_before_the_last_answer():
    messages = say("a", "b", "c", "d")
    assert chat.prompt(messages).endswith("c<end_of_turn>\n<start_of_turn>model\n")
    assert "".join(text for text, _ in chat.segments(messages)) == chat.prompt(messages) + "d<end_of_turn>\n"


def test_answers_cut_away_are_dropped_and_counted(tmp_path, decoder):
    chats = [say("q" * 60, "never seen"), say("q", "a" * 60), *[say(f"q{i}", "a") for i in range(5)]]
    write(tmp_path / "train.jsonl", chats)
    write(tmp_path / "validation.jsonl", [say(f"v{i}", "a") for i in range(6)])
    task = tasks.load("instruct", decoder, data_files=str(tmp_path), max_length=40)
    assert len(task.train) == 6 and max(map(len, task.train["input_ids"])) == 40
    assert "train: 1 of 7 chats dropped, no answer within 40 tokens" in task.notes


def test_validation_file_gives_validation_and_test_unless_test_is_there(instruct, decoder):
    task = tasks.load("instruct", decoder, data_files=str(instruct))
    rows = [set(map(tuple, getattr(task, split)["input_ids"])) for split in tasks.task.SPLITS]
    assert [len(row) for row in rows] == [30, 10, 10] and len(set.union(*rows)) == 50
    write(instruct / "test.jsonl", [say("add 3 and 1", "#### 4"), say("new", "#### 1")])
    given = tasks.load("instruct", decoder, data_files=str(instruct))
    assert (len(given.train), len(given.validation), len(given.test)) == (29, 20, 2)
    assert "instruct" in given.name and len(given.files) == 3


def test_tulu_reads_jsonl_and_parquet(tmp_path, decoder):
    write(tmp_path / "a.jsonl", [say(f"j{i}", "yes") for i in range(20)])
    table = pyarrow.table({"id": list(range(20)), "messages": [say(f"p{i}", "no") for i in range(20)]})
    parquet.write_table(table, tmp_path / "b.parquet")
    task = tasks.load("tulu", decoder, data_files=str(tmp_path))
    assert (len(task.train), len(task.validation), len(task.test)) == (32, 4, 4)
    (tmp_path / "c.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"c\.parquet: not a Parquet file"):
        tasks.load("tulu", decoder, data_files=str(tmp_path))


def test_hub_rows_that_are_no_chat_are_left_out_and_counted(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    chats = [*[say(f"q{i}", "a") for i in range(30)], say("no answer")]
    parquet.write_table(pyarrow.table({"messages": chats}), tmp_path / "data" / "train-0.parquet")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: tmp_path)
    corpus = conversations.tulu_from_hub()
    assert len(corpus.train) == 24 and "1 rows dropped: not user and assistant in turn" in corpus.notes


NO_CHATS = [say("only a question"), say("q", "a")[::-1], say("q", "  "), say(3, "a")]
NO_CHATS += [[{"role": "robot", "content": "hi"}]]
BAD_CHATS = ["not json", '["a list"]', '{"text": "no messages"}', '{"messages": []}']
BAD_CHATS += [json.dumps({"messages": messages}) for messages in NO_CHATS]


@pytest.mark.parametrize("line", BAD_CHATS)
def test_a_bad_chat_names_file_line_and_what_was_expected(instruct, decoder, line):
    with open(instruct / "train.jsonl", "a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")  # line 31 is blank
    with pytest.raises(DataError, match=r"train\.jsonl, line 32: expected"):
        tasks.load("instruct", decoder, data_files=str(instruct))


def test_a_missing_chat_file_names_the_layout(tmp_path, decoder, monkeypatch):
    with pytest.raises(DataError, match=r"data_files.*train\.jsonl.*layout"):
        tasks.load("instruct", decoder, data_files=str(tmp_path))
    monkeypatch.delenv("LORAKIT_DATA", raising=False)
    with pytest.raises(DataError, match=r"instruct.*data_files.*LORAKIT_DATA.*layout"):
        tasks.load("instruct", decoder)


def rows_of(columns):
    return [{name: column[i] for name, column in columns.items()} for i in range(len(columns["input_ids"]))]


def documents():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 99, (n,), generator=generator).tolist() for n in (12, 20, 5, 17, 9, 30)]


def test_packing_divides_no_document_and_labels_no_boundary():
    columns = collate.pack(documents(), documents(), 40)
    assert [len(row) for row in columns["input_ids"]] == [39, 37, 17]
    for ids, labels, positions in zip(columns["input_ids"], columns["labels"], columns["position_ids"], strict=True):
        starts = [place for place, position in enumerate(positions) if position == 0]
        assert all(labels[start] == IGNORED for start in starts)
        assert sum(label == IGNORED for label in labels) == len(starts) and sum(columns["attention_mask"][0]) == 39
        assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))


def test_packing_is_best_fit_decreasing():
    """Against the plain loop: each length, longest first, into the fullest row that still has room for it."""
    lengths = torch.randint(2, 65, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    filled: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row, used in enumerate(filled) if used + length <= 64]
        row = max(fitting, key=filled.__getitem__, default=len(filled))
        filled[row : row + 1] = [(filled[row] if row < len(filled) else 0) + length]
    ids = [[3] * length for length in lengths]
    assert sorted(map(len, collate.pack(ids, ids, 64)["input_ids"])) == sorted(filled)
    assert len(filled) <= 1.02 * -(-sum(lengths) // 64)


def looking_elsewhere(name, **options):
    """A random model whose positions, or whose state, take no notice of restarts."""
    import transformers

    sizes = {"vocab_size": 99, "hidden_size": 32, "pad_token_id": 0}
    own = {
        "OPT": {"num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64, "word_embed_proj_dim": 32},
        "Bloom": {"n_layer": 2, "n_head": 2},
        "Mamba": {"num_hidden_layers": 2, "state_size": 8},
    }
    config = getattr(transformers, f"{name}Config")(**sizes | own[name] | options)
    return getattr(transformers, f"{name}ForCausalLM")(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["OPT", "Bloom", "Mamba", "gemma", "gpt2"])
def test_a_model_that_mixes_packed_documents_is_refused_by_name(name, dtype, tiny_gemma, tiny_gpt2):
    fits = {"gemma": tiny_gemma, "gpt2": tiny_gpt2}
    model = (fits[name](initializer_range=0.3) if name in fits else looking_elsewhere(name)).to(dtype).train()
    packed = rows_of(collate.pack(documents(), documents(), 40))
    cached = model.config.use_cache
    with (
        nullcontext() if name in fits else pytest.raises(ParameterError, match=f"packing=True: {name}.*see each other")
    ):
        collate.require_apart(model, packed, collate.PackedCollator(0))
    assert model.training and model.config.use_cache == cached


def test_a_run_that_would_mix_packed_documents_writes_nothing(tmp_path, decoder):
    looking_elsewhere("OPT", vocab_size=len(decoder)).save_pretrained(tmp_path / "opt")
    decoder.save_pretrained(tmp_path / "opt")
    given = {"model": str(tmp_path / "opt"), "task": "toy-instruct", "packing": True, "max_length": 256}
    with pytest.raises(ParameterError, match="packing=True: OPT"):
        lorakit.run(given | {"max_train": 20, "record": str(tmp_path / "r.json"), "run_dir": str(tmp_path / "run")})
    assert [path.name for path in tmp_path.iterdir()] == ["opt"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["gemma", "gpt2"])
def test_packed_logits_and_gradients_are_those_of_separate_rows(attention, family, tiny_gemma, tiny_gpt2):
    model = {"gemma": tiny_gemma, "gpt2": tiny_gpt2}[family](initializer_range=0.3).eval()
    model.set_attn_implementation(attention)
    model.config.use_cache = False  # as the Trainer sets it
    batch = collate.PackedCollator(0)(rows_of(collate.pack(documents(), documents(), 40)))
    assert batch["input_ids"].shape == (3, 40) and "attention_mask" not in batch
    packed = model(**batch)
    loss, count = 0.0, 0
    for document, (row, start) in zip(documents(), [(2, 0), (1, 0), (2, 12), (1, 20), (0, 30), (0, 0)], strict=True):
        alone = model(input_ids=torch.tensor([document]), labels=torch.tensor([document]))
        found = packed.logits[row, start : start + len(document)]
        torch.testing.assert_close(found, alone.logits[0], atol=1e-5, rtol=1e-5)
        loss, count = loss + alone.loss * (len(document) - 1), count + len(document) - 1
    torch.testing.assert_close(packed.loss, loss / count, atol=1e-5, rtol=1e-5)


def test_packing_is_for_training_rows_only(instruct, decoder):
    task = tasks.load("instruct", decoder, data_files=str(instruct), max_length=256, packing=True)
    plain = tasks.load("instruct", decoder, data_files=str(instruct), max_length=256)
    assert len(task.train) < len(plain.train) and task.test["input_ids"] == plain.test["input_ids"]
    assert sorted(sum(task.train["input_ids"], [])) == sorted(sum(plain.train["input_ids"], []))
    assert set(task.collator([task.train[0], task.train[1]])) == {"input_ids", "labels", "position_ids"}
    assert set(task.eval_collator([task.test[0]])) == {"input_ids", "labels", "attention_mask"}
    assert task.eval_collator([task.test[0]])["labels"].shape[1] % 8 == 0


PARSED = [("6 * 3 = 18\n#### 18", "18"), ("#### 1,234,567", "1234567"), ("####-5", "-5"), ("#### $ 3.50", "3.5")]
PARSED += [("#### 12.00 dollars", "12"), ("#### 18.", "18"), ("#### .5", "0.5"), ("#### 1\n#### 2", "1")]
PARSED += [("#### -0", "0"), ("the answer is 18", None), ("#### none", None), ("", None)]


@pytest.mark.parametrize(("text", "answer"), PARSED)
def test_gsm8k_answers(text, answer):
    assert gsm8k_answer(text) == answer


def test_answers_are_prompts_with_their_answers(instruct, decoder):
    task = tasks.load("instruct", decoder, data_files=str(instruct))
    rows = task.answers
    assert len(rows) == 10
    assert all(p.endswith("<start_of_turn>model\n") and "####" in a and "####" not in p for p, a in rows)
    toy_task = tasks.load("toy-instruct", decoder, max_length=256)
    assert 0 < len(toy_task.answers) < 240


def test_generation_in_a_padded_batch_is_generation_alone(decoder, tiny_gemma):
    model = tiny_gemma(initializer_range=0.3).train()
    model.resize_token_embeddings(len(decoder))
    prompts = ["<start_of_turn>user\nlong enough to differ", "a", "some b"]
    together = generate(model, decoder, prompts, 12)
    assert together == [generate(model, decoder, [prompt], 12)[0] for prompt in prompts] and model.training
    ids = torch.tensor([[decoder.bos_token_id, *decoder("a", add_special_tokens=False)["input_ids"]]])
    with torch.no_grad():
        first = model.eval()(ids).logits[0, -1].argmax().item()
    assert together[1].startswith(decoder.decode([first])) or first in (decoder.eos_token_id, decoder.pad_token_id)


class Parrot(torch.nn.Module):
    """Says the same answer to everything, then ends the turn and rambles."""

    def __init__(self, tokenizer, answer):
        super().__init__()
        self.ids = tokenizer(answer + "<end_of_turn>#### 99", add_special_tokens=False)["input_ids"]
        self.device = torch.device("cpu")

    def generate(self, input_ids, attention_mask, max_new_tokens, **_):
        assert (attention_mask[:, -1] == 1).all() and len(self.ids) <= max_new_tokens  # padded on the left
        return torch.cat([input_ids, torch.tensor([self.ids]).expand(len(input_ids), -1)], dim=1)


def test_exact_match_is_the_share_of_right_numbers(decoder):
    rows = [("one", "#### 7"), ("another one", "#### 8"), ("x", "1 #### 7.0"), ("y", "#### 99")]
    limits = {"max_new_tokens": 64, "batch_size": 3}
    assert exact_match(Parrot(decoder, "3+4\n#### 7"), decoder, rows, **limits) == 0.5
    assert exact_match(Parrot(decoder, "no idea"), decoder, rows, **limits) == 0.0
    assert exact_match(Parrot(decoder, "so #### 7.0"), decoder, rows[:1], **limits) == 1.0
    assert exact_match(Parrot(decoder, "no number"), decoder, [("x", "no number")], **limits) == 0.0  # none is none
