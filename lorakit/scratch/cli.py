"""`lorakit scratch`: LoRA on a pretrained base against LoRA on a random one, as options, a table and a folder."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lorakit.errors import LorakitError, ParameterError, retold
from lorakit.files import require_empty, written
from lorakit.scratch.compare import Comparison, Settings, compare

DESCRIPTION = """Pretrain a small byte-level transformer on toy stories, freeze it, and fine-tune LoRA on toy reviews;
then the same LoRA on the base as it was before pretraining. Prints the validation losses on reviews."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are this package's errors."""

    def error(self, message: str) -> NoReturn:
        raise LorakitError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison.

    Raises:
        LorakitError: bad argument; `DivergedError`, whose exit status is 1.
    """
    parser = Parser("lorakit scratch", description=DESCRIPTION, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, info in Settings.model_fields.items():
        parser.add_argument(f"--{name}", type=type(info.default), default=info.default, help=info.description)
    parser.add_argument("--output", type=Path, help="new or empty folder for weights, adapter, history and figure")
    options = vars(parser.parse_args(argv))
    output = options.pop("output")
    if output:
        require_empty(output, "output")
    result = compare(Settings(**options), lambda line: print(line, file=sys.stderr))
    print(table(result))
    if output:
        refused = retold(OSError, ParameterError, "output", str(output), "cannot be written")
        with refused, written(output, folder=True) as folder:
            save(result, folder)
        print(f"\nwritten to {output}")
    return 0


def table(result: Comparison) -> str:
    """The losses and parameter counts, for a terminal."""
    lines = [f"{'reviews':26s} validation loss (nats per byte)"]
    for name, trainer in {"random base": result.random, "pretrained base": result.pretrained}.items():
        lines.append(f"{name:26s} {trainer.initial_val_loss:.3f}")
        lines.append(f"{'LoRA on ' + name:26s} {trainer.history['val_loss'][-1]:.3f}")
    stats = result.pretrained.model.get_parameter_stats()
    lines += ["", *(f"{name:26s} {stats[name]:,}" for name in ("total", "trainable"))]
    return "\n".join([*lines, f"{'reduction_factor':26s} {stats['reduction_factor']:.1f}"])


def save(result: Comparison, folder: Path) -> None:
    """Write config.json (arguments of LoRATransformer), base and adapter (its state_dict together), history, figure."""
    from safetensors.torch import save_file

    from lorakit.analysis import style

    model = result.pretrained.model
    save_file(model.base_state_dict(), folder / "base.safetensors")
    save_file(model.lora_state_dict(), folder / "adapter.safetensors")
    history = {"settings": result.settings.model_dump(), "pretrain_loss": result.pretrain_loss}
    for name, trainer in {"pretrained": result.pretrained, "random": result.random}.items():
        stats = {"initial_val_loss": trainer.initial_val_loss, "parameters": trainer.model.get_parameter_stats()}
        history[name] = stats | trainer.history
    for name, content in {"config": result.settings.model_arguments(), "history": history}.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    style.save(result.pretrained.plot_training_history(), folder / "history.png")
