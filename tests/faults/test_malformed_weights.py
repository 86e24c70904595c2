"""Adapter files and checkpoints that are damaged: what loads is what was written, or one error says what is wrong."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import training_runs
from faults import mutations, toy_run
from faults.campaign import WRONG, ended, fault_unless, forked, marks, one_error, run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import trained_tensors

from lorakit.adapters import adapter_state, attach, load_adapter, save_adapter
from lorakit.adapters.packed import unpack
from lorakit.errors import LorakitError

pytestmark = marks
LONGEST = 60

# adapters -------------------------------------------------------------------------------------------

IDS = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(1))
KINDS = {
    "lora": {}, "hira": {}, "sparse": {}, "packed": {}, "head": {}, "full": {}, "peft": {"peft_type": "DORA"},
    "dora": {"peft_type": "DORA"}, "vera": {"peft_type": "VERA"}, "lora alpha": {"alpha": 5.0, "rslora": True},
}  # fmt: skip
BASES = {"bert": training_runs.tiny_bert, "gemma": training_runs.tiny_gemma}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def saved(kind: str, base: str, folder: Path) -> torch.Tensor:
    """A trained adapter's files in `folder`, and what its model says."""
    method = {"packed": "sparse", "dora": "peft", "vera": "peft", "lora alpha": "lora"}.get(kind, kind)
    targets = {} if method in ("head", "full") else {"rank": 4}
    model = attach(BASES[base](), method, seed=0, **targets | KINDS[kind])
    torch.manual_seed(5)
    with torch.no_grad():
        for tensor in trained_tensors(model).values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn_like(tensor))
                tensor[torch.rand_like(tensor.float()) < 0.5 * (kind == "packed")] = 0
    save_adapter(model, folder, packed=kind == "packed")
    return logits(model)


def changed(tensors: dict[str, torch.Tensor], rng: random.Random) -> dict[str, torch.Tensor]:
    """Tensors of which something is not as it was."""
    name, other = rng.choice(sorted(tensors)), rng.choice(sorted(tensors))
    tensor = tensors[name]
    new: Any = rng.choice([
        lambda: {name: tensor[:-1]}, lambda: {name: tensor.T if tensor.ndim == 2 else tensor[None]},
        lambda: {name: tensor.to(rng.choice([torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int8]))},
        lambda: {name: tensor.float() * float("nan")}, lambda: {name: tensors[other], other: tensor},
        lambda: {name + ".x": tensor}, lambda: {mutations.misspelt(name, rng): tensor}, lambda: {name: tensor[:0]},
        lambda: {name: torch.full_like(tensor, 3)}, lambda: {name: tensor.flatten()}, lambda: {name: torch.zeros(())},
    ])()  # fmt: skip
    kept = {key: value for key, value in tensors.items() if key != name or rng.random() < 0.5}
    return {key: value.contiguous().clone() for key, value in (kept | new).items()}


def damage(folder: Path, rng: random.Random) -> str:
    """Do something to an adapter's files; what."""
    path = rng.choice(sorted(folder.iterdir()))
    how = rng.choice(["bytes", "bytes", "values", "values", "values", "gone", "folder", "emptied", "pickled"])
    if how == "gone":
        path.unlink()
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "emptied":
        path.write_bytes(rng.choice([b"", b"{}", b"[]", b"null", b"\x80\x02."]))
    elif how == "values" and path.suffix == ".json":
        value, how = mutations.exchanged(json.loads(path.read_text()), rng)
        path.write_bytes(json.dumps(value).encode("utf-8", "surrogatepass"))
    elif how == "values":
        with safe_open(path, "pt") as file:
            kept = (file.metadata() or None) if rng.random() < 0.3 else None
        save_file(changed(load_file(path), rng), path, metadata=kept)
        how = "tensors"
    elif how == "pickled" and (folder / "adapter_model.safetensors").is_file():
        (folder / "adapter_model.safetensors").unlink()
        tensors = rng.choice([{"a": 1}, [1], {"base_model.model.x": torch.zeros(2)}, "text"])
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        path.write_bytes(rng.choice(mutations.BYTES)(path.read_bytes(), rng))
    return f"{path.name}: {how}"


def theirs(base: str, folder: Path) -> torch.Tensor | None:
    """What PEFT makes of the folder; None where it cannot."""
    from peft import PeftModel

    try:
        return logits(PeftModel.from_pretrained(BASES[base](), folder))
    except Exception:
        return None


MADE: dict[tuple[str, str], tuple[Path, torch.Tensor]] = {}


def adapters_case(rng: random.Random, folder: Path) -> str:
    kind, base = rng.choice(sorted(KINDS)), rng.choice(sorted(BASES))
    if kind == "head" and base == "gemma":
        base = "bert"
    if (kind, base) not in MADE:
        place = folder.parent / f"made-{kind}-{base}".replace(" ", "-")
        MADE[kind, base] = place, saved(kind, base, place)
    place, wanted = MADE[kind, base]
    shutil.copytree(place, folder / "adapter")
    what = damage(folder / "adapter", rng)
    model, before = BASES[base](), logits(BASES[base]())
    try:
        loaded = load_adapter(model, folder / "adapter")
    except LorakitError as error:
        one_error(str(error))
        fault_unless(str(folder) in str(error), kind, what, "does not name the folder", error)
        fault_unless(torch.equal(logits(model), before), kind, what, "the model is not as it was")
        fault_unless(not hasattr(model, "lorakit_attachment"), kind, what, "something is attached")
        return f"{kind} refused"
    found = logits(loaded)
    if torch.equal(found, wanted):
        return f"{kind} the same"
    own = next((folder / "adapter").glob("lorakit_*.safetensors"), None)
    if own is not None:  # lorakit's alone: what it holds is what is there
        state, stored = adapter_state(loaded), load_file(own)
        if kind == "packed" and what.startswith("adapter_config.json"):  # without a digest: one may edit it
            with safe_open(own, "pt") as file:
                save_file(unpack(stored, file.metadata()), folder / "adapter" / "adapter_model.safetensors")
            with_peft = theirs(base, folder / "adapter")
            fault_unless(with_peft is not None, kind, base, what, "loads as something else, and in PEFT not at all")
            close = torch.allclose(found, with_peft, atol=1e-5, rtol=1e-4, equal_nan=True)
            fault_unless(close, kind, base, what, "not as in PEFT")
            return "packed as its config says"
        fault_unless("tensors" in what and kind != "packed", kind, what, "loads as something else than was written")
        fault_unless(all(torch.equal(stored[n].float(), state[n].float()) for n in state), kind, what, "other values")
        return f"{kind} as the file says"
    with_peft = theirs(base, folder / "adapter")
    fault_unless(with_peft is not None, kind, base, what, "loads as something else, and in PEFT not at all")
    close = torch.allclose(found, with_peft, atol=1e-5, rtol=1e-4, equal_nan=True)
    fault_unless(close, kind, base, what, f"{(found - with_peft).abs().max():.3g} from what PEFT loads")
    fault_unless(not what.endswith("bytes") or what.startswith("adapter_config") or kind in ("peft", "dora", "vera"),
                 kind, base, what, "flipped bytes of a file of ours have passed")  # fmt: skip
    return f"{kind} as in PEFT"


# checkpoints ----------------------------------------------------------------------------------------

RUNS: dict[str, tuple[Path, list[str], dict]] = {}
SEEDS = 3  # runs of which damaged copies are resumed


def stopped(rng: random.Random, folder: Path) -> tuple[Path, list[str], dict]:
    """A run that was killed as its fifth checkpoint was about to get its name, and how it should have ended."""
    words = [*toy_run.drawn(rng), "-p", "save_steps=1"]
    folder.mkdir()
    wanted = toy_run.whole(words, folder / "whole", LONGEST)
    place = folder / "killed"
    place.mkdir()

    def at_fifth(event: str, arguments: tuple) -> None:
        if event == "os.rename" and str(arguments[1]).endswith("run/checkpoint-5"):
            os.kill(os.getpid(), signal.SIGKILL)

    def work() -> int:
        sys.addaudithook(at_fifth)
        return toy_run.train(words, place)

    status = ended(forked(work, place / "log"), LONGEST)
    fault_unless(status == -9, "was to be killed", status, (place / "log").read_text())
    return place, words, wanted


def damaged(run_dir: Path, rng: random.Random) -> set[str]:
    """Do something to one checkpoint or to both; the names of those."""
    both = sorted(path.name for path in run_dir.glob("checkpoint-*"))
    chosen = rng.choice([[both[-1]], [both[0]], both, both])
    if rng.random() < 0.1:  # their folders change names
        for old, new in ((both[0], "x"), (both[1], both[0]), ("x", both[1])):
            (run_dir / old).rename(run_dir / new)
        return set()
    for name in chosen:
        path = rng.choice(sorted((run_dir / name).iterdir()))
        how = rng.choice(["bytes", "bytes", "bytes", "bytes", "gone", "swapped", "folder", "value"])
        if how == "gone":
            path.unlink()
        elif how == "folder":
            path.unlink()
            path.mkdir()
        elif how == "swapped":
            other = rng.choice([run_dir / (both[0] if name == both[1] else both[1]), path.parent])
            source = rng.choice(sorted(other.iterdir())) if other == path.parent else other / path.name
            if source.is_file() and source != path:
                shutil.copyfile(source, path)
        elif how == "value" and path.suffix == ".json":
            path.write_text(json.dumps(mutations.exchanged(json.loads(path.read_text()), rng)[0]))
        else:
            path.write_bytes(rng.choice(mutations.BYTES)(path.read_bytes(), rng))
    return set(chosen)


def checkpoints_case(rng: random.Random, folder: Path) -> str:
    from faults.campaign import SEED

    which = str(rng.randrange(SEEDS))
    if which not in RUNS:
        RUNS[which] = stopped(random.Random(f"stopped/{SEED}/{which}"), folder.parent / f"stopped-{which}")
    source, words, wanted = RUNS[which]
    place = folder / "killed"
    shutil.copytree(source, place, symlinks=True)
    names = damaged(place / "run", rng)
    (place / "log").unlink()
    status = ended(forked(lambda: toy_run.train(words, place), place / "log"), LONGEST)
    said = (place / "log").read_text()
    fault_unless(status in (0, 2) and not WRONG.search(said), sorted(names), status, said)
    if status == 2:
        fault_unless(len(names) == 2, "an older one is whole", sorted(names), said)
        fault_unless("checkpoint-" in said and "resume=false" in said, sorted(names), said)
        status = ended(forked(lambda: toy_run.train(words, place, resume="false"), place / "log"), LONGEST)
        fault_unless(status == 0, "resume=false", (place / "log").read_text())
    difference = toy_run.difference(wanted, toy_run.outcome(place))
    fault_unless(not difference, sorted(names), "not as the undisturbed run", difference, words)
    fault_unless(not toy_run.left_over(place), "left over", toy_run.left_over(place))
    return f"{len(names)} damaged, {'refused' if 'resume=false' in said else 'resumed'}"


@pytest.mark.parametrize(("name", "case"), [("adapters", adapters_case), ("checkpoints", checkpoints_case)])
def test_what_is_damaged_is_refused_or_is_what_was_written(tmp_path, name, case):
    import lorakit.analysis.tables
    import lorakit.runs.experiment  # noqa: F401

    run(name, case, tmp_path, 5 * LONGEST)
