"""Write the tables of results, in README and `docs/`, anew from the committed records and saved benchmarks.

    python scripts/readme.py            # writes a page where a row differs
    python scripts/readme.py --check    # says which tables differ, and writes nothing

The pages are those of `tests/readme_pages.py`, the rows those that `tests/test_readme.py` holds them to. Sentences are
written by hand: the test names the number that does not fit any more.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

PROJECT = Path(__file__).parents[1]
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]

import readme_benchmarks as benchmarks  # noqa: E402 (found by the line above)
import readme_compare as compare  # noqa: E402
import readme_examples as examples  # noqa: E402
import readme_pages  # noqa: E402
import readme_records as records  # noqa: E402
import readme_times as times  # noqa: E402

from lorakit.files import write_text  # noqa: E402

# how a table's first line begins -> what makes its rows, in their order
TABLES: dict[str, list[Callable[[], Iterator[str]]]] = {
    "| claim | held against |": [compare.verdicts],
    "| method | test accuracy | beside": [compare.table],
    "| method | test accuracy | validation": [records.first_table],
    "| method | a step |": [times.said],
    "| row | accepted steps | candidates |": [records.batches_table],
    "| row of eight seeds |": [examples.redundant_table],
    "| row of eight seeds, nothing redundant |": [examples.fresh_table],
    "| what the runs were to decide |": [examples.redundant_decided],
    "| what these were to decide |": [examples.fresh_decided],
    "| the exact loss ": [benchmarks.of_loss, benchmarks.of_combined],
    "| row (five seeds each) | learning rate |": [records.exact_table],
    "| held against | difference on test |": [records.exact_verdicts],
    "| row (three seeds each) | steps |": [records.tokens_table],
    "| mode | tokens kept |": [benchmarks.of_tokens],
    "| claim | MiniLM |": [benchmarks.of_hira, benchmarks.of_skip, benchmarks.of_sparse, benchmarks.of_nf4],
    "| claim | measured |": [benchmarks.of_gate],
}


def rewritten(pages: Mapping[str, str]) -> dict[str, str]:
    """`pages` (name -> text) with the rows of every table made anew, the rest as it is.

    Raises:
        ValueError: a table is on none of them, or there twice.
    """
    written = dict(pages)
    for begins, sources in TABLES.items():
        rows = [text for source in sources for text in source() if text.startswith("| ") and text.endswith("|")]
        table = re.compile(rf"^{re.escape(begins)}.*\n\|[-:|]+\n((?:\|.*\n)*)", re.M)
        found = [(name, *match.span(1)) for name, text in written.items() for match in table.finditer(text)]
        if len(found) != 1:
            raise ValueError(f"{', '.join(pages)}: {len(found)} tables begin with {begins!r}, must be one")
        if not any(benchmarks.HOLE in row for row in rows):  # not all is measured
            ((name, start, end),) = found
            written[name] = written[name][:start] + "".join(f"{row}\n" for row in rows) + written[name][end:]
    return written


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where a table differs")
    args = parser.parse_args(argv)
    before = readme_pages.read()
    after = rewritten(before)
    for name, text in before.items():
        new = after[name].splitlines()
        for line in text.splitlines():
            if line not in new:
                print(f"{name} was: {line}")
        if text != after[name] and not args.check:
            write_text(after[name], PROJECT / name)
    return int(args.check and before != after)


if __name__ == "__main__":
    sys.exit(main())
