"""Name -> transformers configuration without weights; well-known hub models have packaged dimensions."""

import json
from typing import Any, NamedTuple

from transformers import AutoConfig, PreTrainedConfig

from lorakit import assets
from lorakit.errors import AssetError, ParameterError, require
from lorakit.files import CONFIGS
from lorakit.models import sources

PACKAGED = CONFIGS / "models.json"


class Described(NamedTuple):
    """A configuration and where it came from, in words ("packaged dimensions" when it was not read from the model)."""

    config: PreTrainedConfig
    source: str


def config(name: str) -> PreTrainedConfig:
    """See `describe`."""
    return describe(name).config


def family(name: str) -> str:
    """`encoder` (masked LM) or `decoder` (causal LM); needs no weights.

    Raises:
        AssetError: nothing is known about a model of this name.
        ParameterError: it is neither.
    """
    return family_of(config(name), name)


def describe(name: str) -> Described:
    """Configuration of a model, from its files where they can be had, else packaged; downloads no weights.

    Raises:
        AssetError: the model cannot be had and its dimensions are not packaged.
    """
    packaged: dict[str, dict[str, Any]] = json.loads(PACKAGED.read_text(encoding="utf-8"))
    names = ", ".join(sorted(packaged))
    if name not in assets.ASSETS or assets.path(name):  # assets that are not here yet are not fetched for this
        try:
            source = sources.resolve(name)
        except AssetError as error:
            if name not in packaged:
                raise AssetError(f"{error}; packaged dimensions: {names}") from None
        else:
            return Described(read_config(source), source.text)
    require(name in packaged, "model", name, f"has no configuration; packaged: {names}")
    return Described(AutoConfig.for_model(**packaged[name]), "packaged dimensions")


def read_config(source: sources.Source) -> PreTrainedConfig:
    """Configuration of a model whose files were found."""
    with sources.explained(source, "config.json cannot be read"):
        return AutoConfig.from_pretrained(source.location, **source.arguments)


def family_of(configuration: PreTrainedConfig, name: str = "") -> str:
    """`encoder` or `decoder`, by the heads transformers has for the architecture; `name`: what the model is called."""
    from transformers.models.auto import modeling_auto as auto

    kind = configuration.model_type
    if configuration.is_encoder_decoder:
        raise ParameterError("model", name or kind, f"{kind} is an encoder-decoder; must be an encoder or a decoder")
    if kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "encoder"
    if kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "decoder"
    raise ParameterError("model", name or kind, f"{kind} has neither a masked nor a causal language-modelling head")
