"""What can be had offline: assets on the Python package index, each pinned by version and sha256 in `assets.json`."""

import hashlib
from dataclasses import dataclass
from typing import Literal

from pydantic import TypeAdapter

from lorakit.files import CONFIGS

PINS = CONFIGS / "assets.json"


@dataclass(frozen=True)
class Member:
    """One file of an archive that is kept.

    Args:
        path: where it lies in the archive; `outer.tar.gz!inner` for a file in an archive within.
        name: what it is called in the cache.
        sha256: of its bytes.
        size: bytes.
    """

    path: str
    name: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Package:
    """One archive on the package index: pinned requirement, file name, sha256, bytes, and the members kept."""

    requirement: str
    file: str
    sha256: str
    size: int
    members: tuple[Member, ...]


@dataclass(frozen=True)
class Asset:
    """A model or a data set made of packages; `kind` says what becomes of the unpacked files.

    Args:
        terms: licence and citation, shown by `lorakit fetch`.
        notes: what a reader must know to read a number made with it.
        hub: name of the same weights on the hub, where they are there; made_from: of those they were quantised from.
        licence: as the hub calls it.
        notice: file in the cache with the full terms.
        joined: of a "gguf", the file that its parts make up, appended in order of their names.
    """

    name: str
    kind: Literal["model", "gguf", "data"]
    packages: tuple[Package, ...]
    terms: str
    notes: tuple[str, ...] = ()
    hub: str = ""
    made_from: str = ""
    licence: str = ""
    notice: str = ""
    joined: Member | None = None

    @property
    def members(self) -> tuple[Member, ...]:
        """All files kept, over all packages."""
        return tuple(member for package in self.packages for member in package.members)

    @property
    def size(self) -> int:
        """Bytes to download."""
        return sum(package.size for package in self.packages)

    @property
    def fingerprint(self) -> str:
        """sha256 over the names and pinned hashes of all files: changes when any byte would."""
        lines = "".join(f"{member.name} {member.sha256}\n" for member in self.members)
        return hashlib.sha256(lines.encode()).hexdigest()


ASSETS = {asset.name: asset for asset in TypeAdapter(list[Asset]).validate_json(PINS.read_bytes())}
