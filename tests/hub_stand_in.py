"""A stand-in of the hub's local cache: tiny random models and a few dozen rows, under the hub's names, in its layouts.

`python tests/hub_stand_in.py FOLDER` makes one to try by hand, with HF_HOME=FOLDER and HF_HUB_OFFLINE=1. Files and
columns are called as on the hub, and a snapshot is links to blobs, as `hf download` leaves it. What is random is drawn
from fixed seeds; nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow
import torch
import transformers
from pyarrow import parquet
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.implementations import BertWordPieceTokenizer, ByteLevelBPETokenizer
from tokenizers.models import BPE

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SYLLABLES = ("ba", "den", "fo", "gar", "hi", "jul", "ka", "lim", "mo", "ner", "pol", "ru", "sa", "tem", "vo", "zin")
WORDS = [first + second for first in SYLLABLES for second in SYLLABLES]
GOOD, BAD = ("wonderful", "moving", "funny", "bright"), ("dull", "tired", "clumsy", "bleak")
COMMON = ["a", "and", "film", "is", "of", "story", "the", "user", "was", "<", "br", "/", ">", ",", ".", "?", "=", "1"]


# data ----------------------------------------------------------------------------------------------


def sentence(rng: random.Random, words: int, label: int | None = None) -> str:
    """Words of the stand-in's own, one of them telling the label."""
    told = [] if label is None else [rng.choice((BAD, GOOD)[label])]
    chosen = rng.sample(WORDS, words) + told
    rng.shuffle(chosen)
    return " ".join(chosen)


def sst2(rng: random.Random, split: str) -> list[dict[str, Any]]:
    """Sentences, and in train phrases of them; a blank at the end; the test split's labels are hidden."""
    rows = []
    for number in range({"train": 60, "validation": 24, "test": 8}[split]):
        text = sentence(rng, rng.randint(5, 12), number % 2)
        phrases = [text, " ".join(text.split()[:3])] if split == "train" and number % 4 == 0 else [text]
        rows += [{"sentence": f"{phrase} ", "label": number % 2} for phrase in phrases]
    return [row | {"label": -1 if split == "test" else row["label"], "idx": idx} for idx, row in enumerate(rows)]


def mrpc(rng: random.Random, split: str) -> list[dict[str, Any]]:
    rows = []
    for idx in range({"train": 60, "validation": 20, "test": 20}[split]):
        first = sentence(rng, rng.randint(6, 12))
        second = " ".join(reversed(first.split())) if idx % 2 else sentence(rng, 8)
        rows.append({"sentence1": f"{first} .", "sentence2": f"{second} .", "label": idx % 2, "idx": idx})
    return rows


def imdb(rng: random.Random, split: str) -> list[dict[str, Any]]:
    """Half a split is of one class, then the other; the unsupervised split has none."""
    size = {"train": 60, "test": 24, "unsupervised": 8}[split]
    classes = [-1 if split == "unsupervised" else int(number >= size / 2) for number in range(size)]
    texts = (
        f"{sentence(rng, 20, max(label, 0))}. <br /><br />{sentence(rng, rng.randint(5, 40))}." for label in classes
    )
    return [{"text": text, "label": label} for text, label in zip(texts, classes, strict=True)]


def wikitext(rng: random.Random, split: str) -> list[dict[str, Any]]:
    """A line a row: blank ones, headings of articles and of sections, paragraphs."""
    lines = []
    for _ in range({"train": 40, "validation": 6, "test": 6}[split]):
        lines += ["", f" = {sentence(rng, 2)} = \n", "", f" {sentence(rng, 30)} . \n"]
        lines += ["", f" = = {sentence(rng, 1)} = = \n", "", f" {sentence(rng, 20)} . \n"]
    return [{"text": line} for line in lines]


def tulu(rng: random.Random, split: str) -> list[dict[str, Any]]:
    """One question or two, some with a system's text; the last row is no conversation, as some are on the hub."""
    rows: list[dict[str, Any]] = []
    for number in range(72):
        roles = ["system"] * (number % 5 == 0) + ["user", "assistant"] * (1 + number % 2)
        roles = ["user"] if number == 71 else roles
        messages = [{"content": sentence(rng, rng.randint(4, 12)), "role": role} for role in roles]
        rows.append({"id": f"stand-in_{number}", "messages": messages, "source": "lorakit/stand-in"})
    return rows


GLUE, IMDB, WIKITEXT, TULU = "nyu-mll/glue", "stanfordnlp/imdb", "Salesforce/wikitext", "allenai/tulu-3-sft-mixture"
DATA: dict[tuple[str, str], tuple[Callable, tuple[str, ...], int]] = {  # repository, folder -> rows, splits, files each
    (GLUE, "sst2"): (sst2, ("train", "validation", "test"), 1),
    (GLUE, "mrpc"): (mrpc, ("train", "validation", "test"), 1),
    (IMDB, "plain_text"): (imdb, ("train", "test", "unsupervised"), 1),
    (WIKITEXT, "wikitext-2-raw-v1"): (wikitext, ("train", "validation", "test"), 1),
    (TULU, "data"): (tulu, ("train",), 6),
}


def write_data(folder: Path, repository: str) -> None:
    """All of a repository's Parquet files."""
    for (home, under), (rows_of, splits, files) in DATA.items():
        for split in splits if home == repository else ():
            rows = rows_of(random.Random(f"{under} {split}"), split)
            (folder / under).mkdir(exist_ok=True)
            for number in range(files):
                path = folder / under / f"{split}-{number:05}-of-{files:05}.parquet"
                parquet.write_table(pyarrow.Table.from_pylist(rows[number::files]), path)


# models --------------------------------------------------------------------------------------------


def distilbert(folder: Path) -> None:
    """A masked language model, whose tokenizer knows words and letters."""
    letters = sorted({letter for word in [*WORDS, *GOOD, *BAD, *COMMON] for letter in word})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *[f"##{letter}" for letter in letters]]
    vocabulary = list(dict.fromkeys([*vocabulary, *COMMON, *GOOD, *BAD, *WORDS]))
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=True).save(str(folder / "tokenizer.json"))
    describe_tokenizer(folder, do_lower_case=True, model_max_length=512)
    config = {"dim": 64, "n_layers": 2, "n_heads": 2, "hidden_dim": 128, "vocab_size": len(vocabulary)}
    save(transformers.DistilBertForMaskedLM(transformers.DistilBertConfig(**config)), folder)


def gpt2(folder: Path) -> None:
    """The bare transformer, without a head's name before its layers, and no padding token."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts(), vocab_size=600, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.save_model(str(folder))
    tokenizer.save(str(folder / "tokenizer.json"))
    describe_tokenizer(folder, model_max_length=1024)
    end, size = tokenizer.token_to_id("<|endoftext|>"), tokenizer.get_vocab_size()
    config = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 1024, "vocab_size": size}
    save(transformers.GPT2Model(transformers.GPT2Config(**config, bos_token_id=end, eos_token_id=end)), folder)


GEMMA = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
GEMMA |= {"intermediate_size": 128, "query_pre_attn_scalar": 32, "sliding_window": 16, "max_position_embeddings": 32768}
GEMMA |= {"layer_types": ["sliding_attention", "full_attention"], "pad_token_id": 0, "eos_token_id": 1}


def gemma_1b(folder: Path) -> None:
    """Text only, in bf16."""
    config = transformers.Gemma3TextConfig(**GEMMA, vocab_size=gemma_tokenizer(folder))
    save(transformers.Gemma3ForCausalLM(config).to(torch.bfloat16), folder)


def gemma_12b(folder: Path) -> None:
    """Text and images, as every larger Gemma 3 on the hub, in several files with an index."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14, "vision_use_head": False}
    text = GEMMA | {"vocab_size": gemma_tokenizer(folder)}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    save(transformers.Gemma3ForConditionalGeneration(config).to(torch.bfloat16), folder, max_shard_size="100KB")


def gemma_tokenizer(folder: Path) -> int:
    """Pieces with ▁ for a blank, bytes for what has no piece, and a <bos> in front; the number of tokens."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?=▁)"), "isolated")  # of its training only
    known = [*specials, *[f"<0x{byte:02X}>" for byte in range(256)]]
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=known, show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    pair = {"single": "<bos> $A", "pair": "<bos> $A <bos> $B"}
    tokenizer.post_processor = processors.TemplateProcessing(**pair, special_tokens=[("<bos>", 2)])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    describe_tokenizer(folder, **names, add_bos_token=True, add_eos_token=False, tokenizer_class="GemmaTokenizer")
    return tokenizer.get_vocab_size()


MODELS = {
    "distilbert-base-uncased": distilbert,
    "gpt2": gpt2,
    "google/gemma-3-1b-pt": gemma_1b,
    "google/gemma-3-12b-pt": gemma_12b,
}


def texts() -> Iterable[str]:
    """What the tokenizers learn from."""
    rng = random.Random(0)
    return [f"{sentence(rng, 12, number % 2)} {rng.choice(COMMON)}" for number in range(200)]


def describe_tokenizer(folder: Path, **values: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(values))


def save(model: transformers.PreTrainedModel, folder: Path, **options: Any) -> None:
    model.save_pretrained(folder, **options)


# the cache -----------------------------------------------------------------------------------------


def keep(hub: Path, kind: str, repository: str, write: Callable[[Path], None]) -> None:
    """What `write` leaves in a folder, as the cache keeps a repository: blobs, a snapshot of links to them, a ref."""
    home = hub / f"{kind}s--{repository.replace('/', '--')}"
    for name in ("blobs", "refs"):
        (home / name).mkdir(parents=True)
    (home / "refs" / "main").write_text(COMMIT)
    with tempfile.TemporaryDirectory() as made:
        torch.manual_seed(0)
        write(Path(made))
        for path in sorted(path for path in Path(made).rglob("*") if path.is_file()):
            data = path.read_bytes()
            blob = home / "blobs" / hashlib.sha256(data).hexdigest()
            blob.write_bytes(data)
            link = home / "snapshots" / COMMIT / path.relative_to(made)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(Path(*[".."] * (len(link.relative_to(home).parts) - 1), "blobs", blob.name))


def build(home: Path) -> Path:
    """Make all models and data sets below `home`, a folder for HF_HOME; gives the cache inside."""
    hub = home / "hub"
    for name, write in MODELS.items():
        keep(hub, "model", name, write)
    for repository in dict.fromkeys(repository for repository, _ in DATA):
        keep(hub, "dataset", repository, lambda folder, name=repository: write_data(folder, name))
    return hub


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
