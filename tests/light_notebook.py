"""A notebook that runs in a second: it writes a record, or fails, or waits to be interrupted, as its parameters say."""

from __future__ import annotations

from pathlib import Path

import nbformat

PARAMETERS = """\
setting = "toy"
method = "lora"
row = ""
seed = 0
record = ""
run_dir = ""
rank = 8
learning_rate = 2.0e-3
report_to = "none"
"""
# report_to says what happens, for want of a parameter of our own: "fail", "wait", "die", an unfinished status
BODY = """\
import os, time
from pathlib import Path
from lorakit import params, records

given = params.collect(globals())
run = params.resolve(given)
repaired = run_dir and (Path(run_dir) / "repaired").exists()
happens = "none" if repaired else report_to

def write(status):
    resolved = run.model_dump(exclude={"record", "run_dir"})
    made = records.Record(setting=setting, method=method, seed=seed, status=status, resolved=resolved)
    if record:
        records.write(made, record)

try:
    print("working on", method, seed, flush=True)
    while happens == "wait":
        time.sleep(0.05)
except KeyboardInterrupt:
    write("interrupted")
    raise
assert happens != "fail", "broken on purpose"
if happens == "die":
    os._exit(1)
write(happens if happens == "out_of_memory" else "done")
"""
CONNECTION = """\
from ipykernel.connect import get_connection_info
print(get_connection_info())
"""


def outputs(path: Path, kind: str) -> list[nbformat.NotebookNode]:
    cells = nbformat.read(path, as_version=4).cells
    return [output for cell in cells for output in cell.get("outputs", []) if output.output_type == kind]


def errors(path: Path) -> list[str]:
    return [output.ename for output in outputs(path, "error")]


def printed(path: Path) -> str:
    return "".join(output.text for output in outputs(path, "stream"))


def write(path: Path, parameters: str | None = PARAMETERS, body: str = BODY) -> Path:
    """Write the notebook to `path`; without `parameters` it has no such cell."""
    cells = [nbformat.v4.new_markdown_cell("# A light notebook"), nbformat.v4.new_code_cell(body)]
    if parameters is not None:
        cells.insert(1, nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path
