"""Taken away: exported folders answer as the run did, the card says what its record says, answers are transformers'."""

from __future__ import annotations

import json
import math
import random
import shlex
import shutil
from types import SimpleNamespace

import pandas
import pytest
import torch
from four_bit_models import dense_twin
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

import lorakit
from lorakit import adapters, models, records
from lorakit.cli import main
from lorakit.files import PROJECT
from lorakit.runs.away import Opened, ask, card, opened

TOPICS = {
    "billing": ["the invoice is wrong", "charged twice this month"], "login": ["cannot sign in", "locked out of it"],
    "shipping": ["the parcel is late", "wrong address on the box"],
}  # fmt: skip
TEXTS = [text for texts in TOPICS.values() for text in texts]
QUICK = {"budget": 6, "evaluations": 1, "rank": 4, "max_length": 32, "latency_repeats": 0, "predict_memory": False}
OWN = QUICK | {"model": "toy-encoder", "task": "labelled", "text_column": "body", "label_column": "team"}
RUNS = {
    "lora": OWN | {"learning_rate": 3e-3},
    "qlora": OWN | {"learning_rate": 3e-3, "quantize": "nf4"},
    "full": OWN | {"learning_rate": 1e-4, "method": "full"},
    "chat": QUICK
    | {
        "model": "toy-decoder",
        "task": "toy-instruct",
        "max_length": 200,
        "max_train": 64,
        "max_validation": 8,
        "max_test": 8,
    },
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of each run, and the record that `lorakit.run` gave."""
    place, draw = tmp_path_factory.mktemp("runs"), random.Random(0)
    rows = [
        (f"ticket {n}: {draw.choice(TOPICS[topic])}", topic) for n in range(120) for topic in [draw.choice([*TOPICS])]
    ]
    pandas.DataFrame(rows, columns=["body", "team"]).to_csv(place / "tickets.csv", index=False)
    found = {}
    for name, given in RUNS.items():
        given = given | ({} if name == "chat" else {"data_files": str(place / "tickets.csv")})
        found[name] = place / name, lorakit.run(given | {"run_dir": str(place / name)})
        assert found[name][1].status == "done"
    return SimpleNamespace(place=place, **{name: folder for name, (folder, _) in found.items()}, found=found)


def logits(model, tokenizer, texts=TEXTS):
    with torch.no_grad():
        return model.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits


def on_base(folder, quantize=False):
    """The classifier that a run trained, put together by hand."""
    loaded = models.load("toy-encoder", "classify", num_labels=3)
    base = adapters.quantize_nf4(loaded.model) if quantize else loaded.model
    return adapters.load_adapter(base, folder / "adapter"), loaded.tokenizer


def exported(capsys, *argv):
    capsys.readouterr()
    assert main(["export", *map(str, argv)]) == 0
    return capsys.readouterr().out


def plain(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


# export ------------------------------------------------------------------------------------------------


def test_an_exported_adapter_is_read_by_peft_and_names_no_place_here(runs, tmp_path, capsys):
    from peft import PeftModel

    # nor does what lies beside the adapter cut off what is longer than training's texts
    assert json.loads((runs.lora / "adapter" / "tokenizer.json").read_text())["truncation"] is None
    exported(capsys, runs.lora / "adapter", "--output", tmp_path / "out")
    base = models.load("toy-encoder", "classify", num_labels=3).model
    theirs = PeftModel.from_pretrained(base, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(theirs, tokenizer), logits(*on_base(runs.lora)), atol=1e-5, rtol=1e-5)
    assert theirs.peft_config["default"].base_model_name_or_path == "toy-encoder"
    texts = [path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix in (".json", ".md")]
    assert len(texts) == 5 and not any(str(place) in text for text in texts for place in (PROJECT, runs.place))
    again = exported(capsys, tmp_path / "out", "--merge", "--output", tmp_path / "merged")  # nothing is lost on the way
    assert again.startswith(f"{tmp_path / 'merged'}: a plain model")
    torch.testing.assert_close(logits(*plain(tmp_path / "merged")), logits(*on_base(runs.lora)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "argv"), [("lora", ["adapter", "--merge"]), ("full", ["model"]), ("full", ["adapter"])]
)
def test_merged_or_trained_whole_it_is_a_plain_model(runs, tmp_path, capsys, name, argv):
    folder, record = runs.found[name]
    exported(capsys, folder / argv[0], *argv[1:], "--output", tmp_path / "out")
    model, tokenizer = plain(tmp_path / "out")
    torch.testing.assert_close(logits(model, tokenizer), logits(*on_base(folder)), atol=1e-5, rtol=1e-5)
    assert model.config.id2label == dict(enumerate(TOPICS))
    told = json.loads((config := tmp_path / "out" / "config.json").read_text())  # other tools sort the numbers as text
    config.write_text(json.dumps(told | {"id2label": dict(reversed(told["id2label"].items()))}))
    assert opened(tmp_path / "out").model.config.id2label == dict(enumerate(TOPICS))
    assert records.read(tmp_path / "out" / "record.json") == record
    assert {"README.md", "tokenizer.json", "model.safetensors"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_what_was_trained_over_nf4_is_merged_into_nf4_and_it_is_said(runs, tmp_path, capsys):
    adapter = runs.qlora / "adapter"
    told = exported(capsys, adapter, "--merge", "--output", tmp_path / "out")
    said = "trained over toy-encoder in NF4: that, dequantised, is what the adapter is merged into"
    assert said in told and said in (tmp_path / "out" / "README.md").read_text()
    trained, tokenizer = on_base(runs.qlora, quantize=True)
    merged = logits(*plain(tmp_path / "out"))
    base = dense_twin(adapters.quantize_nf4(models.load("toy-encoder", "classify", num_labels=3).model))
    torch.testing.assert_close(merged, logits(adapters.load_adapter(base, adapter), tokenizer), atol=1e-4, rtol=1e-4)
    off = (merged - logits(*on_base(runs.qlora))).abs().max()  # into the base as it was, which it was not trained over
    assert (merged - logits(trained, tokenizer)).abs().max() < 0.1 * off  # bf16 products there
    shutil.copytree(adapter, tmp_path / "bare")
    (tmp_path / "bare" / "record.json").unlink()
    for argv in ([], ["--merge"]):
        out = str(tmp_path / f"bare{len(argv)}")
        named = ["--base", "toy-encoder", *argv, "--output", out]
        assert "nothing says how the base was kept in training" in exported(capsys, tmp_path / "bare", *named)
        assert "no record of its run" in (tmp_path / f"bare{len(argv)}" / "README.md").read_text()


def test_another_base_than_that_of_the_training_is_told(runs, tmp_path, capsys):
    loaded = models.load("toy-encoder", "classify", num_labels=3)
    loaded.model.save_pretrained(tmp_path / "base"), loaded.tokenizer.save_pretrained(tmp_path / "base")
    argv = [runs.lora / "adapter", "--base", tmp_path / "base", "--output", tmp_path / "out"]
    assert "is not the very model that the adapter was trained over" in exported(capsys, *argv)


# the card ----------------------------------------------------------------------------------------------


def test_the_card_says_what_the_record_says(runs, tmp_path, capsys):
    from huggingface_hub import ModelCard

    record = runs.found["qlora"][1]
    exported(capsys, runs.qlora / "adapter", "--output", tmp_path / "out")
    read = ModelCard.load(tmp_path / "out" / "README.md")
    front = {
        "library_name": "peft",
        "license": "mit",
        "tags": ["lorakit", "lora"],
        "pipeline_tag": "text-classification",
    }
    assert read.data.to_dict() == front  # a toy has no name on the hub, nor have own data
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in read.text.splitlines() if line[:1] == "|"]
    told = {name: values for name, *values in rows}
    [(file, digest)] = record.fingerprints["data"].items()
    expected = {
        "its fingerprint": record.fingerprints["model"], f"sha256 of {file}": digest, "rank": "4", "quantize": "nf4",
        "learning_rate": "0.003", "method": "lora", "training FLOPs": f"{record.costs.flops:.4g}", "seed": "0",
        "parameters trained": f"{record.parameters.trainable:,} of {record.parameters.total:,}", "the run": "done",
        "base": "toy-encoder (packaged toy model)", "its licence": "MIT: lorakit's own",
        "data": "own data", "licence of the data": "not known to lorakit: own data",
    }  # fmt: skip
    assert {name: told[name] for name in expected} == {name: [value] for name, value in expected.items()}
    share, n = record.final["test"]["accuracy"], record.fingerprints["rows"]["test"]
    assert n == 12 and told["test loss"] == [f"{record.final['test']['loss']:.4f}", "12", "none"]
    z = 1.959964  # Wilson's formula, by hand
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    assert told["test accuracy"] == [f"{share:.4f}", "12", f"[{low:.4f}, {high:.4f}]"]
    assert all(f"- {note}" in read.text for note in record.notes)


@pytest.mark.parametrize(
    ("base", "source", "from_hub", "front", "says"),
    [("all-MiniLM-L6-v2", "asset review-sentences", "offline asset",
      {"base_model": "sentence-transformers/all-MiniLM-L6-v2", "license": "apache-2.0", "datasets": None},
      ["| its licence | Apache-2.0 (sent", "| licence of the data | MIT. Please cite: Hutto"]),
     ("gemma-3-270m", "hub allenai/tulu-3-sft-mixture, its snapshot in data_files", "offline asset",
      {"base_model": "google/gemma-3-270m", "license": "gemma", "datasets": ["allenai/tulu-3-sft-mixture"]},
      ["| its licence | Gemma Terms", "| licence of the data | not known to lorakit: hub allenai/tulu"]),
     ("gpt2", "hub nyu-mll/glue", "hub", {"base_model": "gpt2", "license": None, "datasets": ["nyu-mll/glue"]},
      ["| its licence | not known to lorakit: gpt2 |"]),
     ("/models/mine", "generated by the toy grammar", "local folder",
      {"base_model": None, "license": None, "datasets": None},
      ["| its licence | not known to lorakit: /models/mine |", "| licence of the data | MIT: lorakit's own |"])],
)  # fmt: skip
def test_a_licence_that_is_not_known_is_told_as_not_known(base, source, from_hub, front, says):
    from huggingface_hub import ModelCard

    record = records.Record(setting="s", method="lora", seed=0, status="done", resolved={"method": "lora"})
    record.fingerprints, record.final = {"data_source": source}, {"test": {"accuracy": 0.5}}
    text = card(Opened(None, None, "classify", base, from_hub, True, record, []), "peft")
    assert {name: ModelCard(text).data.to_dict().get(name) for name in front} == front
    assert all(line in text for line in [*says, "| test accuracy | 0.5000 | not recorded | none |"])


# predict and generate ----------------------------------------------------------------------------------


def test_predict_is_the_pipeline_of_transformers(runs, tmp_path, capsys):
    merged, argv = tmp_path / "merged", [word for text in TEXTS for word in ("--text", text)]
    exported(capsys, runs.lora / "adapter", "--merge", "--output", merged)
    theirs = pipeline("text-classification", model=str(merged))(TEXTS)
    for model in (merged, runs.lora / "adapter"):
        out = tmp_path / f"{model.name}.jsonl"
        assert main(["predict", str(model), *argv, "--output", str(out)]) == 0
        mine = [json.loads(line) for line in out.read_text().splitlines()]
        assert [(row["text"], row["class"]) for row in mine] == [
            (text, row["label"]) for text, row in zip(TEXTS, theirs, strict=True)
        ]
        assert [row["probability"] for row in mine] == pytest.approx([row["score"] for row in theirs], abs=1e-5)
    capsys.readouterr()
    assert main(["predict", str(runs.lora / "adapter"), "--text", TEXTS[0], "--compare"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["text", "class", "probability", "class_adapter_off", "probability_adapter_off"]
    model, tokenizer = on_base(runs.lora)
    with adapters.disabled(model):
        best = logits(model, tokenizer, TEXTS[:1]).softmax(-1)[0]
    assert row.split()[-2:] == [[*TOPICS][best.argmax()], f"{best.max():.6f}"]
    assert float(row.split()[-3]) == pytest.approx(theirs[0]["score"], abs=1e-5) != pytest.approx(best.max().item())


def test_predict_reads_every_kind_of_file_and_pairs(runs, tmp_path):
    rows, model = pandas.DataFrame({"text": TEXTS, "id": range(6), "more": TEXTS[::-1]}), str(runs.lora / "adapter")
    rows.to_csv(tmp_path / "a.csv", index=False), rows.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    rows.to_json(tmp_path / "a.jsonl", orient="records", lines=True), rows.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS))
    seen = []
    for ending in ("csv", "tsv", "jsonl", "parquet", "txt"):
        out = tmp_path / f"{ending}-out.csv"
        assert main(["predict", model, "--file", str(tmp_path / f"a.{ending}"), "--output", str(out)]) == 0
        seen.append(out.read_text())
    assert len({*seen}) == 1 and [*pandas.read_csv(out)] == ["text", "class", "probability"]
    argv = ["--file", str(tmp_path / "a.csv"), "--pair-column", "more", "--output", str(tmp_path / "pairs.csv")]
    assert main(["predict", model, *argv]) == 0
    found, (trained, tokenizer) = pandas.read_csv(tmp_path / "pairs.csv"), on_base(runs.lora)
    with torch.no_grad():
        ids = tokenizer(TEXTS, TEXTS[::-1], padding=True, return_tensors="pt")
        best = trained.eval()(**ids).logits.softmax(-1).max(-1).values
    assert [*found] == ["text", "pair", "class", "probability"] and [*found["pair"]] == TEXTS[::-1]
    assert [*found["probability"]] == pytest.approx(best.tolist(), abs=1e-5)


def by_hand(model, tokenizer, prompt, most, ends):
    form = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    chat = tokenizer.chat_template and tokenizer.apply_chat_template([{"role": "user", "content": prompt}], **form)
    ids = chat or tokenizer(prompt, return_tensors="pt")
    said = model.generate(**ids, max_new_tokens=most, do_sample=False, eos_token_id=ends)
    return tokenizer.decode(said[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_generate_is_the_model_s_own(runs, tmp_path, capsys):
    exported(capsys, runs.chat / "adapter", "--merge", "--output", tmp_path / "chat")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "chat"),
        AutoTokenizer.from_pretrained(tmp_path / "chat"),
    )
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    assert model.generation_config.eos_token_id == ends  # the turn's end, which it was trained to say
    prompts, base = ["Spell backwards: cat", "Count to three"], models.load("toy-decoder", "causal")
    for folder in (tmp_path / "chat", runs.chat / "adapter"):
        out = tmp_path / f"{folder.name}.jsonl"
        argv = ["--prompt", prompts[0], "--prompt", prompts[1], "--max-new-tokens", "20", "--output", str(out)]
        assert main(["generate", str(folder), *argv, *["--compare"] * (folder.name == "adapter")]) == 0
        mine = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["answer"] for row in mine] == [by_hand(model, tokenizer, prompt, 20, ends) for prompt in prompts]
    off = [by_hand(base.model, base.tokenizer, prompt, 20, ends) for prompt in prompts]
    assert [row["answer_adapter_off"] for row in mine] == off
    assert off != [row["answer"] for row in mine]
    tokenizer.chat_template = None
    base.model.save_pretrained(tmp_path / "plain"), tokenizer.save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink(missing_ok=True)
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "plain"), "--prompt", "The cat", "--max-new-tokens", "8"]) == 0
    answer = by_hand(base.model, tokenizer, "The cat", 8, base.model.generation_config.eos_token_id)
    assert capsys.readouterr().out == f"prompt: The cat\nanswer: {answer}\n"


def test_an_answer_ends_with_its_turn_though_no_token_is_its_end(monkeypatch):
    monkeypatch.setattr("lorakit.runs.away.pipeline", lambda *_, **__: lambda _, **__: [[{"generated_text": SAID}]])
    assert [*ask(opened("toy-decoder"), [("Late?",)])["answer"]] == ["Yes."]


SAID = "Yes.<end_of_turn>\n<start_of_turn>user\nAnd now?"
# what is refused ---------------------------------------------------------------------------------------

ADAPTER = "{place}/lora/adapter"
REFUSED = {
    "--text=[]: give either --text or --file": ["predict", ADAPTER],
    "give either --text or --file ": ["predict", ADAPTER, "--text", "a", "--file", "{place}/tickets.csv"],
    "--text=['a', ' ']: must not be empty": ["predict", ADAPTER, "--text", "a", "--text", " "],
    "text_column='text': no such column in": ["predict", ADAPTER, "--file", "{place}/tickets.csv"],
    "tickets.md: no file, or of another kind than .csv": ["predict", ADAPTER, "--file", "{place}/tickets.md"],
    "line 3: expected text in column 'text'; found ''": ["predict", ADAPTER, "--file", "{place}/blank.csv"],
    "--output='x.txt': must be a new file that ends in": ["predict", ADAPTER, "--text", "a", "--output", "x.txt"],
    "tickets.csv': must be a new": ["predict", ADAPTER, "--text", "a", "--output", "{place}/tickets.csv"],
    "no-such' … no such folder": ["predict", "{place}/no-such", "--text", "a"],
    "is of kind 'causal': `lorakit generate` asks it": ["predict", "{place}/chat/adapter", "--text", "a"],
    "is of kind 'masked': nobody asks it": ["predict", "toy-encoder", "--text", "a"],
    "is of kind 'classify': `lorakit predict` asks it": ["generate", ADAPTER, "--prompt", "a"],
    "--max-new-tokens=0: must be 1 or more": ["generate", "toy-decoder", "--prompt", "a", "--max-new-tokens", "0"],
    "--text-column='body': is of --file, not of --prompt": [
        "generate",
        "toy-decoder",
        "--prompt",
        "a",
        "--text-column",
        "body",
    ],
    "--pair-column='b': is of --file, not of --text": ["predict", ADAPTER, "--text", "a", "--pair-column", "b"],
    "blank.txt': has no rows": ["predict", ADAPTER, "--file", "{place}/blank.txt"],
    "needs an adapter": ["generate", "toy-decoder", "--prompt", "a", "--compare", "--max-new-tokens", "1"],
    "is no adapter, and of kind classify": ["export", "{place}/full/model", "--kind", "causal"],
    "--output='{place}': not empty": ["export", ADAPTER, "--output", "{place}"],
    "tickets.csv': is not a folder": ["export", ADAPTER, "--output", "{place}/tickets.csv"],
    "record.json: schema_version=None": [
        "export",
        "{place}/broken",
        "--base",
        "toy-encoder",
        "--output",
        "{place}/never",
    ],
}


@pytest.mark.parametrize("says", REFUSED)
def test_bad_input_is_one_line_and_nothing_is_written(runs, monkeypatch, capsys, says):
    (runs.place / "blank.csv").write_text('text\na\n""\n')
    (runs.place / "blank.txt").write_text("\n \n")
    (runs.place / "table").mkdir(exist_ok=True)  # a name that nobody asked for is nobody's output
    if not (runs.place / "broken").exists():
        shutil.copytree(runs.lora / "adapter", runs.place / "broken")
        (runs.place / "broken" / "record.json").write_text("{}")
    monkeypatch.chdir(runs.place)
    before = sorted(runs.place.rglob("*"))
    capsys.readouterr()
    assert main([word.format(place=runs.place) for word in REFUSED[says]]) == 2
    error = capsys.readouterr().err.strip()
    assert all(part in error for part in says.format(place=runs.place).strip().split(" … ")) and "\n" not in error
    assert sorted(runs.place.rglob("*")) == before


def test_an_export_of_the_folder_one_is_in_is_named_after_it(runs, tmp_path, monkeypatch, capsys):
    shutil.copytree(runs.lora / "adapter", tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    assert main(["export", ".", "--merge"]) == 0
    assert main(["export", "../mine/.", "--merge"]) == 2  # the same place, which is not empty any more
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "mine-merged"]


def test_an_export_that_fails_leaves_nothing(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lorakit.runs.away.card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["export", str(runs.lora / "adapter"), "--merge", "--output", str(tmp_path / "out")])
    assert not [*tmp_path.iterdir()]


def test_what_readme_says_is_done_as_it_stands(runs, tmp_path, monkeypatch, capsys):
    section = (PROJECT / "README.md").read_text(encoding="utf-8").split("## Take it away\n")[1].split("\n## ")[0]
    monkeypatch.chdir(tmp_path)
    for name, there in {"tickets": runs.lora, "chats": runs.chat, "tickets.csv": runs.place / "tickets.csv"}.items():
        (tmp_path / name).symlink_to(there)
    lines = [shlex.split(line, comments=True) for line in section.split("```")[1].strip().splitlines()]
    assert [(program, command) for program, command, *_ in lines] == [
        ("lorakit", command) for command in ("export", "export", "predict", "predict", "generate")
    ]
    assert [main(words) for _, *words in lines] == [0] * 5
    assert len(pandas.read_csv("answers.csv")) == 120


def test_of_a_name_what_is_opened_is_the_whole_model():
    found = opened("toy-decoder", "causal")
    assert (found.kind, found.base, found.adapted, found.record) == ("causal", "", False, None)
