"""Files and folders are written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from lorakit.errors import ParameterError
from lorakit.files import LOCK, MARK, aside, require_place, sha256, write_text, written

ROOT = Path(__file__).resolve().parents[1]


def test_text_is_written_for_everyone_to_read_and_hashed(tmp_path):
    path = write_text("grün\n", tmp_path / "new" / "a.txt")
    assert path.read_bytes() == "grün\n".encode() and path.stat().st_mode & 0o777 == 0o644
    assert sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    write_text("again", path)
    assert path.read_text() == "again" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("command", ["sweep --setting no-such", "demo --jobs 0", "sweep --setting toy --seeds x"])
@pytest.mark.parametrize("inside", [True, False])
def test_an_installed_package_works_on_the_folder_one_is_in(tmp_path, command, inside):
    """A copy without the project around it, as a wheel leaves one in site-packages."""
    shutil.copytree(ROOT / "lorakit", tmp_path / "site" / "lorakit", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "else").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "lorakit", *command.split()], cwd=ROOT if inside else tmp_path / "else",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site"), "PYTHONSAFEPATH": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    expected = f"none: {tmp_path / 'else'} has no params/; `lorakit init FOLDER` makes a folder that has"
    told = {"--setting no-such": "must be one of alpaca-llama", "--jobs 0": "JOBS=0", "--seeds x": "SEEDS='x'"}
    [found] = [text for end, text in told.items() if command.endswith(end)]
    assert (found if inside else expected) in done.stderr
    assert list((tmp_path / "else").iterdir()) == []


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_leaves_what_was_there(tmp_path, folder, existing):
    path = tmp_path / "a.png"
    if existing:
        write_text("old", path / "inside" if folder else path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(KeyboardInterrupt), written(path, folder) as temporary:
        assert temporary.name == "a.png"  # what draws a figure goes by the ending
        (temporary / "half" if folder else temporary).write_text("half")
        raise KeyboardInterrupt
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_keeps_what_is_not_written_anew_and_gets_its_config_last(tmp_path, monkeypatch):
    write_text("kept", tmp_path / "run" / "notes.md")
    write_text("old", tmp_path / "run" / "config.json")
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: moved.append(target.name) or replace(source, target))
    with written(tmp_path / "run", folder=True) as folder:
        for name in ("config.json", "weights"):
            (folder / name).write_text("new")
            (folder / name).chmod(0o600)
    assert moved == ["weights", "config.json"] and [path.name for path in tmp_path.iterdir()] == ["run"]
    contents = {path.name: path.read_text() for path in (tmp_path / "run").iterdir()}
    assert contents == {"notes.md": "kept", "config.json": "new", "weights": "new"}
    assert (tmp_path / "run" / "weights").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_what_a_killed_process_left_is_swept_and_what_one_still_writes_is_not(tmp_path, folder, number):
    path, mine = tmp_path / "a.json", tmp_path / ".a.json.mine"
    write_text("the user's", mine / "a.json")
    code = (
        "import os, sys\nfrom lorakit.files import written\n"
        f"with written({str(path)!r}, {folder}) as made:\n"
        f"    (made / 'half' if {folder} else made).write_text('half')\n    os.kill(os.getpid(), {number:d})"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
        left = set(tmp_path.iterdir()) - {mine}
        assert len(left) == 1 and not path.exists()
        with written(path, folder) as made:
            (made / "whole" if folder else made).write_text("whole")
        assert set(tmp_path.iterdir()) == {path, mine} | (left if number == signal.SIGSTOP else set())
        process.kill()
    assert (mine / "a.json").read_text() == "the user's"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_files_and_folders_follow_the_umask_as_open_does(tmp_path, umask):
    before = os.umask(umask)
    try:
        (tmp_path / "plain").write_text("")
        (tmp_path / "there").mkdir()
        write_text("text", tmp_path / "a.txt")
        with written(tmp_path / "b", folder=True) as folder:
            (folder / "c").touch(0o600)
    finally:
        os.umask(before)
    modes = {path.relative_to(tmp_path).as_posix(): path.stat().st_mode for path in tmp_path.rglob("*")}
    assert modes["a.txt"] == modes["b/c"] == modes["plain"] and modes["b"] == modes["there"]


def test_a_link_is_followed_and_a_long_name_is_a_name(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_text("through", tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "through"
    long = "ü" * 127
    assert write_text("x", tmp_path / long).read_text() == "x"


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("folder", "is a folder or a device; name a plain file"),
        ("/dev/null", "is a folder or a device; name a plain file"),
        ("to-a-device", "is a folder or a device; name a plain file"),
        ("pipe", "is a folder or a device; name a plain file"),
        ("file/a/b.json", "is under .*file, which is a file"),
        ("/proc/a.json", "cannot be written: "),
        ("new/" + 256 * "x", "cannot be written: File name too long"),
        (256 * "x" + "/a", "cannot be written: File name too long"),
        ("a\0b", "cannot be written: embedded null"),
    ],
)
def test_where_nothing_can_be_written_is_told_before_anything_is(tmp_path, path, complaint):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "to-a-device").symlink_to("/dev/null")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.rglob("*"))
    for refuse in (lambda: require_place(tmp_path / path, "record"), lambda: write_text("text", tmp_path / path)):
        with pytest.raises(ParameterError, match=complaint):
            refuse()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("removed", [[LOCK], ["half", LOCK], ["half"], []])
def test_what_a_kill_left_on_its_way_goes_and_what_is_the_users_stays(tmp_path, removed):
    with aside(tmp_path, "a") as folder:
        (folder / "half").write_text("x")
        left = shutil.copytree(folder, tmp_path / f"a{MARK}abcdefgh")
    for name in removed:
        (left / name).unlink()
    with aside(tmp_path, "a"):
        assert left.exists() == (removed == [LOCK])  # without its lock it is somebody else's, unless it is empty
    assert [*tmp_path.iterdir()] == [left] * (removed == [LOCK])


def test_a_folder_that_another_process_took_for_left_is_made_again(tmp_path, monkeypatch):
    real, made = tempfile.mkdtemp, []

    def taken(**where):
        made.append(real(**where))
        if len(made) == 1:
            (Path(made[0]) / LOCK).touch()
            monkeypatch.setattr(os, "open", lambda *a, opened=os.open, **k: stolen(opened, *a, **k))
        return made[-1]

    def stolen(opened, path, *more, **named):
        if str(path).startswith(made[0]):
            shutil.rmtree(made[0], ignore_errors=True)
            raise FileNotFoundError(path)
        return opened(path, *more, **named)

    monkeypatch.setattr(tempfile, "mkdtemp", taken)
    with aside(tmp_path, "a") as folder:
        assert str(folder) == made[1] and folder.is_dir()
    monkeypatch.undo()
    with aside(tmp_path, "a"):
        pass
    assert not [*tmp_path.iterdir()]


def test_what_libraries_say_of_a_full_disk_is_an_error_of_the_systems(tmp_path):
    said = "Error while serializing: I/O error: No space left on device (os error 28)"  # safetensors' words
    with pytest.raises(OSError, match="disk full.*No space left"), aside(tmp_path, "a"):
        raise RuntimeError(said)
    with pytest.raises(OSError, match="disk full"), aside(tmp_path, "a"):
        torch.save({"a": torch.zeros(100_000)}, "/dev/full")
    with pytest.raises(RuntimeError, match="^something else$"), aside(tmp_path, "a"):
        raise RuntimeError("something else")
    assert list(tmp_path.iterdir()) == []
