"""Any method of PEFT by name: its config, its wrapper around a model, its files, its own schedule."""
