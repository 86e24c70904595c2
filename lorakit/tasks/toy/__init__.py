"""The toy world: a grammar that writes text, a byte tokenizer, and two small models pre-trained on that text."""

import json

from lorakit.files import CONFIGS

WORDS = json.loads((CONFIGS / "toy_words.json").read_text(encoding="utf-8"))  # by grammar and by kind
