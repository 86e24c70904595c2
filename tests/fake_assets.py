"""A package client that needs no network, and an asset of two small archives for it."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

from lorakit.assets.registry import Asset, Member, Package

TEXT = b"hello\n" * 1000
WEIGHTS = bytes(range(256)) * 4096  # 1 MiB


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def wheel(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def tarball(members: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return file.getvalue()


def package(name: str, data: bytes, members: dict[str, tuple[str, bytes]]) -> Package:
    """`members`: path in the archive -> (name in the cache, bytes)."""
    kept = tuple(Member(path, target, sha(content), len(content)) for path, (target, content) in members.items())
    return Package(f"{name.split('-')[0]}==1", name, sha(data), len(data), kept)


class FakeClient:
    """Stands in for `client.run_client`: puts prepared archives where pip would, counts calls."""

    def __init__(self, archives: dict[str, bytes], status: int = 0, output: str = ""):
        self.archives, self.status, self.output, self.calls = archives, status, output, []

    def __call__(self, command, folder, tick):
        self.calls.append(command)
        wanted = Path(command[command.index("-r") + 1]).read_text()
        for name, data in self.archives.items():
            if wanted.startswith(name.split("-")[0] + "=="):
                (folder / name).write_bytes(data)
        tick()
        return self.status, self.output


FIRST = wheel({"one/model.bin": WEIGHTS, "one/__init__.py": b"raise SystemExit('imported')"})
SECOND = tarball({"two/inner.tar.gz": tarball({"data/text.txt": TEXT}), "two/setup.py": b"raise SystemExit"})
ARCHIVES = {"one-1-py3-none-any.whl": FIRST, "two-1.tar.gz": SECOND}
DEMO = Asset(
    "demo",
    "data",
    (
        package("one-1-py3-none-any.whl", FIRST, {"one/model.bin": ("weights/model.bin", WEIGHTS)}),
        package("two-1.tar.gz", SECOND, {"two/inner.tar.gz!data/text.txt": ("text.txt", TEXT)}),
    ),
    terms="MIT.",
    notice="text.txt",
)
