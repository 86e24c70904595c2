"""Models: a name becomes a model with the right head, a padding token, a fingerprint - or one clear line."""

from __future__ import annotations

import shutil
from logging import Handler
from pathlib import Path

import numpy as np
import pytest
import torch

from lorakit import assets, models
from lorakit.errors import AssetError, ParameterError
from lorakit.models import configs, sources

SPECIALS = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]


def save_tokenizer(folder: Path, **special: str) -> None:
    """A word-level tokenizer of 99 tokens, as transformers stores one."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = SPECIALS + [f"w{i}" for i in range(99 - len(SPECIALS))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special).save_pretrained(folder)


@pytest.fixture
def bert(tmp_path, tiny_bert) -> str:
    """A folder with a BERT base model: no head of any kind."""
    tiny_bert().bert.save_pretrained(tmp_path / "bert")
    save_tokenizer(tmp_path / "bert", pad_token="[PAD]", mask_token="[MASK]")
    return str(tmp_path / "bert")


@pytest.fixture
def gpt2(tmp_path, tiny_gpt2) -> str:
    """A folder with a GPT-2 that has, as the real one, no padding token."""
    model = tiny_gpt2()
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    model.save_pretrained(tmp_path / "gpt2")
    save_tokenizer(tmp_path / "gpt2", eos_token="[CLS]")
    return str(tmp_path / "gpt2")


@pytest.fixture
def gemma(tmp_path, tiny_gemma) -> str:
    tiny_gemma().to(torch.bfloat16).save_pretrained(tmp_path / "gemma")
    save_tokenizer(tmp_path / "gemma", pad_token="[PAD]", eos_token="[CLS]", bos_token="[SEP]")
    return str(tmp_path / "gemma")


@pytest.fixture
def no_hub(monkeypatch):
    """No network, no hub cache; counts the questions asked."""
    asked = []

    def model_info(self, name, **_):
        asked.append(name)
        raise ConnectionError("name or service not known\nsecond line")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    return asked


@pytest.mark.parametrize(
    "fixture, kind, architecture",
    [
        ("bert", "classify", "BertForSequenceClassification"),
        ("bert", "masked", "BertForMaskedLM"),
        ("gpt2", "classify", "GPT2ForSequenceClassification"),
        ("gpt2", "causal", "GPT2LMHeadModel"),
        ("gemma", "classify", "Gemma3TextForSequenceClassification"),
        ("gemma", "causal", "Gemma3ForCausalLM"),
    ],
)
def test_each_kind_gets_its_head_and_padding(request, fixture, kind, architecture):
    loaded = models.load(request.getfixturevalue(fixture), kind, num_labels=3)
    assert type(loaded.model).__name__ == architecture and not loaded.model.training
    assert loaded.source == "local folder" and len(loaded.fingerprint) == 64
    assert loaded.model.config.pad_token_id == loaded.tokenizer.pad_token_id is not None
    assert loaded.model.dtype == torch.float32 and loaded.tokenizer.is_fast
    batch = loaded.tokenizer(["w1 w2 w3", "w4"], padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    logits = loaded.model(**batch).logits
    assert logits.shape == ((2, 3) if kind == "classify" else (2, 3, 99)) and logits.isfinite().all()


def test_gpt2_pads_with_its_end_token(gpt2):
    loaded = models.load(gpt2, "classify")
    assert loaded.tokenizer.pad_token == "[CLS]" and loaded.model.config.pad_token_id == SPECIALS.index("[CLS]")
    assert models.load(gpt2, "causal").model.generation_config.pad_token_id == SPECIALS.index("[CLS]")


def test_weights_are_the_checkpoints(bert, gemma):
    from safetensors.torch import load_file

    stored = load_file(Path(bert) / "model.safetensors")
    loaded = models.load(bert, "classify").model.bert.state_dict()
    assert stored and all(torch.equal(loaded[name], stored[name]) for name in stored)
    as_stored = models.load(gemma, "causal", dtype="auto").model
    assert as_stored.dtype == torch.bfloat16
    assert models.load(gemma, "causal", dtype="bf16").model.dtype == torch.bfloat16
    widened = models.load(gemma, "causal").model
    assert widened.dtype == torch.float32
    assert torch.equal(widened.model.norm.weight, as_stored.model.norm.weight.float())


def test_a_new_head_depends_on_the_seed_alone(bert):
    first = models.load(bert, "classify", seed=1)
    torch.manual_seed(99)
    again = models.load(bert, "classify", seed=1).model.classifier.weight
    other = models.load(bert, "classify", seed=2).model.classifier.weight
    assert torch.equal(first.model.classifier.weight, again) and not torch.equal(again, other)
    assert first.notes == ["new, not pre-trained, initialised from seed 1: classifier"]


def test_loading_disturbs_no_global_generator(bert):
    torch.manual_seed(5), np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    models.load(bert, "masked", seed=3)
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


def test_masked_head_missing_from_a_base_model_is_told_and_tied(bert):
    loaded = models.load(bert, "masked")
    assert loaded.model.cls.predictions.decoder.weight is loaded.model.bert.embeddings.word_embeddings.weight
    assert len(loaded.notes) == 1 and "cls.predictions.transform.dense" in loaded.notes[0]
    assert loaded.notes[0].endswith("its decoder is tied to the word embeddings")


def test_complete_checkpoint_has_no_notes(gpt2):
    assert models.load(gpt2, "causal").notes == []


def test_attention_implementation_is_passed_on(gemma):
    for attention in ("sdpa", "eager"):
        assert models.load(gemma, "causal", attention=attention).model.config._attn_implementation == attention


def test_loading_prints_and_logs_nothing(bert, capfd):
    from transformers.utils import logging

    logged = []
    handler = Handler()
    handler.emit = logged.append
    logging.add_handler(handler)
    try:
        models.load(bert, "classify")
    finally:
        logging.remove_handler(handler)
    assert capfd.readouterr() == ("", "") and logged == []


def test_verbosity_returns_to_what_it_was(bert):
    from transformers.utils import logging

    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        models.load(bert, "classify")
        assert logging.get_verbosity() == logging.INFO and logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity_warning()


def test_fingerprint_follows_every_byte_that_matters(bert):
    before = models.load(bert, "classify").fingerprint
    (Path(bert) / "notes.md").write_text("not part of the model")
    assert models.load(bert, "masked").fingerprint == before
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        data = bytearray((Path(bert) / file).read_bytes())
        (Path(bert) / file).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert sources.fingerprint(Path(bert)) != before
        (Path(bert) / file).write_bytes(data)
    assert sources.fingerprint(Path(bert)) == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"kind": "regress"}, "kind='regress': must be one of classify, masked, causal"),
        ({"num_labels": 1}, "num_labels=1: must be at least 2"),
        ({"dtype": "fp64"}, "dtype='fp64': must be one of fp32, bf16, auto"),
        ({"attention": "flash"}, "attention='flash': must be one of sdpa, eager"),
        ({"kind": "causal"}, "kind='causal': needs a decoder; model=.* is an encoder"),
    ],
)
def test_parameters_out_of_range(bert, arguments, message):
    with pytest.raises(ParameterError, match=message):
        models.load(bert, **{"kind": "classify"} | arguments)


def test_decoder_is_no_masked_model(gpt2):
    with pytest.raises(ParameterError, match="kind='masked': needs an encoder; model=.* is a decoder"):
        models.load(gpt2, "masked")


def test_mistyped_folder_is_said_so_without_asking_the_hub(no_hub, tmp_path):
    for name in ("./berrt", str(tmp_path / "berrt"), "~/berrt", "a/b/c", "models/"):
        with pytest.raises(AssetError, match="no such folder .*toy-encoder"):
            models.load(name, "classify")
    (tmp_path / "file").write_text("")
    with pytest.raises(AssetError, match="is a file, not a folder"):
        models.load(str(tmp_path / "file"), "classify")
    assert no_hub == []


def test_unreachable_hub_is_one_line_naming_what_was_tried_and_what_works_offline(no_hub):
    for name in ("distilbert-base-uncased", "google/gemma-3-1b-pt"):
        with pytest.raises(AssetError) as caught:
            models.load(name, "classify")
        message = str(caught.value)
        assert message.startswith(f"model='{name}': no local folder of this name, the hub is unreachable (Connection")
        assert "toy-encoder" in message and "lorakit fetch" in message and "\n" not in message
    assert len(no_hub) == 2


def test_hub_switched_off_answers_at_once(monkeypatch):
    from huggingface_hub.errors import OfflineModeIsEnabled

    def model_info(*_, **__):
        raise OfflineModeIsEnabled("off")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    with pytest.raises(AssetError, match="switched off .HF_HUB_OFFLINE"):
        models.load("surely-not/cached-here", "classify")


@pytest.mark.parametrize("name", ["a b", "x..y", "", "org/na me"])
def test_impossible_names(no_hub, name):
    with pytest.raises((ParameterError, AssetError), match="model="):
        models.load(name, "classify")
    assert no_hub == []


def test_hub_cache_is_used_when_the_hub_is_unreachable(no_hub, monkeypatch, bert, tmp_path):
    """The commit is the fingerprint; files are read from the cache only."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    home = tmp_path / "hub" / "models--org--bert"
    shutil.copytree(bert, home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    found = str(home / "snapshots" / commit / "config.json")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: found)
    source = sources.resolve("org/bert")
    assert source.fingerprint == f"hub commit {commit}" and source.text == "hub, from its local cache"
    assert source.arguments == {"local_files_only": True, "revision": commit}
    assert sources.download(source) is source


def test_hub_download_takes_one_format_of_weights(monkeypatch):
    asked = {}
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: type("Info", (), {"sha": "c0ffee"}))
    files = ["config.json", "pytorch_model.bin", "model.safetensors", "onnx/model.safetensors"]
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: files)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: asked.update(options, name=name))
    source = sources.resolve("org/bert")
    assert source.fingerprint == "hub commit c0ffee" and not source.offline
    assert sources.download(source).offline
    assert asked["revision"] == "c0ffee" and asked["ignore_patterns"] == ["*/*"]
    assert "model*.safetensors" in asked["allow_patterns"] and "pytorch_model*.bin" not in asked["allow_patterns"]


def test_lost_connection_during_download_is_one_line(monkeypatch):
    def lost(*_, **__):
        raise TimeoutError("read timed out")

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lost)
    online = sources.Source("org/bert", "org/bert", "hub", "hub commit c0ffee", "c0ffee", offline=False)
    with pytest.raises(AssetError, match="model='org/bert': download from the hub failed: TimeoutError: read timed"):
        sources.download(online)


def test_folders_that_are_no_model_say_why(bert, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(AssetError, match="has no config.json$"):
        models.load(str(empty), "classify")
    (empty / "adapter_config.json").write_text("{}")
    with pytest.raises(AssetError, match="it is an adapter"):
        models.load(str(empty), "classify")
    (Path(bert) / "model.safetensors").unlink()
    with pytest.raises(AssetError, match="has no weights"):
        models.load(bert, "classify")
    assert models.family(bert) == "encoder"  # its configuration is enough for a plan


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("config.json", "{", "config.json cannot be read"),
        ("config.json", '{"model_type": "nope"}', "config.json cannot be read"),
        ("model.safetensors", "short", "cannot be loaded as a classify model"),
        ("tokenizer.json", "{}", "tokenizer cannot be read"),
    ],
)
def test_damaged_files_are_one_line(bert, file, text, message):
    (Path(bert) / file).write_text(text)
    with pytest.raises(AssetError, match=message) as caught:
        models.load(bert, "classify")
    assert "\n" not in str(caught.value)


def test_weights_without_some_layers_are_refused(bert):
    from safetensors.torch import load_file, save_file

    file = Path(bert) / "model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if "layer.1." not in name}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(AssetError, match="the weights lack 16 parameters of the base, first bert.encoder.layer.1."):
        models.load(bert, "classify")


def test_head_of_another_size_is_an_error(tmp_path, tiny_bert):
    tiny_bert(num_labels=5).save_pretrained(tmp_path / "five")
    save_tokenizer(tmp_path / "five", pad_token="[PAD]")
    with pytest.raises(AssetError, match="cannot be loaded as a classify model"):
        models.load(str(tmp_path / "five"), "classify", num_labels=2)
    assert models.load(str(tmp_path / "five"), "classify", num_labels=5).notes == []


def test_data_set_is_no_model():
    with pytest.raises(ParameterError, match="model='review-sentences': is a data set"):
        models.load("review-sentences", "classify")
    with pytest.raises(ParameterError, match="model='review-sentences'"):
        models.config("review-sentences")


# Parameters of the base models as their publishers state them (for Gemma 4B and 12B: keras-hub's count of the
# text model with 262144 tokens; the hub's checkpoints have 64 more rows in the embedding).
COUNTS = {
    "bert-base-uncased": 109482240,
    "distilbert-base-uncased": 66362880,
    "gpt2": 124439808,
    "google/gemma-3-270m": 268098176,
    "google/gemma-3-1b-pt": 999885952,
    "google/gemma-3-4b-pt": 3880099328 + 64 * 2560,
    "google/gemma-3-12b-pt": 11765788416 + 64 * 3840,
    "meta-llama/Llama-3.2-1B": 1235814400,
    "all-MiniLM-L6-v2": 22713216,
    "gemma-3-270m": 268098176,
}


def test_packaged_dimensions_give_the_published_parameter_counts(no_hub, monkeypatch, tmp_path):
    from transformers import AutoModel

    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path))
    assert set(configs.packaged_names()) == set(COUNTS)
    for name, count in COUNTS.items():
        described = models.describe(name)
        assert described.source == "packaged dimensions"
        with torch.device("meta"):
            model = AutoModel.from_config(described.config)
        assert sum(parameter.numel() for parameter in model.parameters()) == count, name


def test_family_needs_no_weights(no_hub, bert):
    assert models.family(bert) == models.family("distilbert-base-uncased") == "encoder"
    assert models.family("gpt2") == models.family("google/gemma-3-1b-pt") == "decoder"
    with pytest.raises(AssetError, match="unreachable.*packaged dimensions: all-MiniLM-L6-v2, bert-base"):
        models.family("unknown-model")


def test_encoder_decoder_is_neither():
    from transformers import T5Config

    with pytest.raises(ParameterError, match="model='t5': is an encoder-decoder"):
        configs.family_of(T5Config())


def test_own_files_are_preferred_to_packaged_dimensions(no_hub, bert, monkeypatch):
    assert models.describe(bert).source == "local folder"
    assert models.config(bert).hidden_size == 32


@pytest.mark.parametrize("name, kind", [("toy-encoder", "masked"), ("toy-decoder", "causal")])
def test_toy_models_load_for_their_pretraining_and_for_classification(name, kind):
    loaded = models.load(name, kind)
    assert loaded.source == "packaged toy model" and loaded.notes == [] and len(loaded.fingerprint) == 64
    assert models.load(name, "classify").model.config.num_labels == 2
    assert models.family(name) == ("encoder" if kind == "masked" else "decoder")
    assert loaded.model.config.pad_token_id == models.tokenizer(name).pad_token_id == 0


def test_quiet_loading_also_covers_errors(bert):
    from transformers.utils import logging

    before = logging.get_verbosity()
    with pytest.raises(AssetError):
        models.load(bert + "/model.safetensors", "classify")
    assert logging.get_verbosity() == before


@pytest.mark.assets("all-MiniLM-L6-v2")
def test_minilm_is_the_pinned_model():
    loaded = models.load("all-MiniLM-L6-v2", "classify")
    assert loaded.fingerprint == assets.ASSETS["all-MiniLM-L6-v2"].fingerprint
    assert "sentence-transformers fine-tune" in loaded.notes[0] and "classifier" in loaded.notes[1]
    masked = models.load("all-MiniLM-L6-v2", "masked")
    assert "not a raw masked-LM" in masked.notes[0] and "tied to the word embeddings" in masked.notes[1]
    assert masked.model.cls.predictions.decoder.weight is masked.model.get_input_embeddings().weight


@pytest.mark.assets("all-MiniLM-L6-v2")
def test_minilm_knows_what_sentences_mean():
    """Mean-pooled states put a paraphrase nearer than another topic: the weights are really in place."""
    loaded = models.load("all-MiniLM-L6-v2", "classify")
    texts = ["The film was wonderful.", "I loved this movie.", "The stock market fell sharply."]
    batch = loaded.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = loaded.model.bert(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    pooled = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    similarity = pooled @ pooled.T
    assert similarity[0, 1] > 0.5 and similarity[0, 2] < 0.2


@pytest.mark.assets("gemma-3-270m")
def test_gemma_speaks():
    loaded = models.load("gemma-3-270m", "causal", dtype="auto")
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.notes == ["gemma-3-270m: 4-8-bit weights, dequantised: not the original bf16"]
    batch = loaded.tokenizer("1, 2, 3, 4, 5,", return_tensors="pt")
    with torch.no_grad():
        assert loaded.model(**batch).logits.isfinite().all()
    answer = loaded.model.generate(**batch, max_new_tokens=6, do_sample=False)
    assert loaded.tokenizer.decode(answer[0]).startswith("<bos>1, 2, 3, 4, 5, 6, 7,")
    turn = loaded.tokenizer("<start_of_turn>user\nHi<end_of_turn>\n", add_special_tokens=False)["input_ids"]
    assert loaded.tokenizer.convert_ids_to_tokens(turn)[::5] == ["<start_of_turn>", "\n"] and len(turn) == 6


@pytest.mark.hub
def test_hub_model_loads_with_its_commit():
    loaded = models.load("distilbert-base-uncased", "classify")
    assert loaded.source.startswith("hub") and len(loaded.fingerprint.split()[-1]) == 40
