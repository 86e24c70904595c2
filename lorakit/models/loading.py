"""Name -> weights with a head for the task; a new head depends on the seed alone."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from lorakit import assets
from lorakit.errors import AssetError, ParameterError, require, retold
from lorakit.models import sources
from lorakit.models.configs import config, family_of, read_config
from lorakit.quiet import quiet
from lorakit.settings import TrainingSettings
from lorakit.tasks.toy import models as toys

KINDS = {"classify": "SequenceClassification", "masked": "MaskedLM", "causal": "CausalLM"}  # AutoModelFor…
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "auto": "auto"}
ATTENTIONS = get_args(TrainingSettings.model_fields["attention"].annotation)
# else transformers asks the hub in a thread of its own to convert a model that has no safetensors
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for a task.

    Args:
        model: in evaluation mode, on the CPU.
        tokenizer: fast, with a padding token.
        source: where it was read from, in words.
        fingerprint: sha256 over the files' hashes, or the hub's commit.
        notes: what a reader must know to read its numbers right.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    source: str
    fingerprint: str
    notes: list[str]


def load(
    name: str, kind: str, *, num_labels: int = 2, classes: Sequence[str] = (), dtype: str = "fp32",
    attention: str = "sdpa", seed: int = 0, base_dropout: bool = True,
) -> LoadedModel:  # fmt: skip
    """Load a model by name (offline asset, toy, local folder, hub id) with the head that `kind` needs.

    Args:
        kind: classify | masked | causal.
        num_labels: classes, for classify; classes: their names, where they have some, in place of their number.
        dtype: of the weights: fp32 | bf16 | auto (the checkpoint's own).
        attention: sdpa | eager | flash_attention_2 (on CUDA, in 16 bits).
        seed: of parameters the checkpoint does not have; torch's global generators stay as they are.
        base_dropout: whether the configuration's rates of dropout hold; else those it names itself are 0.

    Raises:
        ParameterError: a parameter out of range, or a kind this architecture does not have.
        AssetError: the model cannot be had, or its files are damaged or lack layers.
    """
    require(num_labels >= 2, "num_labels", num_labels, "must be at least 2")
    for given, value, known in (("kind", kind, KINDS), ("dtype", dtype, DTYPES), ("attention", attention, ATTENTIONS)):
        require(value in known, given, value, f"must be one of {', '.join(known)}")
    source, tokens = _found(name, kind, download=True)
    labels = {"num_labels": num_labels} if kind == "classify" else {}
    if classes:
        labels = {"id2label": dict(enumerate(classes)), "label2id": {name: n for n, name in enumerate(classes)}}
    said = {} if base_dropout else read_config(source).to_dict()
    labels |= {name: 0.0 for name, value in said.items() if "drop" in name and isinstance(value, float)}
    model, new = _read_weights(source, kind, seed, dtype=DTYPES[dtype], attn_implementation=attention, **labels)
    if hub := getattr(assets.ASSETS.get(name), "hub", ""):  # what an adapter's file says of its base
        model.name_or_path = model.config.name_or_path = hub
    for configuration in (model.config, model.config.get_text_config(), getattr(model, "generation_config", None)):
        if configuration is not None:
            configuration.pad_token_id = tokens.pad_token_id
    notes = list(source.notes)
    if new:
        heads = ", ".join(sorted({key.rsplit(".", 1)[0] for key in new}))
        tied = "; its decoder is tied to the word embeddings" if kind == "masked" else ""
        notes.append(f"new, not pre-trained, initialised from seed {seed}: {heads}{tied}")
    return LoadedModel(model, tokens, source.text, source.fingerprint, notes)


def outline(name: str, kind: str, attention: str = "sdpa") -> PreTrainedModel:
    """The model that `load` would give, on the meta device, without reading weights: what can be refused is, here.

    Raises:
        ParameterError, AssetError: as `load`; an attention that the architecture does not have.
    """
    if name not in assets.ASSETS:  # which are tried, and fetched once there are data
        _found(name, kind)
    return build(config(name), kind, attention=attention)


def build(
    configuration: PreTrainedConfig, kind: str, dtype: str = "fp32", attention: str | None = None
) -> PreTrainedModel:
    """The model of a configuration on the meta device.

    Raises:
        ParameterError: the architecture has no head of this kind, not this attention, or its config.json is broken.
    """
    if getattr(configuration, "pad_token_id", None) is None:
        configuration.pad_token_id = 0  # classifiers look for the last token that is not padding
    auto = getattr(transformers, f"AutoModelFor{KINDS[kind]}")
    there = type(configuration) in auto._model_mapping
    require(there, "kind", kind, f"not there for a {configuration.model_type} model")
    told = f"not there for a {configuration.model_type} model; use 'eager'"
    told += f", or mend {configuration.name_or_path}/config.json" * bool(configuration.name_or_path)
    with retold(sources.ANY_FAILURE, ParameterError, "attention", attention, told), torch.device("meta"):
        return auto.from_config(configuration, dtype=DTYPES[dtype], attn_implementation=attention)


def positions(model: PreTrainedModel) -> int:
    """How many tokens of a row `model` has learned positions for; where it learned none, `sys.maxsize`."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", sys.maxsize)
    named = ("position_embeddings", "embed_positions", "wpe")
    tables = [part for name, part in model.named_modules() if name.endswith(named) and hasattr(part, "num_embeddings")]
    # RoBERTa's begin behind its padding token's, OPT's two are more; an image's are others
    tables = [part for part in tables if part.num_embeddings in (most, most + 2)]
    starts = [0 if part.padding_idx is None else part.padding_idx + 1 for part in tables]
    return most - max(starts) if starts else sys.maxsize


def _found(name: str, kind: str, download: bool = False) -> tuple[sources.Source, PreTrainedTokenizerFast]:
    """Where the model is, and its tokenizer, once both are known to be fit for a model of `kind`."""
    source = sources.resolve(name)
    configuration = read_config(source)
    wanted, found = {"masked": "encoder", "causal": "decoder"}.get(kind), family_of(configuration, name)
    if wanted and found != wanted:
        raise ParameterError("kind", kind, f"needs an {wanted}; model={name!r} is an {found}".replace("an d", "a d"))
    if source.fingerprint is None:
        raise AssetError(f"model={name!r}: the folder has no weights ({' or '.join(sources.WEIGHTS)})")
    source = sources.download(source) if download else source
    tokens, rows = read_tokenizer(source), configuration.get_text_config().vocab_size
    # of special tokens those that are put into texts: Gemma's tokenizer has an image's, its text models have not
    named = {getattr(tokens, f"{name}_token_id") for name in ("bos", "eos", "pad", "cls", "sep", "mask", "unk")}
    spare = {place for place, token in tokens.added_tokens_decoder.items() if token.special} - named
    highest = max({*tokens.get_vocab().values()} - spare)
    if highest >= rows:
        told = f"its tokenizer has token {tokens.convert_ids_to_tokens(highest)!r}, number {highest}"
        raise AssetError(f"model={name!r}: {told}, its embedding {rows} rows: enlarge it (resize_token_embeddings)")
    return source, tokens


def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The model's fast tokenizer, with a padding token (the end-of-text token where it has none of its own).

    Raises:
        AssetError: the model cannot be had, or has no tokenizer, or one without a word.
    """
    return read_tokenizer(sources.resolve(name))


def read_tokenizer(source: sources.Source) -> PreTrainedTokenizerFast:
    """See `tokenizer`."""
    if source.name in toys.NAMES:
        return toys.tokenizer(source.name)
    with sources.explained(source, "its tokenizer cannot be read"), quiet():
        tokens = AutoTokenizer.from_pretrained(source.location, **source.arguments)
        if not tokens.is_fast:
            raise ValueError("it is not a fast tokenizer (tokenizer.json)")
        if {*tokens.get_vocab().values()} <= {*tokens.all_special_ids}:  # of the class alone, without any file
            raise ValueError("it knows no words; tokenizer.json, or the vocabulary it is made from, is missing")
    if tokens.pad_token is None:
        if tokens.eos_token is None:
            raise AssetError(f"model={source.name!r}: its tokenizer has neither a padding nor an end-of-text token")
        tokens.pad_token = tokens.eos_token
    return tokens


def _read_weights(source: sources.Source, kind: str, seed: int, **options: Any) -> tuple[PreTrainedModel, list[str]]:
    """The model in evaluation mode, and the names of parameters its checkpoint does not have."""
    auto, asked = getattr(transformers, f"AutoModelFor{KINDS[kind]}"), source.arguments
    # else it asks the hub for an adapter, offline or not
    asked |= {"adapter_kwargs": {"local_files_only": source.offline, "revision": asked["revision"]}}
    explained = sources.explained(source, f"cannot be loaded as a {kind} model")
    with explained, quiet(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # of new parameters; torch.manual_seed would reseed CUDA too
        model, info = auto.from_pretrained(source.location, output_loading_info=True, **asked, **options)
    new = sorted(info["missing_keys"])
    lost = [key for key in new if key.startswith(f"{model.base_model_prefix}.") and "pooler" not in key]
    if lost:
        raise AssetError(f"model={source.name!r}: the weights lack {len(lost)} parameters of the base, first {lost[0]}")
    return model.eval(), new
