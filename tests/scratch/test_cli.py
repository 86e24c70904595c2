"""`lorakit scratch` on tiny sizes: its table, its folder, and its answers to bad arguments."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorakit import cli
from lorakit.scratch import LoRATransformer, Settings, evaluate
from lorakit.scratch import cli as command
from lorakit.scratch.compare import review_loaders

SIZES = {"d_model": 16, "num_heads": 2, "num_layers": 1, "length": 32, "texts": 40, "lora_r": 2}
TINY = [f"--{name}={value}" for name, value in {**SIZES, "pretrain_epochs": 2, "epochs": 2}.items()]


def main(arguments: list[str]) -> int:
    return cli.main(["scratch", *arguments])


def test_prints_the_comparison_and_writes_a_folder_that_loads(tmp_path: Path, capsys):
    output = tmp_path / "new" / "run"
    assert main([*TINY, "--output", str(output)]) == 0
    printed = capsys.readouterr()
    names = ["random base", "LoRA on random base", "pretrained base", "LoRA on pretrained base"]
    losses = {name: float(re.search(rf"^{name} +([\d.]+)$", printed.out, re.M)[1]) for name in names}
    assert losses["LoRA on pretrained base"] < losses["pretrained base"] < losses["random base"]
    assert "reduction_factor" in printed.out and len(printed.err.splitlines()) == 2 + 2 * 2  # a line per epoch

    files = {"config.json", "base.safetensors", "adapter.safetensors", "history.json", "history.png"}
    assert {path.name for path in output.iterdir()} == files and [p.name for p in output.parent.iterdir()] == ["run"]
    model = LoRATransformer(**json.loads((output / "config.json").read_text()))
    model.load_state_dict(load_file(output / "base.safetensors") | load_file(output / "adapter.safetensors"))
    history = json.loads((output / "history.json").read_text())
    assert history["settings"]["lora_r"] == 2 and len(history["pretrain_loss"]) == 2
    assert [len(history[base]["val_loss"]) for base in ("pretrained", "random")] == [2, 2]
    loss = evaluate(model, review_loaders(Settings(**history["settings"]))[1])
    assert loss == pytest.approx(history["pretrained"]["val_loss"][-1], abs=1e-6)
    assert history["pretrained"]["parameters"] == model.configure_lora_training().get_parameter_stats()


def test_the_same_seed_prints_the_same(capsys):
    tables = []
    for _ in range(2):
        torch.manual_seed(len(tables))  # the caller's state does not matter
        assert main([*TINY, "--seed", "3"]) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [("--lora_r", "0", "lora_r=0: Input should be greater than or equal to 1"), ("--epochs", "0", "epochs=0: Input"),
     ("--pretrain_epochs", "0", "pretrain_epochs=0: Input should"), ("--batch_size", "0", "batch_size=0: Input should"),
     ("--learning_rate", "0", "learning_rate=0.0: Input should be greater than 0"),
     ("--learning_rate", "-0.001", "learning_rate=-0.001: Input should be greater than 0"),
     ("--learning_rate", "nan", "learning_rate=nan: Input should be a finite number"),
     ("--pretrain_learning_rate", "0", "pretrain_learning_rate=0.0: Input should be greater than 0"),
     ("--lora_alpha", "-1", "lora_alpha=-1.0: Input should be greater than 0"), ("--seed", "-1", "seed=-1: Input"),
     ("--num_heads", "3", "d_model=16: must be a multiple of 2 * num_heads = 6"),
     ("--length", "100000", "fewer than a row of 100000"), ("--rank", "2", "unrecognized arguments: --rank 2"),
     ("--epochs", "two", "argument --epochs: invalid int value: 'two'")],
)  # fmt: skip
def test_a_bad_argument_is_one_clear_line_and_leaves_nothing(tmp_path: Path, capsys, option, value, words):
    output = tmp_path / "run"
    assert main([*TINY, "--output", str(output), option, value]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1 and words in printed.err
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_holds_something_is_refused_before_training(tmp_path: Path, capsys):
    (tmp_path / "mine.txt").write_text("keep")
    for output, told in ((tmp_path, "not empty, it holds mine.txt; name"), (tmp_path / "mine.txt", "is not a folder")):
        assert main([*TINY, "--output", str(output)]) == 2
        assert told in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_a_write_that_fails_leaves_nothing_half_done(tmp_path: Path, monkeypatch, capsys):
    def save(result, folder: Path) -> None:
        (folder / "first").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "save", save)
    assert main([*TINY, "--output", str(tmp_path / "run")]) == 2
    assert "run': cannot be written: [Errno 28] No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_divergence_is_told_and_exits_1(capsys):
    assert main([*TINY, "--pretrain_learning_rate", "1e30"]) == 1
    assert "lower learning_rate" in capsys.readouterr().err
