"""A name becomes a model and its tokenizer: offline asset, toy, local folder or hub id."""

from lorakit.models.configs import config, describe, family
from lorakit.models.loading import LoadedModel, load, outline, positions, tokenizer
