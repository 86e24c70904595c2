"""A model card: what a run's record says of what it trained, for the hub and its readers; what nobody said, named."""

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from scipy.stats import binomtest

from lorakit.assets import ASSETS
from lorakit.params.overview import ALWAYS, KNOBS
from lorakit.records import Record
from lorakit.tasks.toy import grammar, models

TEMPLATE = Path(__file__).parents[1] / "configs" / "model_card.md.jinja"
TAGS = {"classify": "text-classification", "causal": "text-generation", "masked": "fill-mask"}
OURS = (*models.NAMES, grammar.TOY)  # in the repository, under its licence


def card(record: Record | None, base: str, kind: str, library: str, notes: Sequence[str] = ()) -> str:
    """Markdown with the hub's front matter.

    Args:
        record: of the run that trained it, where there is one.
        base: name of the model it was made of; empty: nothing says it.
        kind: "classify", "causal" or "masked"; library: "peft" (an adapter) or "transformers" (a whole model).
        notes: what a reader must know beside the record's notes.
    """
    run, prints = (record.resolved, record.fingerprints) if record else ({}, {})
    source, notes = str(prints.get("data_source", "")), [*dict.fromkeys([*(record.notes if record else ()), *notes])]
    place, name = [*re.split("[ ,]+", source), ""][:2]  # "hub owner/name…", "asset name", or words
    told = {"base_model": hub_name(base), "datasets": [name] if place == "hub" else None, "library_name": library}
    told |= {"license": "mit" if base in OURS else base in ASSETS and ASSETS[base].licence or None}
    told |= {"pipeline_tag": TAGS[kind], "tags": ["lorakit", *filter(None, [run.get("method")])]}
    shown = {"record": record, "base": base, "source": source, "data": name if place == "asset" else source}
    shown |= {"notes": notes, "rows": prints.get("rows", {}), "terms": _terms, "interval": _interval}
    shown["parameters"] = (*ALWAYS[1:], *KNOBS.get(run.get("method", ""), ()), "quantize", "skip", "gate", "seed")
    return str(ModelCard.from_template(ModelCardData(**told), template_path=str(TEMPLATE), **shown))


def hub_name(base: str) -> str | None:
    """What the hub calls the very same weights; None where it has none that lorakit knows."""
    if base in ASSETS:
        return ASSETS[base].hub or None
    named = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", base) and base not in OURS and not Path(base).exists()
    return base if named else None


def _terms(name: str) -> str:
    """Licence of a model or of data."""
    known = "MIT: lorakit's own" if name in OURS else f"not known to lorakit: {name or 'what has no name'}"
    return ASSETS[name].terms if name in ASSETS else known


def _interval(score: str, value: float, rows: int | None) -> str:
    """Wilson's, of a share of rows that are right or wrong each."""
    if score != "accuracy" or not rows:
        return "none"
    low, high = binomtest(round(value * rows), rows).proportion_ci(method="wilson")
    return f"[{low:.4f}, {high:.4f}]"
