"""One JSON per run: written atomically, versioned, validated on reading."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from lorakit.errors import DataError, retold
from lorakit.files import CONFIGS, PROJECT, RESULTS, write_text

SCHEMA_VERSION = 1
# files beside which no record lies: a checkpoint's, an adapter's, a model's
BESIDE = "record.json"  # a run's own, in the folder of what it trained
TRAINED = ("trainer_state.json", "run.json", "adapter_config.json", "lorakit_config.json", "config.json")
Status = Literal["running", "done", "diverged", "out_of_memory", "interrupted", "failed"]


MEASURES = json.loads((CONFIGS / "measures.json").read_text(encoding="utf-8"))
# Metric -> whether higher is better. A task's rows are judged by the first of these that it reports.
METRICS: dict[str, bool] = MEASURES["metrics"]


class Axis(NamedTuple):
    """What a run spends, to be drawn and compared against.

    Attributes:
        field: of a `Point`.
        label: with its unit, on a figure.
        unit: heading of a table's column; `form` writes a number there after a division by `size`.
        title: in a report's headings, as far as it is not `label`.
    """

    field: str
    label: str
    unit: str
    size: float = 1
    form: str = "{:,.0f}"
    title: str = ""


AXES = {name: Axis(**told) for name, told in MEASURES["axes"].items()}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


Count = Annotated[int, Field(ge=0, lt=2**63)]
Amount = Annotated[float, Field(ge=0)]


class Point(_Strict):
    """One place on the curve. Counts are totals since the start; losses are means since the last point."""

    step: Count
    accepted_steps: Count
    tokens: Count  # seen: non-padding input tokens of every candidate batch
    tokens_backpropagated: Count
    flops: Amount
    seconds: Amount
    learning_rate: float | None = None
    train_loss: float | None = None
    gate_score: float | None = None
    acceptance_rate: float | None = None
    validation: dict[str, float] | None = None  # loss, accuracy, …


class Spent(_Strict):
    """Totals since the start of a run. A step is accepted when any of its batches got a backward."""

    steps: Count = 0
    accepted_steps: Count = 0
    examples: Count = 0
    tokens: Count = 0
    tokens_backpropagated: Count = 0
    flops_forward: Amount = 0.0
    flops_backward: Amount = 0.0
    flops_gate: Amount = 0.0  # sketching and comparing, by formula
    steps_without_labels: Count = 0  # skipped: nothing to learn from
    seconds: Amount = 0.0


class Costs(Spent):
    """What the run cost, on axes that do not depend on the machine, and on two that do (seconds, measured memory)."""

    flops: Amount = 0.0
    peak_memory_bytes: Count | None = None  # measured, CUDA only
    predicted_memory: dict[str, Count] | None = None  # bytes by kind, and "peak"; a prediction


class Latency(_Strict):
    """Inference on one batch, milliseconds, medians."""

    batch_size: Count
    tokens: Count
    unmerged_ms: Amount
    merged_ms: Amount | None = None


class Parameters(_Strict):
    """Parameter counts after training."""

    trainable: Count
    total: Count
    nonzero: Count  # of the trainable ones
    reduction_factor: Amount  # total / trainable


class _Shape(BaseModel):
    """What readers of every record ask for, as far as it is there; strict, as they get the values as they are."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


class _Logged(_Shape):
    __pydantic_extra__: dict[str, float | None]
    step: Count


class _Gate(_Shape):
    name: str = ""
    target_rate: float | None = None
    acceptance_rate: float | None = None
    burn_in: int = 0
    warnings: list[str] = []
    log: list[_Logged] = []


class _Gating(_Shape):
    method: str
    mode: str
    topk_tokens: float


class _Tokens(_Shape):
    gating: _Gating | None = None


class _Asked(_Tokens):
    method: str = ""
    model: str = ""
    task: str = ""
    label: str = ""
    gate: str = ""
    schedule: str = ""
    budget_unit: str = ""
    budget: float = 0
    learning_rate: float = 0
    redundancy: float = 0
    gate_rate: float = 0
    differs: dict[str, str] = {}


class _Details(_Shape):
    gate: _Gate = _Gate()
    tokens: _Tokens = _Tokens()
    skip: dict[str, Any] = {}
    sparsity: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    timing: dict[str, Any] = {}


class _Fingerprints(_Shape):
    data: dict[str, str] = {}
    model: str | None = None
    code: str | None = None
    rows: dict[str, Count] = {}


class _Environment(_Shape):
    versions: dict[str, str | None] = {}
    cpu: str | None = None
    device: str | None = None


def _shaped(shape: type[_Shape]) -> AfterValidator:
    """The mapping as it is, once it has been seen to be a `shape`."""

    def check(value: dict[str, Any]) -> dict[str, Any]:
        try:
            shape.model_validate(value)
        except ValidationError as error:
            raise ValueError(f"{'.'.join(map(str, error.errors()[0]['loc']))}: {error.errors()[0]['msg']}") from None
        return value

    return AfterValidator(check)


class SearchPoint(_Strict):
    """One learning rate tried: the last validation metrics at equal budget."""

    learning_rate: float
    status: Status
    validation: dict[str, float] | None = None


class Record(_Strict):
    """A run as it happened, a learning-rate search, or what its steps take beside other rows' (`kind`)."""

    schema_version: int = SCHEMA_VERSION
    kind: Literal["run", "lr_search", "timing"] = "run"
    setting: str
    method: str  # the row's name: `params.row_of`
    seed: int
    status: Status
    message: str = ""  # what stopped the run, where it did not end by itself
    started: str = ""  # ISO 8601, UTC
    params: dict[str, Any] = {}  # as given
    resolved: Annotated[dict[str, Any], _shaped(_Asked)] = {}  # all of them
    curve: list[Point] = []
    final: dict[str, dict[str, float]] = {}  # "validation", "test" -> metrics
    costs: Costs = Costs()
    parameters: Parameters | None = None
    adapter_bytes: Count | None = None
    latency: Latency | None = None
    # data: file -> sha256; rows by split; model; code
    fingerprints: Annotated[dict[str, Any], _shaped(_Fingerprints)] = {}
    environment: Annotated[dict[str, Any], _shaped(_Environment)] = {}
    search: list[SearchPoint] = []
    details: Annotated[dict[str, Any], _shaped(_Details)] = {}  # what only this method has
    notes: list[str] = []  # what a reader must know to read the numbers right

    @property
    def row(self) -> str:
        """The line of a table this run belongs to."""
        return self.method


def write(record: Record, path: str | Path) -> Path:
    """Write `record` to `path` whole or not at all."""
    return write_text(json.dumps(_finite(record.model_dump()), indent=1) + "\n", path)


def _finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON does not have, by null."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {key: cleaned for key, item in value.items() if (cleaned := _finite(item)) is not None or item is None}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value


def read(path: str | Path) -> Record:
    """Read and validate one record.

    Raises:
        DataError: the file is missing, is not JSON, or does not follow this schema version.
    """
    path = Path(os.path.expanduser(path))
    with retold((OSError, ValueError, AttributeError), DataError, f"{path}: not a record"):
        raw = from_json(path.read_bytes())  # in half the time of `json`
        version = raw.get("schema_version")
    if version != SCHEMA_VERSION:
        raise DataError(f"{path}: schema_version={version!r}: this lorakit reads {SCHEMA_VERSION}")
    try:
        return Record.model_validate(raw)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise DataError(f"{path}: field {where}: {error.errors()[0]['msg']}") from None


def read_all(paths: str | Path | Iterable[str | Path], kind: str = "run") -> list[Record]:
    """Records of one kind in files and, recursively, folders; ordered by path.

    What lies in the folder of a checkpoint (JupyterLab's, too), an adapter or a model is none. What `RESULTS` lacks is
    read from what the package brings.
    """
    if isinstance(paths, (str, Path)):
        paths = [paths]
    files: list[Path] = []
    for path in (Path(os.path.expanduser(path)) for path in paths):
        if not os.path.exists(path) and path.absolute().is_relative_to(RESULTS):
            path = PROJECT / "results" / path.absolute().relative_to(RESULTS)
        found = sorted(path.rglob("*.json")) if os.path.isdir(path) else [path]
        others = {file.parent for file in found if file.name in TRAINED and file != path}
        files += [one for one in found if others.isdisjoint(one.parents) and ".ipynb_checkpoints" not in one.parts]
    return [record for record in map(read, files) if record.kind == kind]
