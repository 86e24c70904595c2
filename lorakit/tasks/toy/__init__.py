"""The toy world: a grammar that writes text, a byte tokenizer, and two small models pre-trained on that text."""
