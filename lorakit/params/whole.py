"""All parameters of a run in one object: what does not go together, a rate for who gives none, the name they make."""

import json
from operator import attrgetter
from typing import Any

from lorakit import settings as s
from lorakit.errors import ParameterError
from lorakit.fields import Settings
from lorakit.files import CONFIGS

TOLD = json.loads((CONFIGS / "params.json").read_text(encoding="utf-8"))

# what lorakit trains; a params file may be called after it
METHODS = ("lora", "sparse", "hira", "peft", "head", "full")
NESTED = {"gating": s.Gating}  # parameters that are mappings with keys of their own, merged key by key
# the learning rate of who runs another model or task than toy's and gives none, by method: (rate, source)
RATES: dict[str, tuple[float, str]] = TOLD["rates"]
PER_RUN = ("setting", "row", "seed", "record", "run_dir")  # a run's own, in no params file of a setting


class Params(
    s.SearchSettings, s.EvaluationSettings, s.TrainingSettings, s.TokenSettings, s.GateSettings, s.SkipSettings,
    s.SparseSettings, s.AttachSettings, s.AdapterSettings, s.BaseSettings, s.DataSettings, s.RunSettings,
):  # fmt: skip
    """What a run is told. Notebooks, params files and the command line all speak these names."""


GROUPS: tuple[type[Settings], ...] = tuple(reversed(Params.__bases__))
QUESTIONS = {name: group.question for group in GROUPS for name in group.model_fields}


def check(params: Params) -> None:
    """Refuse what does not go together; each class of `lorakit.settings` says what that is.

    Raises:
        ParameterError: naming the parameter that would have to change.
    """
    changed = params.model_dump(exclude_defaults=True)  # a notebook may name every default
    for group in GROUPS:
        for refusal in group.refuses:
            if refusal.when(params):
                raise ParameterError(refusal.parameter, attrgetter(refusal.parameter)(params), refusal.why)
        group.require_meant(params, changed)
    for name, group in NESTED.items():
        group.require_meant(getattr(params, name), changed.get(name, ()), f"{name}.")


def known(values: dict[str, Any], name: str) -> Any:
    """The value of a parameter, or its default."""
    return values.get(name, Params.model_fields[name].default)


def is_toy(values: dict[str, Any]) -> bool:
    """Whether model and task are toys, whose learning rate is the parameters' default."""
    return all(str(known(values, name)).startswith("toy-") for name in ("model", "task"))


def rated(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with the method's stated learning rate, where they have none and are not about toys."""
    if "learning_rate" in values or is_toy(values):
        return dict(values)
    return values | {"learning_rate": RATES.get(str(known(values, "method")), RATES["lora"])[0]}


def rate_note(params: Params) -> str | None:
    """What the record of a run says of a learning rate that no search and no source stands behind."""
    return None if params.learning_rate_from or is_toy(dict(params)) else "learning rate not searched"


def method_of(row: str) -> dict[str, Any]:
    """What a params file's name says about the method: its own, where it is called after one; else LoRA's default."""
    return {"method": row} if row in METHODS else {}


def row_of(params: Params) -> str:
    """The run's name in tables and figures: `params.row`, or one made from what is switched on.

    LoRA on an NF4 base is "qlora", with skipped layers "skip", with a novelty gate "slora"; other combinations are
    joined by "+". Chosen tokens make it "flora", or "random_tokens".
    """
    if params.row:
        return params.row
    base = params.peft_type.lower() if params.method == "peft" else params.method
    extras = [name for name, on in (("nf4", params.quantize != "none"), ("skip", params.skip != "none")) if on]
    if params.gate != "none":
        extras.append("slora" if params.gate == "novelty" else params.gate)
    if params.gating.method != "baseline":
        extras.append("flora" if params.gating.method == "flora" else "random_tokens")
    if base == "lora" and len(extras) == 1:
        return "qlora" if extras == ["nf4"] else extras[0]
    return "+".join([base, *extras])


def notebook_of(params: Params) -> str:
    """The notebook that tells the story of this combination: of its most particular answer."""
    if params.gating.method != "baseline" or "-tokens" in params.setting:
        return "08_flora.ipynb"
    if params.gate != "none" or params.redundancy or params.setting.endswith("-gates"):  # their ungated rows too
        return "07_slora.ipynb"
    if params.skip != "none":
        return "05_skiplora.ipynb"
    if params.quantize != "none":
        return "04_qlora.ipynb"
    return {"sparse": "02_sparse_lora.ipynb", "hira": "03_hira.ipynb"}.get(params.method, "01_lora.ipynb")
