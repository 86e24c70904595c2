"""params/<setting>/<method>.yaml x seeds -> results/<setting>/<method>/s<seed>.json, by the method's notebook.

    make sweep SETTING=sst2-minilm METHODS="lora head" SEEDS="0 1 2" JOBS=2
    make sweep SETTING=tulu-gemma3-1b SEEDS="0 1 2" PROFILE=slurm
    snakemake --workflow-profile profiles/slurm --config setting=tulu-gemma3-1b seeds="0 1 2"

Snakemake tracks receipts, not records: it deletes the outputs of a job that fails, and a record, a checkpoint or an
executed notebook is never its to delete. A run is in the plan as long as its record is not finished.
"""

import math
import sys
from pathlib import Path

from lorakit.runs import sweep
from lorakit.errors import LorakitError

SEVERAL = Path(workflow.basedir) / "params/accelerate/multi_gpu.yaml"
RECEIPT = ".runs/.receipts/{setting}/{method}/s{seed}"

try:
    runs = sweep.plan(
        Path.cwd(), str(config.get("setting", "toy")), str(config.get("methods", "")), str(config.get("seeds", ""))
    )
    pending = [run for run in runs if not run.finished()]
except LorakitError as error:
    raise WorkflowError(str(error))

if workflow.is_main_process:
    for line in sweep.stale(runs):
        print(f"warning: {line}", file=sys.stderr)


def run_of(wildcards):
    return sweep.Run(Path.cwd(), wildcards.setting, wildcards.method, int(wildcards.seed))


rule all:
    input:
        [RECEIPT.format(setting=run.setting, method=run.method, seed=run.seed) for run in pending],


def command(wildcards):
    """By the method's notebook; on several GPUs, of which a kernel would use one, by a process each and no notebook."""
    run = run_of(wildcards)
    asked = {"setting": run.setting, "row": run.method, "method": run.params.method, "seed": run.seed}
    asked |= {"record": run.record, "run_dir": run.run_dir}
    given = [word for file in run.files for word in ("-f", file)]
    given += [word for name, value in asked.items() for word in ("-p", f"{name}={value}")]
    if run.resources.gpus < 2:
        return [sys.executable, "-m", "lorakit", "run", run.notebook, "--output", run.executed, *given]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", SEVERAL]
    launch += ["--num_processes", run.resources.gpus, "--main_process_port", 0]  # a free one: jobs may share a node
    return [*launch, "-m", "lorakit", "train", *given]


def cores(wildcards):
    return int(config.get("threads") or run_of(wildcards).resources.cpus)


# inside a job Snakemake does not keep going: of runs that share one, a failed one is told by its record alone
failed = " || true" if config.get("shared") else ""


rule fine_tune:
    output:
        touch(RECEIPT),
    params:
        command=command,
        threads=lambda wildcards, threads: max(1, threads // max(1, run_of(wildcards).resources.gpus)),
    threads: cores
    resources:
        gpu=lambda wildcards: run_of(wildcards).resources.gpus,
        mem_mb=lambda wildcards: math.ceil(1024 * run_of(wildcards).resources.memory),
        runtime=lambda wildcards: math.ceil(60 * run_of(wildcards).resources.hours),
        turn=1,
    shell:
        "OMP_NUM_THREADS={params.threads} MKL_NUM_THREADS={params.threads} {params.command:q}" + failed
