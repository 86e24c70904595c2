"""A checkpoint holds what training changes and nothing else; written aside, it is complete under its name."""

import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerState

from lorakit.errors import CheckpointError, require
from lorakit.files import put_away, settle, sha256
from lorakit.training.state import RunState

WEIGHTS = "trainable.safetensors"
BEST = "best.safetensors"
STATE = "gate.pt"
LEDGER = "ledger.pt"  # of SLoRATrainer, which keeps no run.json
RUN = "run.json"  # a checkpoint without it was cut short, by a lorakit that did not write aside
MARK = ".lorakit"  # a checkpoint without it is somebody else's; it holds the sha256 of every other file
SAVING = ".checkpoint"  # begins the name of the folder that the next checkpoint is written in
TRAINERS = ("optimizer.pt", "scheduler.pt", "trainer_state.json")
REMEDY = "put the file back, or pass resume=false to start over"
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, EOFError, RuntimeError, pickle.UnpicklingError,
              zipfile.BadZipFile, SafetensorError)  # fmt: skip
KEPT = 2  # complete checkpoints of a run


def folder(output_dir: str | Path, step: int) -> Path:
    """Where the Trainer puts the checkpoint of `step`."""
    return Path(output_dir) / f"checkpoint-{step}"


def numbered(output_dir: str | Path) -> list[Path]:
    """Folders named as checkpoints are, oldest step first, whoever wrote them; no files, no links."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir() and not path.is_symlink()]
    named = [path for path in found if re.fullmatch(r"checkpoint-[0-9]+", path.name)]
    return sorted(named, key=lambda path: int(path.name.split("-")[1]))


def ours(output_dir: str | Path) -> list[Path]:
    """lorakit's own checkpoints, whole or not, oldest first."""
    return [path for path in numbered(output_dir) if (path / MARK).is_file() or (path / RUN).is_file()]


def complete(output_dir: str | Path) -> list[Path]:
    """lorakit's own checkpoints that were written to their end, oldest first."""
    return [path for path in numbered(output_dir) if (path / RUN).is_file()]


def intact(output_dir: str | Path, files: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose `files` are whole, and what newer ones lack; None where none was ever completed.

    Raises:
        CheckpointError: there are complete ones, and all of them are damaged.
    """
    told = []
    for path in reversed(ours(output_dir)):
        if not (problem := damage(path, files)):
            return path, told
        told.append(f"{path.name}: {problem}")
    if complete(output_dir):
        raise CheckpointError(f"{output_dir}: no checkpoint is whole: {'; '.join(told)}; {REMEDY}")
    return None, told


def damage(path: str | Path, files: Sequence[str]) -> str:
    """What is wrong with a checkpoint's files, naming the first; empty: nothing."""
    for name in (MARK, *files):
        file = Path(path) / name
        try:
            if name == MARK:
                written = json.loads(file.read_text(encoding="utf-8") or "{}") if file.is_file() else {}
                if not isinstance(written, dict):
                    return f"{name} is damaged: no mapping"
                continue
            if name == BEST and about(path)["curve"]["best_step"] is None:
                continue
            if not file.is_file():
                return f"{name} is missing; without it training would not go on as it would have"
            if written.get(name, told := sha256(file)) != told:
                return f"{name} is damaged: its sha256 is not that of what was written"
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as opened:
                    opened.keys()
            elif file.suffix in (".pt", ".pth"):  # a zip, whose parts have checksums
                with zipfile.ZipFile(file) as opened:
                    if broken := opened.testzip():
                        return f"{name} is damaged: {broken}"
            elif name == RUN:
                _ = [about(path)[part] for part in ("identity", "ledger", "curve", "flops")]
            elif TrainerState.load_from_json(file).global_step < 1:
                return f"{name} is damaged: it says of no step"
        except (*UNREADABLE, OSError) as error:
            return f"{name} is damaged: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """What is read from `path` inside may not be what it should.

    Raises:
        CheckpointError: naming it.
    """
    try:
        yield
    except CheckpointError:
        raise
    except UNREADABLE as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise CheckpointError(f"{path} is damaged, or of another run: {said}; {REMEDY}") from None


def require_room(output_dir: str | Path) -> None:
    """Refuse a folder with checkpoints of somebody else's, which saving might write into.

    Raises:
        ParameterError: naming one.
    """
    own = ours(output_dir)
    for path in numbered(output_dir):
        told = f"holds {path.name}, which lorakit did not write; name another folder"
        require(path in own, "run_dir", str(output_dir), told)


def save_weights(model: torch.nn.Module, path: str | Path) -> None:
    """Write what training changes in `model`; the frozen parameters are the base model's own."""
    Path(path).mkdir(parents=True, exist_ok=True)
    save_file({name: each.detach().cpu().contiguous() for name, each in changed(model).items()}, Path(path) / WEIGHTS)


def changed(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The trained parameters, and the running statistics of batch norms."""
    return {n: t for n, t in [*model.named_parameters(), *model.named_buffers()] if t.requires_grad or "running_" in n}


def load_weights(model: torch.nn.Module, path: str | Path) -> None:
    """Read them back into `model`.

    Raises:
        CheckpointError: names or shapes differ from what `model` trains.
    """
    with reading(file := Path(path) / WEIGHTS):
        stored = load_file(file)
    trained = changed(model)
    if stored.keys() != trained.keys():
        difference = sorted(stored.keys() ^ trained.keys())
        raise CheckpointError(f"{path}: trains other parameters than this run: {', '.join(difference[:4])}")
    for name, parameter in trained.items():
        if parameter.shape != stored[name].shape:
            raise CheckpointError(f"{path}: {name} is {tuple(stored[name].shape)}, here {tuple(parameter.shape)}")
    model.load_state_dict(stored, strict=False)


def save_run(run: RunState, path: Path, output_dir: str | Path) -> None:
    """Write ledger, curve, gate and identity beside what the Trainer saved in `path`; all of it moves to `output_dir`.

    Then the run's complete checkpoints go, but the newest `KEPT`.
    """
    save_seams(run, path)
    if run.curve.best:
        save_file({name: value.cpu().contiguous() for name, value in run.curve.best.items()}, path / BEST)
    counted = {"ledger": run.ledger, "curve": run.curve, "flops": run.meter}
    state = {"identity": run.identity} | {name: part.state_dict() for name, part in counted.items()}
    (path / RUN).write_text(json.dumps(state), encoding="utf-8")
    (path / MARK).write_text(json.dumps({file.name: sha256(file) for file in path.iterdir()}), encoding="utf-8")
    settle(path)
    if (place := Path(output_dir) / path.name).is_dir():  # one of ours, whose folder was given this name
        os.replace(place, path.parent / "replaced")
    os.replace(path, place)
    told = [other for other in complete(output_dir) if not damage(other, [RUN])]
    for other in [other for other in told if not _differences(run, about(other)["identity"])][:-KEPT]:
        os.replace(other, path.parent / other.name)  # half removed it would still look like one


def about(path: str | Path) -> dict[str, Any]:
    """What a checkpoint says of its run: identity (with the code that wrote it), ledger, curve, FLOPs."""
    return json.loads((Path(path) / RUN).read_text(encoding="utf-8"))


def _differences(run: RunState, stored: Mapping[str, Any]) -> list[str]:
    """What a checkpoint of identity `stored` says otherwise than `run`; other code is no other run."""
    expected = json.loads(json.dumps(run.identity))
    names = sorted((stored.keys() | expected.keys()) - {"code"})
    differ = [name for name in names if stored.get(name) != expected.get(name)]
    return [f"{name}={stored.get(name)!r} there, {expected.get(name)!r} here" for name in differ]


def begin(output_dir: str | Path, resumed: str | Path | None, *more: str) -> None:
    """Put away what a run that goes on from `resumed`, or starts over, has not written and a killed one would resume.

    A killed run goes on from the largest number, so an earlier run's, or a damaged one, must not stand there.

    Args:
        more: names of what else an earlier run made.
    """
    old = ours(output_dir)
    places = [path.resolve() for path in old]
    if resumed and Path(resumed).resolve() in places:
        old = old[places.index(Path(resumed).resolve()) + 1 :]
    put_away([*old, *(Path(output_dir) / name for name in more)])


def load_run(run: RunState, path: str | Path) -> None:
    """Restore what `save_run` wrote.

    Raises:
        CheckpointError: the checkpoint belongs to another run.
    """
    path = Path(path)
    with reading(path / RUN):
        state = about(path)
        if differences := _differences(run, state["identity"]):
            told = "choose another run_dir, or pass resume=false to start over"
            raise CheckpointError(f"{path}: checkpoint of another run: {differences[0]}; {told}")
        run.ledger.load_state_dict(state["ledger"])
        run.curve.load_state_dict(state["curve"])
        run.meter.load_state_dict(state["flops"])
    if (path / BEST).is_file():
        with reading(path / BEST):
            run.curve.best = load_file(path / BEST)
    load_seams(run, path)


def save_seams(run: RunState, path: Path) -> None:
    """Write the state of what stands between the trainer and its steps: gate, token selection, controllers."""
    controllers = {controller.name: controller.state_dict() for controller in run.controllers}
    seams = {"gate": run.gate.state_dict(), "tokens": run.tokens.state_dict(), "controllers": controllers}
    torch.save(seams | {"gate_log": run.gate_log.state_dict()}, path / STATE)


def load_seams(run: RunState, path: Path) -> None:
    """Restore what `save_seams` wrote.

    Raises:
        CheckpointError: the checkpoint holds another gate's state.
    """
    with reading(path / STATE):
        seams = torch.load(path / STATE, weights_only=True)
        run.gate.load_state_dict(seams["gate"])
        run.gate_log.load_state_dict(seams["gate_log"])
        run.tokens.load_state_dict(seams["tokens"])
        for controller in run.controllers:
            controller.load_state_dict(seams["controllers"][controller.name])


class Resuming:
    """The part of a Trainer that saves, checks and loads checkpoints as above."""

    remedy = REMEDY

    def require_resumable(self, path: str | Path) -> None:
        """Raise `CheckpointError` where another number of processes wrote it, or a file is missing or damaged."""
        processes = self.accelerator.num_processes
        written = len(list(Path(path).glob("rng_state*.pth")))  # the Trainer's, one of each process
        if written not in (0, processes):  # whose batches were others
            raise CheckpointError(f"{path}: written by {written} process(es), which cannot be resumed by {processes}")
        if problem := damage(path, self.checkpoint_files):
            raise CheckpointError(f"{path}: {problem}; {self.remedy}")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        load_weights(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        load_weights(self.model, self.state.best_model_checkpoint)  # the Trainer would look for whole models

    @property
    def checkpoint_files(self) -> list[str]:
        """What a checkpoint must hold for training to go on bitwise."""
        several, scaler = self.args.world_size > 1, ["scaler.pt"] * self.args.fp16
        draws = [f"rng_state_{rank}.pth" for rank in range(self.args.world_size)] if several else ["rng_state.pth"]
        return [STATE, WEIGHTS, *TRAINERS, *draws, *scaler]

    def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
        with reading(f"{folder}/optimizer.pt or scheduler.pt"):
            super()._load_optimizer_and_scheduler(folder)

    def _load_rng_state(self, folder: str | None) -> None:
        with reading(f"{folder}/rng_state.pth"):
            super()._load_rng_state(folder)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            save_weights(self.model, output_dir)
