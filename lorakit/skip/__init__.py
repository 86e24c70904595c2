"""Which layers get a backward: SkipLoRA."""
