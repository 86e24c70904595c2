"""Where a model is found: folder, hub, its cache or packaged dimensions - or one clear line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from transformers import AutoModel, T5Config

from lorakit import models
from lorakit.adapters import attach, peft_format
from lorakit.assets import ASSETS
from lorakit.assets.registry import Asset
from lorakit.errors import AssetError, ParameterError
from lorakit.models import configs, sources


def raising(error: Exception):
    def asked(*_, **__):
        raise error

    return asked


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
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", raising(OfflineModeIsEnabled("off")))
    with pytest.raises(AssetError, match="switched off .HF_HUB_OFFLINE"):
        models.load("surely-not/cached-here", "classify")


@pytest.mark.parametrize(
    "name", ["a b", "x..y", "", "org/na me", "x" * 300, "x.git", "a--b", "\u00e9", "-x", "~nobody-here"]
)
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
    assert source.arguments == {"local_files_only": True, "trust_remote_code": False, "revision": commit}
    assert sources.download(source) is source


@pytest.mark.parametrize("kind", ["classify", "masked"])
def test_a_model_in_the_hub_s_cache_asks_nobody(monkeypatch, bert, tmp_path, kind):
    """transformers asks for an adapter beside the model, with 30 s of retries, unless it is told not to."""
    commit, asked = "0123456789abcdef0123456789abcdef01234567", []
    shutil.copytree(bert, tmp_path / "models--org--bert" / "snapshots" / commit)
    (tmp_path / "models--org--bert" / "refs").mkdir()
    (tmp_path / "models--org--bert" / "refs" / "main").write_text(commit)
    for module in ("constants", "file_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.HF_HUB_CACHE", str(tmp_path), raising=False)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def ask(self, request, **_):
        asked.append(request.url)
        raise ConnectionError("no network")

    monkeypatch.setattr("httpx.Client.send", ask)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: ask(None, type("R", (), {"url": "info"})))
    loaded = models.load("org/bert", kind)
    assert loaded.source == "hub, from its local cache" and {*asked} == {"info"}
    assert loaded.model.config.name_or_path == "org/bert"  # what an adapter's file says of its base


def test_a_cached_asset_is_called_as_on_the_hub_and_found_by_that_name_without_it(no_hub, monkeypatch, bert):
    """An adapter's file names its base so, and is to be loaded again where there is no network."""
    asset = Asset("small", "model", (), "terms", hub="org/small")
    monkeypatch.setitem(ASSETS, "small", asset)
    monkeypatch.setattr("lorakit.assets.fetching.cache.cached", lambda one: Path(bert) if one is asset else None)
    monkeypatch.setattr("lorakit.assets.fetching.cache.intact", lambda one: Path(bert))
    loaded = models.load("small", "classify")
    named = peft_format.to_config(model := attach(loaded.model), model.lorakit_attachment)["base_model_name_or_path"]
    assert named == "org/small" == loaded.model.name_or_path
    assert models.load(named, "classify").fingerprint == loaded.fingerprint == asset.fingerprint
    local = models.load(bert, "classify").model
    assert local.config.name_or_path == bert  # nothing else is known


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
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", raising(TimeoutError("read timed out")))
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
    with pytest.raises(ParameterError, match="model='review-sentences': is a data set"):
        models.load("review-sentences", "classify")
    with pytest.raises(ParameterError, match="model='review-sentences'"):
        models.config("review-sentences")


# Parameters of the base models as their publishers state them (for Gemma 4B and 12B: keras-hub's count of the
# text model with 262144 tokens; the hub's checkpoints have 64 more rows in the embedding), less a head of its own.
COUNTS = {
    "bert-base-uncased": 109482240, "distilbert-base-uncased": 66362880, "all-MiniLM-L6-v2": 22713216,
    "gpt2": 124439808, "meta-llama/Llama-3.2-1B": 1235814400, "gemma-3-270m": 268098176,
    "google/gemma-3-270m": 268098176, "google/gemma-3-1b-pt": 999885952,
    "google/gemma-3-4b-pt": 3880099328 + 64 * 2560, "google/gemma-3-12b-pt": 11765788416 + 64 * 3840,
    "google/gemma-3-27b-pt": 27009346304, "meta-llama/Llama-3.2-3B": 3212749824,
    "meta-llama/Llama-3.1-8B": 8030261248 - 128256 * 4096, "meta-llama/Llama-3.1-70B": 70553706496 - 128256 * 8192,
    "huggyllama/llama-65b": 65285660672 - 32000 * 8192, "Qwen/Qwen3-0.6B-Base": 596049920,
    "Qwen/Qwen3-1.7B-Base": 1720574976, "Qwen/Qwen3-4B-Base": 4022468096,
    "Qwen/Qwen3-8B-Base": 8190735360 - 151936 * 4096, "Qwen/Qwen3-14B-Base": 14768307200 - 151936 * 5120,
    "Qwen/Qwen3-32B": 32762123264 - 151936 * 5120, "smollm2-135m-instruct": 134515008,
}  # fmt: skip


def test_packaged_dimensions_give_the_published_parameter_counts(no_hub, monkeypatch, tmp_path):
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path))
    assert set(json.loads(configs.PACKAGED.read_text())) == set(COUNTS)
    for name, count in COUNTS.items():
        described = models.describe(name)
        assert described.source == "packaged dimensions"
        with torch.device("meta"):
            model = AutoModel.from_config(described.config)
        assert sum(parameter.numel() for parameter in model.parameters()) == count, name


def test_family_needs_no_weights_and_own_files_are_preferred(no_hub, bert):
    assert models.describe(bert).source == "local folder" and models.config(bert).hidden_size == 32
    assert models.family(bert) == models.family("distilbert-base-uncased") == "encoder"
    assert models.family("gpt2") == models.family("google/gemma-3-1b-pt") == "decoder"
    with pytest.raises(AssetError, match="unreachable.*packaged dimensions: .*all-MiniLM-L6-v2, bert-base"):
        models.family("unknown-model")
    with pytest.raises(ParameterError, match="model='t5': t5 is an encoder-decoder"):
        configs.family_of(T5Config())


@pytest.mark.hub
def test_hub_model_loads_with_its_commit():
    loaded = models.load("distilbert-base-uncased", "classify")
    assert loaded.source.startswith("hub") and len(loaded.fingerprint.split()[-1]) == 40
