"""The cache: a folder per asset that is there whole, with a manifest of sizes and hashes, or not there."""

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path

from lorakit.assets.registry import Asset
from lorakit.files import aside, sha256

MANIFEST = "manifest.json"
_damaged = functools.lru_cache(lambda asset, folder, stamps: damaged(asset))  # as they were at these sizes and times


def root() -> Path:
    """Folder of all cached assets: LORAKIT_CACHE, else `lorakit` in the user's cache folder."""
    if own := os.environ.get("LORAKIT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorakit"


def cached(asset: Asset) -> Path | None:
    """The asset's folder if it is whole by manifest and file sizes (hashes are `damaged`'s business)."""
    folder = root() / asset.name
    sizes = {folder / name: entry["size"] for name, entry in _manifest(folder, asset).items()}
    whole = sizes and all(path.is_file() and path.stat().st_size == size for path, size in sizes.items())
    return folder if whole else None


def intact(asset: Asset) -> Path | None:
    """As `cached`, its bytes hashed too: once, and again after a change of a file's size or time."""
    folder = cached(asset)
    stats = [(folder / name).stat() for name in _manifest(folder, asset)] if folder else []
    stamps = tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)
    return folder if folder and not _damaged(asset, folder, stamps) else None


def damaged(asset: Asset) -> list[str]:
    """Names of cached files whose bytes are not the pinned ones (of converted files: not those written)."""
    folder = root() / asset.name
    known = {name: entry["sha256"] for name, entry in _manifest(folder, asset).items()}
    pinned = known | {member.name: member.sha256 for member in asset.members if member.name in known}
    bad = [name for name, pin in pinned.items() if not (folder / name).is_file() or sha256(folder / name) != pin]
    return bad if known else [MANIFEST]


def _manifest(folder: Path, asset: Asset) -> dict[str, dict]:
    """File name -> {size, sha256}; empty when missing, unreadable, or of other pins."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return manifest["files"] if manifest["fingerprint"] == asset.fingerprint else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write_manifest(folder: Path, asset: Asset) -> None:
    """Describe every file in `folder`; pinned hashes were verified on unpacking."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    entries = {p.relative_to(folder).as_posix(): {"size": p.stat().st_size, "sha256": sha256(p)} for p in files}
    manifest = {"asset": asset.name, "fingerprint": asset.fingerprint, "files": entries}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def new(asset: Asset) -> Iterator[Path]:
    """A folder to be filled, which becomes the asset's own, manifest included; a damaged one goes. Needs the lock."""
    target = root() / asset.name
    with aside(root(), f".{asset.name}") as beside:
        folder = beside / "new"
        folder.mkdir()
        yield folder
        write_manifest(folder, asset)
        if target.exists():
            os.replace(target, beside / "replaced")  # and away with it
        os.replace(folder, target)
