"""The command line: usage, exit statuses, one-line errors."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.metadata import version

import pytest

from lorakit import cli, params, records
from lorakit.errors import ParameterError


def test_usage_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in cli.COMMANDS)


def test_the_version_is_the_packages(capsys):
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out == f"lorakit {version('lorakit')}\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0 and name in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["tarin"], "'tarin' is not a command; there are demo"), (["plan", "no-such/model"], "no-such/model"),
     (["train", "-p", "rank=0"], "lorakit train: rank=0: "), (["train", "-p", "rank"], "-p='rank': must be name=value"),
     (["train", "-p", "gating.topk_tokens=2.0"], "gating.topk_tokens=2.0: "),
     (["train", "-f", "missing.yaml"], "-f='missing.yaml': no such params file"),
     (["train", "-f", "x" * 300], "no such params file"), (["train", "-f", f"{'x' * 300}/y"], "no such params file"),
     (["train", "-p", f"setting={'x' * 300}", "-p", "rank=0"], "rank=0: "),
     (["train", "-p", "task=sst2", "-p", f"data_files={'x' * 300}"], "no such folder"),
     (["train", "-p", "model=x.git"], "model='x.git': must be a name, a local folder or a hub id"),
     (["table", "x" * 300], "not a record"), (["table", "~nobody-here"], "not a record"),
     (["search"], "search_rates=[]: must list"), (["fetch", "gemma-4"], "gemma-4")],
)  # fmt: skip
def test_bad_input_is_one_line_and_status_2(argv, message, capsys):
    assert cli.main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_train_prints_a_table_and_says_how_it_ended_and_what_is_kept(tmp_path, capsys, monkeypatch):
    small = "budget=2 max_train=16 max_validation=8 max_test=8 latency_repeats=0 predict_memory=false"
    argv = ["train", *(word for override in small.split() for word in ("-p", override))]
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("learning rate 4.0e-03, from no search\n")
    assert "LoRA" in printed and "trained weights: not kept; -p run_dir=FOLDER keeps them" in printed
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    (tmp_path.parent / "given.yaml").write_text(f"run_dir: ~/{tmp_path.name}\n")  # which no shell has seen
    assert cli.main([*argv, "-f", str(tmp_path.parent / "given.yaml")]) == 0
    assert capsys.readouterr().out.endswith(f"trained weights: {tmp_path}/adapter\n")
    assert cli.main([*argv, "-p", f"run_dir={tmp_path}", "-p", "seed=1"]) == 0
    assert f"what earlier runs left there: {tmp_path}/earlier-1\n" in capsys.readouterr().out
    assert (tmp_path / "earlier-1" / "adapter" / "adapter_model.safetensors").is_file()
    assert cli.main([*argv, "-p", "learning_rate=1.0e+30", "-p", "max_grad_norm=1.0e+30", "-p", "budget=30"]) == 1
    assert "diverged: " in capsys.readouterr().out


def test_the_demo_ends_with_a_page_and_a_verdict(tmp_path, monkeypatch, capsys):
    """Its runs are there already: what is made of their records, with the notebook that compares them."""
    from synthetic_records import record

    from lorakit import files
    from lorakit.analysis import tables
    from lorakit.runs import notebooks, sweep

    setting, seeds, made = cli.DEMO["setting"], [], []

    def planned(root, name, **asked):
        seeds.append(asked["seeds"])
        assert (root, name) == (tmp_path, setting)
        return [sweep.Run(tmp_path, setting, row, 0) for row in ("lora", "head")]

    for row in ("lora", "head"):
        records.write(record(row, setting=setting), tmp_path / "results" / setting / row / "s0.json")
    monkeypatch.setattr(files, "HOME", tmp_path)
    monkeypatch.setattr(files, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sweep, "plan", planned)
    monkeypatch.setattr(sweep, "sweep", lambda runs, jobs: 0)
    monkeypatch.setattr("lorakit.assets.fetch", lambda name: None)
    monkeypatch.setattr(tables, "main", lambda argv: made.append(argv))
    monkeypatch.setattr(notebooks, "run_notebook", lambda *given, **_: made.append(given))
    monkeypatch.setattr(notebooks, "page", lambda executed: executed.replace(".ipynb", ".html"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", "--seeds", "0 1"]) == 0 and seeds == ["0 1"]
    (table, (notebook, output, given)) = made
    assert table[0] == f"results/{setting}" and notebook.name == "20_compare.ipynb"
    assert given == {"setting": setting, "row": "lora"} and output == f"results/{setting}/compare.ipynb"
    lines = capsys.readouterr().out.splitlines()
    assert f"all of it, on one page: results/{setting}/compare.html" in lines
    assert any("1 common seed cannot say whether they are worse" in line for line in lines[-4:])


def test_ctrl_c_is_status_130(monkeypatch, capsys):
    def stop(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "train", stop)
    assert cli.main(["train"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_ctrl_c_is_status_130_though_nobody_reads_any_more():
    """As of `lorakit train | head`, both ended by one Ctrl-C."""
    code = "from lorakit import cli\ndef stop(argv):\n    print('table')\n    raise KeyboardInterrupt\n"
    code += "cli.train = stop\nraise SystemExit(cli.main(['train']))"
    reading, stdout = os.pipe()
    os.close(reading)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    streams = {"stdout": stdout, "stderr": subprocess.PIPE, "text": True}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, **streams)
    os.close(stdout)
    assert (ended.returncode, ended.stderr) == (130, "lorakit train: interrupted\n")


@pytest.mark.parametrize("words", [["params"], ["--help"], ["train", "--help"]], ids=" ".join)
@pytest.mark.parametrize("place", ["a closed pipe", "/dev/full"])
def test_what_cannot_be_printed_is_one_line_and_status_1(place, words):
    if place == "/dev/full":
        stdout = os.open(place, os.O_WRONLY)
    else:
        reading, stdout = os.pipe()
        os.close(reading)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "lorakit", *words]
    ended = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(stdout)
    assert ended.returncode == 1 and ended.stderr.startswith(f"lorakit {words[0]}: [Errno ")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("words", [["no-such-command"], ["train", "--no-such-option"]], ids=" ".join)
def test_where_nothing_can_be_said_the_status_says_that_it_failed(words):
    with open("/dev/full", "w") as full:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        ended = subprocess.run([sys.executable, "-m", "lorakit", *words], stdout=full, stderr=full, env=environment)
    assert ended.returncode in (1, 2)  # not Python's own 120


@pytest.mark.parametrize("closed", [(1,), (2,), (1, 2)])
def test_output_that_was_closed_is_no_error_and_no_file_gets_its_number(tmp_path, closed):
    code = "import os, sys\nfor number in map(int, sys.argv.pop(1)): os.close(number)\n"
    code += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    command = [sys.executable, "-c", code, "".join(map(str, closed)), "-m", "lorakit", "init", str(tmp_path / "made")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0 and not ended.stderr and bool(ended.stdout) == (1 not in closed)
    assert (tmp_path / "made" / "params" / "toy" / "lora.yaml").is_file()


def test_an_ascii_terminal_can_print_a_table(tmp_path):
    for seed in (0, 1):  # a mean and ± its spread
        made = records.Record(setting="toy", method="lora", seed=seed, status="done", final={"test": {"accuracy": 0.5}})
        records.write(made, tmp_path / f"s{seed}.json")
    command = [sys.executable, "-m", "lorakit", "table", str(tmp_path)]
    printed = {}
    for encoding in ("utf-8", "ascii"):
        environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
        ended = subprocess.run(command, capture_output=True, env=environment)
        assert ended.returncode == 0, ended.stderr
        printed[encoding] = ended.stdout.decode(encoding)
    assert not printed["utf-8"].isascii() and len(printed["ascii"]) == len(printed["utf-8"])


def test_a_terminated_fetch_ends_its_client_and_leaves_nothing(tmp_path):
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").touch()  # in place of the installed one
    pid = tmp_path / "pid"
    code = f"import os, time; open({str(tmp_path / 'new')!r}, 'w').write(str(os.getpid()))\n"
    code += f"os.rename({str(tmp_path / 'new')!r}, {str(pid)!r}); time.sleep(60)"
    (tmp_path / "pip" / "__main__.py").write_text(code)
    paths = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = os.environ | {"PYTHONPATH": paths, "LORAKIT_CACHE": str(tmp_path / "cache"), "CI": "1"}
    command = [sys.executable, "-m", "lorakit", "fetch", "review-sentences"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        while not pid.exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.terminate()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert process.returncode == 130 and [path.name for path in (tmp_path / "cache").iterdir()] == [".locks"]


def test_params_of_unknown_settings_and_methods():
    with pytest.raises(ParameterError, match="setting='sst9': must be one of .*toy"):
        params.params_of("sst9", "lora")
    with pytest.raises(ParameterError, match="row='hyra': toy has .*full, .*hira, .*slora, sparse"):
        params.params_of("toy", "hyra")
