"""What a scheduler is asked for: read from a setting's files, refused by name, and handed on by the Snakefile."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lorakit import params, records
from lorakit.errors import ParameterError
from lorakit.files import PARAMS
from lorakit.params.files import Resources, resources
from lorakit.runs import sweep

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = sorted(path.parent.name for path in PARAMS.glob("*/_setting.yaml"))


@pytest.fixture
def place(tmp_path) -> Path:
    """A project of one setting with rows lora, head and large."""
    write(tmp_path, _setting="rank: 4\nresources: {gpus: 0, cpus: 2, memory: 1.5, hours: 0.25}", lora="", head="")
    write(tmp_path, large="rank: 8\nresources: {gpus: 2, cpus: 6}")
    return tmp_path


def write(root: Path, **files: str) -> None:
    (root / "params/toy").mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / f"params/toy/{name}.yaml").write_text(text + "\n")


def run_of(place: Path, row: str) -> sweep.Run:
    (run,) = sweep.plan(place, "toy", row)
    return run


def test_a_row_wins_key_by_key_and_no_parameter_is_touched(place):
    asked = Resources(gpus=0, cpus=2, memory=1.5, hours=0.25)
    assert run_of(place, "lora").resources == asked
    assert run_of(place, "large").resources == asked.but(gpus=2, cpus=6)
    assert run_of(place, "large").params.rank == 8 and "resources" not in params.Params.model_fields
    write(place, _setting="rank: 4")
    assert run_of(place, "lora").resources == Resources(gpus=1, cpus=8, memory=32, hours=4, together=1)


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_asks_for_something_that_there_is(setting):
    for path in PARAMS.glob(f"{setting}/*.yaml"):
        resources([PARAMS / setting / "_setting.yaml", path])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("{gpu: 1}", r"resources.gpu=1: in toy/\w+.yaml: unknown parameter; did you mean 'gpus'"),
     ("{gpus: -1}", r"resources.gpus=-1: in toy/\w+.yaml: .*greater than or equal to 0"),
     ("{gpus: 1.5}", "resources.gpus=1.5"), ("{gpus: true}", "resources.gpus=True"), ("{cpus: 0}", "resources.cpus=0"),
     ("{memory: much}", "resources.memory='much': .*valid number"), ("{memory: 0}", "resources.memory=0"),
     ("{hours: .inf}", "resources.hours=inf"), ("{hours: -2}", "resources.hours=-2"), ("{hours: }", "hours=None"),
     ("{together: 0}", "resources.together=0"), ("[gpus]", r"resources=\['gpus'\]: in toy/\w+.yaml: must be a mapping"),
     ("8", "resources=8"), ("{1: 2}", "resources={1: 2}: .* must be a mapping of names")],
)  # fmt: skip
@pytest.mark.parametrize("file", ["_setting", "lora"])
def test_bad_resources_are_told_before_anything_runs(place, file, text, complaint):
    write(place, **{file: f"resources: {text}"})
    with pytest.raises(ParameterError, match=complaint) as caught:
        sweep.plan(place, "toy", "lora")
    assert "\n" not in str(caught.value) and f"in toy/{file}.yaml" in str(caught.value)


def test_resources_of_a_file_that_is_no_rows_are_no_parameter(tmp_path):
    (tmp_path / "own.yaml").write_text("resources: {gpus: 1}\n")
    with pytest.raises(ParameterError, match="resources=.*unknown parameter"):
        params.resolve(params.given([tmp_path / "own.yaml"], []))


def planned(place: Path, *arguments: str) -> str:
    """What Snakemake would do for all rows."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(place)]
    command += ["--dry-run", "--printshellcmds", "--cores", "64", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_the_snakefile_hands_resources_on_and_starts_a_process_for_each_of_several_gpus(place):
    told = planned(place, "--workflow-profile", "none", "--config", "setting=toy")
    jobs = {re.search(r"method=(\w+)", job).group(1): job for job in told.split("rule fine_tune:")[1:]}
    assert jobs.keys() == {"lora", "head", "large"}
    for row, gpus, cpus in (("lora", 0, 2), ("large", 2, 6)):
        assert f"gpu={gpus}, runtime=15, turn=1, mem_mb=1536," in jobs[row] and f"threads: {cpus}\n" in jobs[row]
    alone, several = (re.search(r"OMP_NUM_THREADS.*", jobs[row]).group() for row in ("lora", "large"))
    assert re.match(
        r"OMP_NUM_THREADS=2 MKL_NUM_THREADS=2 \S+ -m lorakit run \S+/01_lora.ipynb --output \S+/toy/lora/s0.ipynb ",
        alone,
    )
    launch = rf"--config_file {ROOT}/params/accelerate/multi_gpu.yaml --num_processes 2 --main_process_port 0"
    assert re.match(
        rf"OMP_NUM_THREADS=3 MKL_NUM_THREADS=3 \S+ -m accelerate.commands.launch {launch} -m lorakit train -f ", several
    )
    for command, row in ((alone, "lora"), (several, "large")):
        files = rf"-f {place}/params/toy/_setting.yaml -f {place}/params/toy/{row}.yaml"
        named = rf"-p setting=toy -p row={row} -p method=lora -p seed=0 -p record={place}/results/toy/{row}/s0.json"
        assert command.endswith(f"{files} {named} -p run_dir={place}/.runs/toy/{row}/s0")
    shared = planned(place, "--workflow-profile", "none", "--config", "setting=toy", "threads=5")
    assert shared.count("threads: 5\n") == 3  # a sweep on this machine says how its cores are shared


def test_a_profile_is_handed_to_snakemake_and_short_runs_share_jobs(place, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    runs = sweep.plan(place, "toy")
    local = sweep._snakemake(runs, None, ROOT / "profiles/default")
    assert local[local.index("--cores") + 1] == str(os.cpu_count()) and "--groups" not in local
    alone = sweep._snakemake(runs, 7, own)
    assert alone[alone.index("--workflow-profile") + 1] == str(own) and alone[alone.index("--jobs") + 1] == "7"
    assert "--groups" not in alone and "--cores" not in alone and not any("threads" in word for word in alone)
    write(place, _setting="resources: {together: 50}")
    shared = sweep._snakemake(runs, None, own)
    assert shared[shared.index("--groups") :][:4] == ["--groups", "fine_tune=runs", "--group-components", "runs=50"]
    assert "--jobs" not in shared  # as many as the profile says
    for name in ("nowhere", str(own)):
        with pytest.raises(ParameterError, match=f"PROFILE='{name}': must be default, slurm, or a folder"):
            sweep.sweep(runs, profile=name)


def test_a_profile_that_submits_has_no_resources_of_its_own_and_keeps_logs_where_they_are_looked_for():
    profile = yaml.safe_load((ROOT / "profiles/slurm/config.yaml").read_text())
    assert profile.keys().isdisjoint(("set-threads", "set-resources", "default-resources"))
    assert (profile["slurm-logdir"], profile["slurm-keep-successful-logs"]) == (str(sweep.LOGS), True)


def test_a_runs_log_is_found_by_its_name_and_from_its_record(place, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "31")
    from lorakit.measure.environment import environment

    run, logs = run_of(place, "lora"), place / sweep.LOGS
    assert run.slurm_log is None
    for path in ("group_runs_fine_tune/31.log", "group_runs_fine_tune/32.log", "rule_fine_tune/toy_head_0/33.log"):
        (logs / path).parent.mkdir(parents=True, exist_ok=True)
        (logs / path).touch()
    assert run.slurm_log is None
    records.write(
        records.Record(setting="toy", method="lora", seed=0, status="done", environment=environment()), run.record
    )
    assert run.slurm_log == logs / "group_runs_fine_tune/31.log"
    own = logs / "rule_fine_tune/toy_lora_0/34.log"
    own.parent.mkdir()
    own.touch()
    os.utime(logs / "group_runs_fine_tune/31.log", (1, 1))
    assert run.slurm_log == own  # a later job of its own, which was killed and left no record
    monkeypatch.delenv("SLURM_JOB_ID")
    assert "slurm_job" not in environment()
