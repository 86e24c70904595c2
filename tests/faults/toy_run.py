"""A toy run of a second that saves often, what it leaves, and what of the user's stands in its folder."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from faults.campaign import ended, fault_unless, forked

from lorakit.files import PARAMS

SMALL = {
    **{"budget": 6, "budget_unit": "accepted_steps", "evaluations": 2, "batch_size": 4, "max_train": 48},
    **{"max_validation": 16, "max_test": 8, "latency_repeats": 0, "predict_memory": "false", "rank": 2},
}
SETTINGS = ("toy", "toy-instruct")  # every row of theirs is drawn
GATE = {"gate_burn_in": 2, "gate_m": 64, "gate_k": 4}
TOLD = {  # row -> what it is told beside SMALL, so that its method acts within few steps
    "skip": {"skip_warmup": 0.2, "skip_measure_every": 1}, "slora": GATE, "novelty_loss": GATE, "least_novel": GATE,
    "random": {"gate_burn_in": 2}, "loss_floor": {"gate_burn_in": 2}, "gradient_norm": {"gate_burn_in": 2},
}  # fmt: skip
AGAIN = {"redundancy": 0.5, "redundancy_pool": 16}
VARIANTS = [  # setting, row, what is asked of it that no row of the toys asks
    ("toy", "lora", {"task": "toy-stories"}), ("toy", "full", {"task": "toy-stories"}),  # masked
    ("toy", "qlora", {"task": "toy-stories", "gate": "novelty"} | GATE), ("toy", "head", AGAIN),
    ("toy", "skip", {"skip": "adapter"} | TOLD["skip"]), ("toy", "skip", {"skip_decide": "forward"}),
    ("toy", "skip", {"skip_share": 0.5, "gate": "random"} | TOLD["skip"] | TOLD["random"]),
    ("toy", "sparse", {"sparsify": "l1"}), ("toy", "sparse", {"sparsify": "structured"}),
    ("toy", "sparse", {"sparse_factors": "A", "gate": "novelty"} | GATE), ("toy", "hira", {"quantize": "nf4"}),
    ("toy", "lora", {"optimizer": "adamw_bnb_8bit"}), ("toy", "full", {"optimizer": "adafactor"}),
    ("toy", "lora", {"precision": "bf16", "gradient_checkpointing": "true", "schedule": "cosine"}),
    ("toy", "lora", {"evaluate_first": "true", "redundancy_kind": "near"} | AGAIN),
    ("toy", "lora", {"gate": "novelty", "gate_level": "example", "gate_candidates": 2, "gate_m": 64, "gate_k": 4}),
    ("toy", "lora", {"prefix_cache": "disk", "target_modules": r".*layer\.[23]\..*(lin1|q_lin)", "max_train": 24}),
    ("toy-instruct", "lora", {"gate": "excess_loss", "gate_level": "example", "gate_candidates": 2}),
    ("toy-instruct", "lora", {"method": "head"}), ("toy-instruct", "lora", {"packing": "true", "loss": "dft"}),
    ("toy-instruct", "flora", {"gating.per": "sequence", "gate": "random", "gate_burn_in": 2}),
    ("toy-instruct", "flora", {"quantize": "nf4", "gating.score": "updates", "forgetting": "toy-stories"}),
]  # fmt: skip
PEFT = {  # type -> its options on the toys' layers
    "DORA": {}, "ADALORA": {}, "VERA": {}, "SHIRA": {}, "IA3": {}, "LOHA": {}, "OFT": {"oft_block_size": 4}, "BOFT": {},
    "FOURIERFT": {"n_frequency": 50}, "LN_TUNING": {}, "POLY": {}, "OSF": {}, "PROMPT_TUNING": {}, "PREFIX_TUNING": {},
    "P_TUNING": {"encoder_hidden_size": 16},
}  # fmt: skip
OURS = re.compile(r"\.lock|adapter|model|checkpoint-[1-9][0-9]*|earlier-[0-9]+")  # what may be in a run's folder
MADE = ("adapter", "model")
TIMES = ("started", "seconds", "environment", "latency", "resume")


def rows(setting: str) -> list[str]:
    return sorted(path.stem for path in (PARAMS / setting).glob("[!_]*.yaml"))


def asked(rng: random.Random) -> tuple[str, str, dict[str, Any]]:
    """A row, a variant of one, or a type of PEFT's: setting, row, and what it is told beside `SMALL`."""
    kind = rng.choice(["row", "row", "row", "variant", "peft"])
    if kind == "variant":
        return rng.choice(VARIANTS)
    if kind == "peft":
        name = rng.choice(sorted(PEFT))
        setting = "toy-instruct" if name == "PREFIX_TUNING" else "toy"  # the toy encoder takes no keys from outside
        told = {"method": "peft", "peft_type": name, "peft_options": json.dumps(PEFT[name])}
        return setting, "lora", told | {"rank": 8}  # the default, which a type without a rank allows
    setting, row = rng.choice([(setting, row) for setting in SETTINGS for row in rows(setting)])
    return setting, row, TOLD.get(row, {})


def drawn(rng: random.Random, among: Sequence[str] = ()) -> list[str]:
    """Words for `lorakit train`: anything that can be `asked`, or one of the rows `among`; a few parameters too."""
    if among:
        row = rng.choice(among)
        setting, told = "toy" if row in rows("toy") else "toy-instruct", TOLD.get(row, {})
    else:
        setting, row, told = asked(rng)
    values = SMALL | {"save_steps": rng.choice([1, 1, 2, 3]), "seed": rng.randrange(4)}
    values["gradient_accumulation"] = rng.choice([1, 1, 2])
    method = told.get("method", row)
    values["dropout"] = rng.choice([0.0, 0.1]) if method not in ("head", "full", "peft") else 0.0
    if row not in ("sparse", "full") and setting == "toy" and rng.random() < 0.3:
        values["select"] = "best"
    values["group_by_length"] = rng.choice(["true", "false"])
    words = ["train", "-f", f"params/{setting}/_setting.yaml", "-f", f"params/{setting}/{row}.yaml"]
    return [*words, *(word for name, value in (values | told).items() for word in ("-p", f"{name}={value}"))]


def train(words: list[str], place: Path, **more: object) -> int:
    """`lorakit train` in this process; its folder and record are in `place`."""
    from lorakit import cli
    from lorakit.files import PROJECT

    os.chdir(PROJECT)
    given = {"run_dir": place / "run", "record": place / "record.json"} | more
    return cli.main([*words, *(word for name, value in given.items() for word in ("-p", f"{name}={value}"))])


def whole(words: list[str], place: Path, seconds: float) -> dict[str, Any]:
    """What a run that nobody disturbs ends with."""
    place.mkdir()
    status = ended(forked(lambda: train(words, place), place / "log"), seconds)
    fault_unless(status == 0, f"the undisturbed run ended with {status}", (place / "log").read_text())
    return outcome(place)


def outcome(place: Path) -> dict[str, Any]:
    """A finished run's weights, as the hashes of files, and its records' numbers but for times."""
    beside = sorted(place.glob("run/*/record.json"))
    told = {path.parent.name: path for path in beside if path.parent.name in MADE} | {"": place / "record.json"}
    records = {name: timeless(json.loads(path.read_text())) for name, path in told.items()}
    return {"files": hashes(place), "records": records}


def hashes(place: Path) -> dict[str, str]:
    """sha256 by name of the files a run leaves for use."""
    return {
        str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest()
        for name in MADE
        for path in sorted((place / "run" / name).rglob("*"))
        if path.is_file() and path.name not in ("users.md", "record.json") and not is_temporary(str(path))
    }


def timeless(value: Any) -> Any:
    """A record without what a clock said, and without whether and where it was resumed."""
    if isinstance(value, dict):
        kept = {name: item for name, item in value.items() if name not in TIMES}
        return {name: timeless(item) for name, item in kept.items()}
    if isinstance(value, list):
        return [timeless(item) for item in value if not str(item).startswith(("resumed at step", "put away"))]
    return value


def difference(first: dict[str, Any], second: dict[str, Any], path: str = "") -> str:
    """Where two outcomes differ first; empty where they are the same."""
    if isinstance(first, dict) and isinstance(second, dict):
        for name in [*first, *(name for name in second if name not in first)]:
            if found := difference(first.get(name, "absent"), second.get(name, "absent"), f"{path}/{name}"):
                return found
        return ""
    if isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        return next(
            (d for i, pair in enumerate(zip(first, second, strict=True)) if (d := difference(*pair, f"{path}/{i}"))), ""
        )
    return "" if first == second and type(first) is type(second) else f"{path}: {first!r} or {second!r}"[:600]


# what is the user's ---------------------------------------------------------------------------------


def put_users(place: Path, rng: random.Random) -> dict[str, bytes]:
    """Put some of the user's files and links where the run works; gives what `users` must find afterwards."""
    folder = place / "run"
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "model.bin").write_bytes(rng.randbytes(100))
    choices = {
        "notes.txt": b"mine", ".hidden": b"", "checkpoint-best.txt": b"x", "checkpoint-7b/weights.pt": b"theirs",
        "my-checkpoint-5/run.json": b"{}", "earlier-1/mine.txt": b"kept", "adapter/users.md": b"a card",
        "checkpoint-500.zip": b"PK", ".adapter.lorakit-mine": b"named alike", ".checkpoint.lorakit-mine/x": b"so is it",
    }  # fmt: skip
    for name in rng.sample(sorted(choices), rng.randint(0, len(choices))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(choices[name])
    for name in rng.sample(["checkpoint-best", "latest", "checkpoint-501"], rng.randint(0, 3)):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(elsewhere)
    return users(place)


def users(place: Path) -> dict[str, bytes]:
    """What the user put into the run's folder, links by where they lead; a file in adapter/ moves with the adapter."""
    found = {}
    for path in sorted((place / "run").rglob("*")):
        name = str(path.relative_to(place / "run"))
        if path.is_symlink():
            found[name] = os.readlink(path).encode()
        elif path.is_file() and path.name == "users.md":
            found["users.md"] = path.read_bytes()
        elif path.name == "mine.txt" or path.is_file() and not is_temporary(name) and not in_ours(name):
            found[name] = path.read_bytes()
    return found | {path.name: path.read_bytes() for path in sorted((place / "elsewhere").glob("*"))}


def in_ours(name: str) -> bool:
    """Is it in a folder that a run makes, or its lock?"""
    return bool(OURS.fullmatch(name.split("/")[0]))


def is_temporary(name: str) -> bool:
    """Is it ours, on its way: `lorakit.files.aside`; the user's are called alike."""
    return bool(re.search(r"\.lorakit-(?!mine)|\.mode$", name))


def left_over(place: Path) -> list[str]:
    """Temporary files of ours that are still there."""
    return [name for path in place.rglob("*") if is_temporary(name := str(path.relative_to(place)))]
