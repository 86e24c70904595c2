"""Archives and pickles made to do harm: nothing is executed, nothing is written elsewhere, memory holds."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import random
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fake_assets import TEXT, FakeClient, sha
from faults import mutations, toy_run
from faults.campaign import WRONG, ended, fault_unless, forked, marks, one_error, run, within
from pickled import Runs

from lorakit import cli
from lorakit.assets import client
from lorakit.assets.registry import ASSETS, Asset, Member, Package
from lorakit.files import sha256

pytestmark = marks
LONGEST = 60  # seconds

# archives -------------------------------------------------------------------------------------------

LARGE = 96 << 20  # bytes that a bomb unpacks to
ROOM = 40 << 20  # that a fetch of a few KiB may take
NAMES = [
    *("../out", "../../out", "/{0}/out", "a/../../out", "./../out", "..\\out", "C:\\out", "C:out", "//out"),
    *("", ".", "..", "a/", "link/out", "\0out", "o\0ut", "\u202eout", "caf\u00e9", "x" * 300, "a/" * 99 + "b", "~/o"),
]  # fmt: skip
LINKS = ["{0}/secret", "../secret", "/etc/passwd", ".", "..", "good", "/dev/zero", "/proc/self/mem", "{0}/victim"]
KINDS = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, b"S"]
BOMB: dict[str, bytes] = {}


def bomb(compressed: str) -> bytes:
    """Zeros, a great many, in a few KiB."""
    if compressed not in BOMB:
        BOMB[compressed] = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[compressed](bytes(LARGE))
    return BOMB[compressed]


def tar_of(rng: random.Random, place: Path, content: dict[str, bytes], mode: str, odd: bool) -> bytes:
    """A tar with these members, among links, devices, names twice and members that say another size."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode, format=rng.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])) as archive:
        for name, data in content.items():
            for _ in range(rng.choice([0, 0, 1, 2]) if odd else 0):
                info = tarfile.TarInfo(rng.choice([name, "link", "good"]))
                info.type, info.linkname = rng.choice(KINDS), rng.choice(LINKS).format(place)
                archive.addfile(info)
            info = tarfile.TarInfo(name.replace("\0", ""))
            info.size, info.mode = len(data), 0o6777
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def zip_of(rng: random.Random, place: Path, content: dict[str, bytes], odd: bool) -> bytes:
    """A zip of the same kind; of some members the flags say that they are encrypted, or packed as nobody does."""
    file = io.BytesIO()
    modes = [0, 0o100644, 0o120777, 0o40755, 0o10644] if odd else [0o100755]
    how = rng.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
    with zipfile.ZipFile(file, "w", how) as archive:
        for name, data in content.items():
            info = zipfile.ZipInfo(name.replace("\0", "") or "x")
            info.compress_type, info.external_attr = how, rng.choice(modes) << 16
            archive.writestr(info, rng.choice(LINKS).format(place) if info.external_attr >> 28 == 10 else data)
    made = bytearray(file.getvalue())
    if odd and rng.random() < 0.3:  # in the directory: flags, method, sizes, offset
        at = made.rfind(b"PK\1\2") + rng.choice([8, 10, 20, 24, 42])
        made[at : at + 2] = rng.choice([b"\1\0", b"\x63\0", b"\xff\xff", b"\0\0"])
    return bytes(made)


def archive_of(rng: random.Random, place: Path, name: str, content: dict[str, bytes]) -> bytes:
    """The bytes of archive `name`; often odd in form too, and sometimes a few of them changed."""
    odd = rng.random() < 0.6
    modes = {"gz": "w:gz", "bz2": "w:bz2", "xz": "w:xz", "tar": "w:"}
    kind = name.rpartition(".")[2]
    made = tar_of(rng, place, content, modes[kind], odd) if kind in modes else zip_of(rng, place, content, odd)
    return rng.choice(mutations.BYTES)(made, rng) if odd and rng.random() < 0.4 else made


def hostile(rng: random.Random, place: Path) -> tuple[Asset, dict[str, bytes]]:
    """An asset whose archive is the pinned one: the worst that whoever makes the pins could miss."""
    ending = rng.choice(["whl", "zip", "tar.gz", "tar.bz2", "tar.xz", "tar"])
    path, kept = rng.choice([*NAMES, *["good"] * 60]), rng.choice([*NAMES, *["kept"] * 60])
    path, kept, data = path.format(str(place)[1:]), kept.format(str(place)[1:]), TEXT
    if rng.random() < 0.1:
        data = bytes(LARGE)
    content = {path: data, "setup.py": b"raise SystemExit('imported')"}
    if rng.random() < 0.3:
        inner = rng.choice(["tar.gz", "zip", "tar.xz"])
        within = archive_of(rng, place, inner, content)
        within = bomb(rng.choice(["gz", "xz"])) if rng.random() < 0.3 else within
        within = bytes(LARGE) if rng.random() < 0.1 else within
        content, path = {f"inner.{inner}": within}, f"inner.{inner}!{path}"
    made = archive_of(rng, place, ending, content)
    if rng.random() < 0.1 and ending in ("tar.gz", "tar.xz"):
        made = bomb(ending.rpartition(".")[2])
    member = Member(path, kept, sha(TEXT), len(TEXT))
    package = Package("one==1", f"one-1.{ending}", sha(made), len(made), (member,))
    return Asset("demo", "data", (package,), terms="", notice="x"), {f"one-1.{ending}": made}


def around(place: Path) -> dict[str, bytes]:
    """What stands beside the cache, and must stay as it is."""
    found = [path for path in place.rglob("*") if "cache" not in path.parts and path.suffix != ".log"]
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in found}


def archives_case(rng: random.Random, folder: Path) -> str:
    (folder / "secret").write_text("mine")
    (folder / "victim").write_text("as it was")
    asset, made = hostile(rng, folder)
    before, log, cache = around(folder), folder / "fetch.log", folder / "cache"

    def work() -> int:
        os.chdir(folder)
        ASSETS["demo"], client.run_client = asset, FakeClient(made)
        return cli.main(["fetch", "demo"])

    status = ended(forked(within(ROOM, work), log, {"LORAKIT_CACHE": str(cache), "CI": "1"}), LONGEST)
    said, member = log.read_text(), asset.packages[0].members[0]
    told = [*made, member.path[:60], member.name[:60]]
    fault_unless(status in (0, 2) and not WRONG.search(said), told, f"ended with {status}", said)
    fault_unless(
        around(folder) == before, told, "something elsewhere changed", sorted(around(folder).keys() ^ before.keys())
    )
    found = [path for path in cache.rglob("*") if ".locks" not in path.parts and path.is_file()]
    if status == 0:
        kept = cache / "demo" / member.name
        fault_unless(kept.resolve().is_relative_to(cache / "demo"), told, "kept elsewhere", kept)
        fault_unless(kept.read_bytes() == TEXT and not kept.is_symlink(), told, "other bytes than pinned were kept")
        fault_unless({path.name for path in found} == {kept.name, "manifest.json"}, told, "more was kept", found)
        fault_unless(
            not kept.stat().st_mode & 0o7111, told, "kept with modes of the archive's", oct(kept.stat().st_mode)
        )
        return "kept"
    one_error("".join(line for line in said.splitlines(True) if line.startswith("lorakit fetch: ")))
    fault_unless("MemoryError" not in said and not found, told, "something was left", found, said)
    return "refused"


# pickles --------------------------------------------------------------------------------------------

RUNS: dict[str, tuple[Path, list[str], dict]] = {}
OF_CHECKPOINT = [
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "gate.pt",
    "ledger.pt",
    "scaler.pt",
    "training_args.bin",
]
OF_CHECKPOINT += ["pytorch_model.bin", "trainable.safetensors", "best.safetensors", "run.json", "trainer_state.json"]
OF_ADAPTER = [
    "adapter_model.bin",
    "adapter_model.safetensors",
    "training_args.bin",
    "tokenizer.json",
    "adapter_config.json",
]
OF_MODEL = [
    "pytorch_model.bin",
    "model.safetensors",
    "training_args.bin",
    "tokenizer.json",
    "pytorch_model.bin.index.json",
]
OF_MODEL += ["tf_model.h5", "flax_model.msgpack", "vocab.txt", "config.json"]


class Calls:
    """Unpickled by who trusts these names, as PyTorch's list of them does, it calls `made` with `given`."""

    def __init__(self, made: Callable, given: tuple):
        self.made, self.given = made, given

    def __reduce__(self):
        return self.made, self.given


def harmful(rng: random.Random, ran: Path) -> Any:
    """Something that, unpickled, makes the file `ran`."""
    own = [Runs(ran), Calls(os.system, (f"touch {ran}",)), Calls(eval, (f"open({str(ran)!r}, 'w')",))]
    inner = rng.choice(own)
    return rng.choice([lambda: inner, lambda: {"a": inner}, lambda: {inner: 1}, lambda: [[{"state": {0: inner}}]],
                       lambda: (torch.zeros(2), inner), lambda: {"param_groups": [inner], "state": {}},
                       lambda: Calls(getattr, (inner, "x")), lambda: {"w": torch.zeros(1), "x": inner},
                       lambda: Calls(torch._utils._rebuild_parameter, (inner, True, {}))])()  # fmt: skip


def pickled(rng: random.Random, ran: Path, path: Path) -> str:
    """Write it to `path`, beside what the file held or alone, in a form that some reader takes; which."""
    what, how = harmful(rng, ran), rng.choice(["zip", "zip", "legacy", "plain", "plain", "gzip", "safetensors header"])
    if how in ("zip", "legacy"):
        kept = {}
        if path.suffix in (".pt", ".pth") and path.is_file() and rng.random() < 0.5:
            kept = torch.load(path, weights_only=False)
        value = kept | {rng.choice(["a", *kept]): what} if isinstance(kept, dict) and kept else what
        torch.save(value, path, _use_new_zipfile_serialization=how == "zip")
    elif how == "safetensors header":
        head = json.dumps({"__metadata__": {"format": "pt", "x": pickle.dumps(what).hex()}}).encode()
        path.write_bytes(len(head).to_bytes(8, "little") + head)
    else:
        data = pickle.dumps(what, protocol=rng.choice([0, 2, 4, 5]))
        path.write_bytes(gzip.compress(data) if how == "gzip" else data)
    return how


def made_run(kind: str, folder: Path) -> tuple[Path, list[str], dict]:
    """A run of that row that has ended, with its two checkpoints."""
    if kind not in RUNS:
        draw = random.Random(f"pickles/{kind}")
        words = [*toy_run.drawn(draw, [kind]), "-p", "save_steps=1"]
        RUNS[kind] = folder / f"made-{kind}", words, toy_run.whole(words, folder / f"made-{kind}", LONGEST)
    return RUNS[kind]


def resumed(rng: random.Random, folder: Path, place: Path, words: list[str], wanted: dict) -> str:
    """Of a checkpoint: refused in a line, or an older one, and the end is as ever."""
    ran, newest = folder / "ran", sorted((place / "run").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    chosen = newest if rng.random() < 0.5 else newest[-1:]
    for made in ("adapter", "model"):
        shutil.rmtree(place / "run" / made, ignore_errors=True)
    told = []
    for checkpoint in chosen:
        name = rng.choice(OF_CHECKPOINT)
        told.append(f"{checkpoint.name}/{name} {pickled(rng, ran, checkpoint / name)}")
        if rng.random() < 0.7:  # its digests are made to fit
            digests = json.loads((checkpoint / ".lorakit").read_text())
            (checkpoint / ".lorakit").write_text(json.dumps(digests | {name: sha256(checkpoint / name)}))
    log = folder / "resumed.log"
    status, said = ended(forked(lambda: toy_run.train(words, place), log), LONGEST), log.read_text()
    fault_unless(not ran.exists(), told, "a pickle was executed", said)
    fault_unless(status in (0, 2) and not WRONG.search(said), told, f"ended with {status}", said)
    if status == 0:
        difference = toy_run.difference(wanted, toy_run.outcome(place))
        fault_unless(not difference, told, "not as the undisturbed run", difference)
    else:
        one_error("".join(line for line in said.splitlines(True) if line.startswith("lorakit train: ")))
        fault_unless("checkpoint-" in said, told, "does not name the checkpoint", said)
    return f"checkpoint {'refused' if status else 'resumed'}"


def opened(rng: random.Random, folder: Path, made: Path, names: list[str], sort: str) -> str:
    """Of an adapter or a model: what opens it says in a line what is wrong, or opens what was there."""
    ran, place, name = folder / "ran", folder / "theirs", rng.choice(names)
    shutil.copytree(made, place)
    if rng.random() < 0.6:  # the only weights there are
        for weights in place.glob("*.safetensors"):
            weights.unlink()
    how = pickled(rng, ran, place / name)
    train = ["train", *(w for n, v in (toy_run.SMALL | {"budget": 1}).items() for w in ("-p", f"{n}={v}"))]
    asks = [["predict", place, "--text", "fine"], ["export", place, "--output", folder / "out"]]
    asks += (
        [[*train, "-p", f"model={place}"]]
        if sort == "model"
        else [["export", place, "--merge", "--output", folder / "out"]]
    )
    asked = rng.choice(asks)
    log = folder / "opened.log"
    status, said = ended(forked(lambda: cli.main([*map(str, asked)]), log), LONGEST), log.read_text()
    told = f"{asked[0]} of {sort}, {name} {how}"
    fault_unless(not ran.exists(), told, "a pickle was executed", said)
    fault_unless(status in (0, 2) and not WRONG.search(said), told, f"ended with {status}", said)
    if status == 2:
        lines = [line for line in said.splitlines(True) if line.startswith(f"lorakit {asked[0]}: ")]
        one_error("".join(lines))
    return f"{sort} {'refused' if status else 'opened'}"


def pickles_case(rng: random.Random, folder: Path) -> str:
    sort = rng.choice(["checkpoint", "checkpoint", "adapter", "model"])
    row = {"adapter": "lora", "model": "full"}.get(sort) or rng.choice(["lora", "slora", "skip", "qlora", "pps"])
    source, words, wanted = made_run(row, folder.parent)
    if sort != "checkpoint":
        names = OF_MODEL if sort == "model" else OF_ADAPTER
        return opened(rng, folder, source / "run" / sort, names, sort)
    shutil.copytree(source, folder / "run-of", symlinks=True)
    return resumed(rng, folder, folder / "run-of", words, wanted)


def test_a_hostile_archive_writes_nothing_elsewhere_and_takes_no_memory(tmp_path):
    run("archives", archives_case, tmp_path, 2 * LONGEST)


def test_a_hostile_pickle_is_not_executed(tmp_path):
    import lorakit.analysis.tables
    import lorakit.runs.experiment  # noqa: F401

    run("pickles", pickles_case, tmp_path, 4 * LONGEST)
