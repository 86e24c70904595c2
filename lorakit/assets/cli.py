"""`lorakit fetch [NAME ...] [--list] [--verify]`: fill, list or check the cache of offline assets."""

from __future__ import annotations

import argparse

from lorakit.assets import cache
from lorakit.assets.fetching import fetch, get, path, verify
from lorakit.assets.registry import ASSETS
from lorakit.errors import AssetError


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status.

    Raises:
        LorakitError: unknown name, failed download, or damage found by --verify.
    """
    parser = argparse.ArgumentParser(prog="lorakit fetch", description="Fetch offline assets into the user's cache.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(ASSETS)}")
    parser.add_argument("--list", action="store_true", help="what there is, what is cached, under which terms")
    parser.add_argument("--verify", action="store_true", help="read every byte of what is cached and compare hashes")
    options = parser.parse_args(argv)
    for name in options.names:
        get(name)
    if options.verify:
        _verify(options.names or [name for name in ASSETS if path(name)])
    elif options.list or not options.names:
        _list()
    else:
        for name in options.names:
            print(f"{name}: {fetch(name)}")
    return 0


def _list() -> None:
    for asset in ASSETS.values():
        where = path(asset.name) or f"not cached, {asset.size / 1e6:.0f} MB to download"
        print("\n".join([f"{asset.name:18s} {where}", *(f"{'':18s} {line}" for line in (asset.terms, *asset.notes))]))


def _verify(names: list[str]) -> None:
    broken = {name: files for name in names if (files := verify(name))}
    for name in names:
        print(f"{name}: {'whole' if name not in broken else 'damaged: ' + ', '.join(broken[name])}")
    if broken:
        folders = ", ".join(str(cache.root() / name) for name in broken)
        raise AssetError(f"{', '.join(broken)}: not whole; remove {folders} and run `lorakit fetch` again")
