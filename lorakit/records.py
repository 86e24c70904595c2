"""One JSON per run: written atomically, versioned, validated on reading."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from lorakit.errors import DataError
from lorakit.files import write_text

SCHEMA_VERSION = 1
Status = Literal["running", "done", "diverged", "out_of_memory", "interrupted", "failed"]


# Metric -> whether higher is better. A task's rows are judged by the first of these that it reports.
METRICS = {
    "f1": True, "accuracy": True, "exact_match": True, "perplexity": False, "pseudo_perplexity": False, "loss": False,
    "masked_perplexity": False, "token_accuracy": True,
}  # fmt: skip


@dataclass(frozen=True)
class Axis:
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


_STEPS = "accepted steps (batches that got a backward pass)"
_SECONDS = "training time (depends on the machine and on what else ran there)"
AXES = {
    "accepted_steps": Axis("accepted_steps", "accepted steps", "accepted steps", title=_STEPS),
    "steps": Axis("step", "steps", "steps"),
    "tokens": Axis("tokens", "tokens seen", "tokens"),
    "tokens_backpropagated": Axis("tokens_backpropagated", "tokens backpropagated", "tokens backpropagated"),
    "flops": Axis("flops", "training compute (FLOPs)", "TFLOPs", 1e12, "{:.3g}", "training compute"),
    "seconds": Axis("seconds", "training time (s)", "seconds", 1, "{:,.1f}", _SECONDS),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Point(_Strict):
    """One place on the curve. Counts are totals since the start; losses are means since the last point."""

    step: int
    accepted_steps: int
    tokens: int  # seen: non-padding input tokens of every candidate batch
    tokens_backpropagated: int
    flops: float
    seconds: float
    learning_rate: float | None = None
    train_loss: float | None = None
    gate_score: float | None = None
    acceptance_rate: float | None = None
    validation: dict[str, float] | None = None  # loss, accuracy, …


class Costs(_Strict):
    """What the run cost, on axes that do not depend on the machine, and on two that do (seconds, measured memory)."""

    steps: int = 0
    accepted_steps: int = 0
    examples: int = 0
    tokens: int = 0
    tokens_backpropagated: int = 0
    flops: float = 0.0
    flops_forward: float = 0.0
    flops_backward: float = 0.0
    flops_gate: float = 0.0  # sketching and comparing, by formula
    steps_without_labels: int = 0  # skipped: nothing to learn from
    seconds: float = 0.0
    peak_memory_bytes: int | None = None  # measured, CUDA only
    predicted_memory: dict[str, int] | None = None  # bytes by kind, and "peak"; a prediction


class Latency(_Strict):
    """Inference on one batch, milliseconds, medians."""

    batch_size: int
    tokens: int
    unmerged_ms: float
    merged_ms: float | None = None


class Parameters(_Strict):
    """Parameter counts after training."""

    trainable: int
    total: int
    nonzero: int  # of the trainable ones
    reduction_factor: float  # total / trainable


class SearchPoint(_Strict):
    """One learning rate tried: the last validation metrics at equal budget."""

    learning_rate: float
    status: Status
    validation: dict[str, float] | None = None


class Record(_Strict):
    """A run as it happened, or a learning-rate search (`kind`)."""

    schema_version: int = SCHEMA_VERSION
    kind: Literal["run", "lr_search"] = "run"
    setting: str
    method: str  # the row's name: `rows.row_of` the parameters
    seed: int
    status: Status
    message: str = ""  # what stopped the run, where it did not end by itself
    started: str = ""  # ISO 8601, UTC
    params: dict[str, Any] = Field(default_factory=dict)  # as given
    resolved: dict[str, Any] = Field(default_factory=dict)  # all of them
    curve: list[Point] = Field(default_factory=list)
    final: dict[str, dict[str, float]] = Field(default_factory=dict)  # "validation", "test" -> metrics
    costs: Costs = Field(default_factory=Costs)
    parameters: Parameters | None = None
    adapter_bytes: int | None = None
    latency: Latency | None = None
    fingerprints: dict[str, Any] = Field(default_factory=dict)  # data: file -> sha256; model; code
    environment: dict[str, Any] = Field(default_factory=dict)
    search: list[SearchPoint] = Field(default_factory=list)
    details: dict[str, Any] = Field(default_factory=dict)  # what only this method has: "sparse", "skip", "weights"
    notes: list[str] = Field(default_factory=list)  # what a reader must know to read the numbers right

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
    path = Path(path)
    try:
        raw = from_json(path.read_bytes())  # in half the time of `json`
        version = raw.get("schema_version")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: not a record: {error}") from None
    if version != SCHEMA_VERSION:
        raise DataError(f"{path}: schema_version={version!r}: this lorakit reads {SCHEMA_VERSION}")
    try:
        return Record.model_validate(raw)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise DataError(f"{path}: field {where}: {error.errors()[0]['msg']}") from None


def read_all(paths: str | Path | Iterable[str | Path], kind: str = "run") -> list[Record]:
    """Records of one kind in files and, recursively, folders; ordered by path."""
    if isinstance(paths, (str, Path)):
        paths = [paths]
    files: list[Path] = []
    for path in map(Path, paths):
        files += sorted(path.rglob("*.json")) if path.is_dir() else [path]
    return [record for record in map(read, files) if record.kind == kind]
