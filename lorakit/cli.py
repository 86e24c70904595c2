"""`lorakit COMMAND …`: each command lives beside what it commands and is imported only when called."""

from __future__ import annotations

import sys
from importlib import import_module

from lorakit.errors import LorakitError

COMMANDS = {
    "demo": ("lorakit.demo", "the README's run: LoRA against head-only and full fine-tuning, with table and figure"),
    "run": ("lorakit.notebooks", "run a notebook with parameters: lorakit run NOTEBOOK -f params.yaml -p seed=1"),
    "train": ("lorakit.commands", "the same run without a notebook: lorakit train -f params.yaml -p record=out.json"),
    "sweep": ("lorakit.sweep", "every run of a setting that has no finished record: lorakit sweep --setting toy"),
    "search": ("lorakit.commands", "search the learning rate on validation data: lorakit search -f params.yaml"),
    "table": ("lorakit.analysis.tables", "compare records: lorakit table results/… --figure out.png"),
    "report": (
        "lorakit.analysis.report",
        "rows of one setting at equal cost: lorakit report results/… --output report.md",
    ),
    "plan": ("lorakit.measure.plan", "will it fit: lorakit plan MODEL --method lora --batch 4 --seq 2048 --dtype bf16"),
    "fetch": ("lorakit.assets", "download public models and data for offline use: lorakit fetch NAME"),
    "scratch": ("lorakit.scratch", "LoRA from scratch on a small transformer of our own"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    return "usage: lorakit COMMAND …\n\n" + "\n".join(
        f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command. Exit status: 0 done, 1 it failed or was stopped, 2 bad input, 130 Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        print(f"lorakit: {argv[0]!r} is not a command; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module = import_module(COMMANDS[argv[0]][0])
    command = getattr(module, argv[0], None) if COMMANDS[argv[0]][0] == "lorakit.commands" else module.main
    try:
        return command(argv[1:])
    except LorakitError as error:
        print(f"lorakit {argv[0]}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"lorakit {argv[0]}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
