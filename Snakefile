"""params/<setting>/<method>.yaml x seeds -> results/<setting>/<method>/s<seed>.json, by the method's notebook.

    make sweep SETTING=sst2-minilm METHODS="lora head" SEEDS="0 1 2" JOBS=2
    snakemake --workflow-profile profiles/slurm --config setting=sst2-distilbert seeds="0 1 2"

Snakemake tracks receipts, not records: it deletes the outputs of a job that fails, and a record, a checkpoint or an
executed notebook is never its to delete. A run is in the plan as long as its record is not finished.
"""

import sys
from pathlib import Path

from lorakit.runs import sweep
from lorakit.errors import LorakitError

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


rule fine_tune:
    output:
        touch(RECEIPT),
    params:
        run=run_of,
        python=sys.executable,
    threads: int(config.get("threads", 1))
    shell:
        "OMP_NUM_THREADS={threads} {params.python:q} -m lorakit run {params.run.notebook:q}"
        " --output {params.run.executed:q} -f {params.run.files[0]:q} -f {params.run.files[1]:q}"
        " -p setting={wildcards.setting:q} -p row={wildcards.method:q} -p method={params.run.params.method:q}"
        " -p seed={wildcards.seed}"
        " -p record={params.run.record:q} -p run_dir={params.run.run_dir:q}"
