"""Every number of the results, in README and `docs/`, is one of the records, of their params or of a saved benchmark.

`readme_pages` lists the pages; `readme_records` and `readme_benchmarks` make each table row and each sentence with a
number anew. Whatever digits those do not account for must be in a name or a setting listed here: so a changed number
fails, and a new one until it is backed.
"""

from __future__ import annotations

import functools
import re
import runpy
from collections import Counter
from collections.abc import Mapping

import pytest
import readme_benchmarks
import readme_compare
import readme_examples
import readme_pages
import readme_records
import readme_times
from readme_benchmarks import COMMAND, HOLE, saved
from readme_pages import results

from benchmarks import lora
from lorakit.files import PROJECT, RESULTS

PAGES = readme_pages.read()
NAMES = (
    *("SST-2", "all-MiniLM-L6", "Gemma 3 270M", "Gemma 270M", "GPT-2", "NF4", "`nf4`", "bf16"),
    *(folder.name for folder in RESULTS.iterdir() if folder.is_dir()),
)
SAID = {
    "compare": readme_compare.said,
    "example gates": readme_examples.said,
    "records": readme_records.said,
    "times": readme_times.said,
    **readme_benchmarks.SAID,
}
REWRITTEN = runpy.run_path(str(PROJECT / "scripts" / "readme.py"))["rewritten"]
NUMBER = r"[+−]?\d[\d,.]*(e-\d+)?"


@functools.cache
def said(source: str) -> list[str]:
    """What the pages must say by the records or a benchmark; what was not measured yet is taken from them."""
    texts, here = [], results(PAGES)
    for text in SAID[source]():
        found = re.search(re.escape(text).replace(HOLE, NUMBER), here) if HOLE in text else None
        texts.append(found[0] if found else text)
    return texts


def unbacked(pages: Mapping[str, str]) -> list[str]:
    """Complaints about the pages: what they should say and do not, and numbers in them that nothing backs."""
    left, complaints = results(pages), []
    for piece in sorted({piece for source in SAID for piece in said(source)}, key=len, reverse=True):
        before, found, after = left.partition(piece)
        left = f"{before}·{after}" if found else left
        complaints += [] if found else [f"the pages should say: {piece}"]
    for phrase in sorted(NAMES, key=len, reverse=True):
        left = left.replace(phrase, "·")
    return complaints + [f"nothing backs: {number[0]}" for number in re.finditer(r".{0,60}\d\S*.{0,30}", left)]


def test_every_number_is_backed():
    complaints = unbacked(PAGES)
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize("benchmark", readme_benchmarks.SAID)
def test_a_benchmark_that_a_page_quotes_was_measured(benchmark):
    if saved(benchmark) is None:
        pytest.skip(f"its numbers are not held yet: {COMMAND.format(benchmark)}")
    missing = [piece for piece in said(benchmark) if piece not in results(PAGES)]
    assert not missing, "the pages should say:\n" + "\n".join(missing)


def test_what_was_measured_is_what_the_pages_should_say(monkeypatch):
    numbers = {"step": 0.5, "predicted peak memory": 0.25, "loss gap over 33 steps / 1e-5": 0.75}
    claims = [
        {"name": f"{case.name}: {what}", "ours": 2.04e-7, "ratio": number}
        for case in lora.CASES
        for what, number in numbers.items()
    ]
    monkeypatch.setattr(readme_benchmarks, "saved", lambda _: {"claims": claims})
    _, steps, memory = readme_benchmarks.of_lora()
    assert steps == "a step took 0.50 (MiniLM) and 0.50 (DistilBERT) of PEFT's time"
    assert memory == "and 0.250 of its predicted memory, with losses equal to 2.0e-7."


def test_any_changed_digit_is_seen():
    """One after the other, the last digit of every number that is held, names included, on every page."""
    here, unseen, held = results(PAGES), [], Counter()
    for name, text in PAGES.items():
        for digit in re.finditer(r"\d(?![\d,.]*\d)", text):
            changed = text[: digit.start()] + str((int(digit[0]) + 1) % 10) + text[digit.end() :]
            if results(PAGES | {name: changed}) != here:
                held[name] += 1
                if not unbacked(PAGES | {name: changed}):
                    unseen.append(f"{name}: {text[max(0, digit.start() - 30) : digit.end() + 10]}")
    assert held.total() > 500 and held.keys() == PAGES.keys() and unseen == []


@pytest.mark.parametrize("name", PAGES)
def test_a_new_sentence_with_a_number_is_seen(name):
    title = re.search(r"^#.*\n", PAGES[name], re.M)[0] if name != "README.md" else "## First results\n"
    (complaint,) = unbacked(PAGES | {name: PAGES[name].replace(title, f"{title}\nLoRA saves 37 % of it. ", 1)})
    assert "LoRA saves 37 % of it." in complaint


def test_the_command_writes_the_tables_anew_and_nothing_else():
    assert REWRITTEN(PAGES) == PAGES
    name, tokens = "docs/first_results.md", "docs/tokens.md"
    row = re.search(r"^\| HiRA, rank 8 \|.*\n", PAGES[name], re.M)[0]
    for changed in (row.replace("27.3", "17.3"), "", 2 * row):
        assert REWRITTEN(PAGES | {name: PAGES[name].replace(row, changed)}) == PAGES
    with pytest.raises(ValueError, match="0 tables begin with '| mode"):
        REWRITTEN(PAGES | {tokens: PAGES[tokens].replace("| mode | tokens kept", "| mode | tokens")})
    with pytest.raises(ValueError, match="2 tables begin with"):
        REWRITTEN(PAGES | {name: PAGES[name] + PAGES[tokens]})
