"""Files and folders are written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lorakit.files import sha256, write_text, written

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
    expected = f"none: {tmp_path / 'else'} has no params/; go to the project's folder"
    told = {"--setting no-such": "must be one of imdb", "--jobs 0": "JOBS=0", "--seeds x": "SEEDS='x'"}
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
