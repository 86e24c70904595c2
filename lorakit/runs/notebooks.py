"""Run a notebook with parameters: papermill on a private kernel, with everything checked before the first cell runs."""

import argparse
import ast
import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorakit import records
from lorakit.assets import ASSETS
from lorakit.errors import LorakitError, ParameterError, require, retold
from lorakit.files import HOME, aside, require_place, write_text
from lorakit.params import PER_RUN, merge, resolve
from lorakit.params import given as given_parameters
from lorakit.quiet import answering

FINISHED = ("done", "diverged")  # the statuses of a record that running again would not change
# parameters that mean a place as the caller sees it, not as the kernel does
PATHS = ("record", "run_dir", "data_files")
RUN_METADATA = "metadata.papermill cell.metadata.papermill cell.metadata.execution metadata.language_info"
LONGEST_SOCKET_FOLDER = 75  # a socket's path may have 107 bytes


class NotebookFailed(LorakitError):
    """A cell raised, or the run was interrupted; what was executed so far is kept in `output`."""

    status = 1

    def __init__(self, reason: str, output: Path):
        super().__init__(f"{reason}; executed notebook: {output}")


def run_notebook(
    notebook: str | Path, output: str | Path, params: dict[str, Any] | None = None, *, progress: bool = True
) -> Path:
    """Execute `notebook` in its own folder with `params` and write it, outputs included, to `output`.

    Args:
        notebook: has one cell tagged `parameters`.
        output: written after every cell, so that a failed or killed run leaves what it did.
        params: any parameters of a run; they win over the parameters cell.
        progress: pass on what the notebook prints while it works.

    Raises:
        ParameterError: before anything is executed or written.
        NotebookFailed: a cell raised, or Ctrl-C or SIGTERM came; the kernel was interrupted, not killed.
    """
    notebook, output = (Path(path).expanduser().resolve() for path in (notebook, output))
    require(notebook != output, "output", str(output), "must not be the notebook itself")
    require_place(output, "output")
    given = checked(notebook, params or {})
    output.parent.mkdir(parents=True, exist_ok=True)
    place = tempfile.gettempdir()
    place = place if len(place) < LONGEST_SOCKET_FOLDER else "/tmp"  # for the names of sockets
    with aside(place, "kernel") as folder, _kernel(notebook.parent, folder, progress) as kernel:
        _execute(notebook, output, given, kernel, progress)
    return output


def page(executed: str | Path) -> Path:
    """Write what an executed notebook shows, without its code, beside it: one HTML file that needs no other."""
    from nbconvert import HTMLExporter

    options = {"exclude_input": True, "exclude_input_prompt": True, "exclude_output_prompt": True}
    text, _ = HTMLExporter(**options, mathjax_url="", require_js_url="", mermaid_js_url="").from_filename(str(executed))
    return write_text(text, Path(executed).with_suffix(".html"))


def parameters(notebook: str | Path) -> dict[str, Any]:
    """Names and defaults in the notebook's parameters cell.

    Raises:
        ParameterError: there is no notebook, no such cell, or a line is not `name = literal`.
    """
    import nbformat

    require(Path(notebook).is_file(), "notebook", str(notebook), "no such file")
    with retold(Exception, ParameterError, "notebook", str(notebook), "not a notebook"):
        content = nbformat.read(notebook, as_version=4)
    cells = [cell for cell in content.cells if "parameters" in cell.metadata.get("tags", [])]
    require(len(cells) == 1, "notebook", str(notebook), f"must have one cell tagged 'parameters', has {len(cells)}")
    found, refused = {}, (SyntaxError, ValueError, RecursionError, MemoryError)
    with retold(refused, ParameterError, "notebook", str(notebook), "its parameters cell is not Python"):
        statements = ast.parse(cells[0].source).body
    for statement in statements:
        try:
            (target,) = statement.targets
            found[target.id] = ast.literal_eval(statement.value)
        except (AttributeError, ValueError, TypeError, RecursionError, MemoryError):
            line = ast.unparse(statement)
            raise ParameterError("notebook", str(notebook), f"parameters must be bare literals, not {line!r}") from None
    return found


def checked(notebook: str | Path, given: dict[str, Any]) -> dict[str, Any]:
    """`given` in the parameters' own types, checked together with what the notebook's cell says.

    Raises:
        ParameterError: naming the first offending parameter.
    """
    resolved = resolve(merge(parameters(notebook), given)).model_dump()
    return {name: resolved[name] for name in given}


def whole(notebook: str | Path, given: dict[str, Any]) -> dict[str, Any]:
    """What the notebook must be given for a run of params files: of its cell only which run it is about remains.

    Raises:
        ParameterError: naming the first offending parameter.
    """
    cell = parameters(notebook)
    wanted = resolve(merge({name: cell[name] for name in (*PER_RUN, "method") if name in cell}, given)).model_dump()
    there = resolve(merge(cell, {name: wanted[name] for name in given})).model_dump()
    return {name: value for name, value in wanted.items() if name in given or there[name] != value}


def _execute(notebook: Path, output: Path, given: dict, kernel: Any, progress: bool) -> None:
    import papermill

    logging.getLogger("papermill").setLevel(logging.ERROR)  # it warns of parameters that a cell does not list
    stopped: list[int] = []  # signals that came

    def interrupt(number: int, _: object) -> None:
        """Pass it on to the kernel, which has a session of its own, so that the run can end in order."""
        if stopped:  # the second time: at once
            raise KeyboardInterrupt
        stopped.append(number)
        print("interrupted: waiting for the notebook to finish its record", file=sys.stderr, flush=True)
        os.kill(kernel.provisioner.pid, signal.SIGINT)

    def stop_between_cells(**_: Any) -> None:
        if stopped:
            raise KeyboardInterrupt

    how = {"kernel_name": "python3", "km": kernel, "cwd": notebook.parent, "on_cell_start": stop_between_cells}
    how |= {"stdout_file": sys.stdout, "stderr_file": sys.stderr} if progress else {}
    how |= {"progress_bar": False, "coalesce_streams": True}  # else outputs are cut by how fast a cell printed them
    try:
        with answering(interrupt, signal.SIGINT, signal.SIGTERM):
            papermill.execute_notebook(notebook, output, given, **how)
    except papermill.PapermillExecutionError as error:
        raise NotebookFailed(f"cell {error.cell_index + 1}: {error.ename}: {error.evalue}", output) from None
    except KeyboardInterrupt:
        raise NotebookFailed("interrupted", output) from None
    except RuntimeError as error:  # nbclient's DeadKernelError is one
        raise NotebookFailed(f"the kernel died (out of memory?): {error}", output) from None


@contextlib.contextmanager
def _kernel(cwd: Path, folder: Path, progress: bool) -> Iterator[Any]:
    """A kernel that talks over files in `folder`: parallel kernels on TCP race for ports."""
    from jupyter_client import AsyncKernelManager
    from jupyter_core.utils import run_sync

    places = {"ip": str(folder / "ipc"), "connection_file": str(folder / "kernel.json")}
    kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", **places)
    environment = os.environ | {"PYDEVD_DISABLE_FILE_VALIDATION": "1", "LORAKIT_HOME": str(HOME)}
    if progress and environment.get("LORAKIT_PROGRESS") != "none":
        environment["LORAKIT_PROGRESS"] = "plain"  # lines reach the terminal, a notebook's widgets would not
    run_sync(kernel.start_kernel)(cwd=str(cwd), env=environment)
    try:
        yield kernel
    finally:
        run_sync(kernel.shutdown_kernel)(now=True)


def regenerate(notebook: str | Path) -> None:
    """Run `notebook` with its defaults and keep its outputs, nothing that differs from run to run."""
    notebook = Path(notebook)
    with aside(tempfile.gettempdir(), "notebook") as folder:
        executed = run_notebook(notebook, folder / notebook.name, progress=False)
        strip = ["--keep-output", "--keep-count", "--extra-keys", RUN_METADATA]
        subprocess.run([sys.executable, "-m", "nbstripout", *strip, str(executed)], check=True)
        shutil.copyfile(executed, notebook)


def main(argv: list[str] | None = None) -> int:
    """`lorakit run`. Exit status: 0 done, 1 the run that the notebook made did not finish.

    Raises:
        LorakitError: bad input; `NotebookFailed`, whose exit status is 1.
    """
    parser = argparse.ArgumentParser(prog="lorakit run", description="Run a notebook with parameters.")
    parser.add_argument("notebooks", nargs="+", metavar="NOTEBOOK")
    parser.add_argument("-f", dest="files", action="append", default=[], metavar="PARAMS.yaml", help="later files win")
    parser.add_argument("-p", dest="pairs", action="append", default=[], metavar="NAME=VALUE", help="wins over files")
    parser.add_argument("--output", help="the executed notebook (default: NAME.executed.ipynb here)")
    parser.add_argument("--regenerate", action="store_true", help="run the notebooks in place with their defaults")
    arguments = parser.parse_args(argv)
    if arguments.regenerate:
        for notebook in arguments.notebooks:
            print(notebook, flush=True)
            regenerate(notebook)
        return 0
    require(len(arguments.notebooks) == 1, "NOTEBOOK", arguments.notebooks, "must be one notebook")
    params = given_parameters(arguments.files, arguments.pairs)
    own = Path(params.get("model") or os.devnull).expanduser().is_dir() and params["model"] not in ASSETS
    for name in filter(params.get, (*PATHS, *["model"] * own)):
        params[name] = str(Path(params[name]).expanduser().absolute())
    (notebook,) = arguments.notebooks
    if arguments.files:
        params = whole(notebook, params)
    output = Path(arguments.output or f"{Path(notebook).stem}.executed.ipynb").expanduser()
    if output.is_file() and output.stat().st_size:  # as papermill does, but nothing that papermill did not write
        told = "is no executed notebook, and not written over: name another with --output, or move it away"
        require(b'"papermill"' in output.read_bytes(), "--output", str(output), told)
        print(f"{output}: an earlier run's, which this one replaces", file=sys.stderr, flush=True)
    print(f"executed notebook: {run_notebook(notebook, output, params)}")
    if not params.get("record"):
        return 0
    record = records.read(params["record"])
    print(f"record: {params['record']} ({record.status})")
    if record.status not in FINISHED:
        print(f"lorakit run: {record.status}: {record.message}", file=sys.stderr)
    return 0 if record.status in FINISHED else 1
