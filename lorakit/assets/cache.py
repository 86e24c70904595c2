"""The cache: a folder per asset that is there whole, with a manifest of sizes and hashes, or not there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lorakit.assets.archives import sha256_of
from lorakit.assets.registry import Asset
from lorakit.errors import AssetError

MANIFEST = "manifest.json"


def root() -> Path:
    """Folder of all cached assets: LORAKIT_CACHE, else `lorakit` in the user's cache folder."""
    if own := os.environ.get("LORAKIT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorakit"


def cached(asset: Asset) -> Path | None:
    """The asset's folder if it is whole by manifest and file sizes (hashes are `damaged`'s business)."""
    folder = root() / asset.name
    files = _manifest(folder, asset)
    if files and all(_size(folder / name) == entry["size"] for name, entry in files.items()):
        return folder
    return None


def damaged(asset: Asset) -> list[str]:
    """Names of cached files whose bytes are not the pinned ones (of converted files: not those written)."""
    folder = root() / asset.name
    files = _manifest(folder, asset)
    if not files:
        return [MANIFEST]
    pinned = {member.name: member.sha256 for member in asset.members}
    return [name for name, entry in files.items() if not _intact(folder / name, pinned.get(name, entry["sha256"]))]


def _manifest(folder: Path, asset: Asset) -> dict[str, dict]:
    """File name -> {size, sha256}; empty when missing, unreadable, or of other pins."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return manifest["files"] if manifest["fingerprint"] == asset.fingerprint else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _intact(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_of(path) == sha256


def write_manifest(folder: Path, asset: Asset) -> None:
    """Describe every file in `folder`; pinned hashes were verified on unpacking."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    entries = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in files
    }
    manifest = {"asset": asset.name, "fingerprint": asset.fingerprint, "files": entries}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def staged(asset: Asset) -> Iterator[Path]:
    """A fresh folder beside the cached ones, removed on the way out whatever happens. Needs the lock."""
    prefix = f".{asset.name}."
    for left_by_a_kill in root().glob(f"{prefix}*.tmp"):
        shutil.rmtree(left_by_a_kill, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=root()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def install(asset: Asset, folder: Path, staging: Path) -> Path:
    """Move the finished `folder` (in `staging`) to the asset's place; a damaged one goes away with `staging`."""
    target = root() / asset.name
    for file in folder.rglob("*"):  # readable by others, should the cache be shared
        file.chmod(0o755 if file.is_dir() else 0o644)
    if target.exists():
        os.replace(target, staging / "replaced")
    os.replace(folder, target)
    return target


@contextlib.contextmanager
def lock(asset: Asset) -> Iterator[None]:
    """One process at a time fetches an asset; the others wait and find it there."""
    from filelock import FileLock

    try:
        (root() / ".locks").mkdir(parents=True, exist_ok=True)
        waiting = FileLock(root() / ".locks" / f"{asset.name}.lock")
        waiting.acquire()
    except OSError as error:
        raise AssetError(f"{asset.name}: cannot write to the cache {root()}: {error}; set LORAKIT_CACHE") from None
    try:
        yield
    finally:
        waiting.release()
