"""Every number of README's results is one of the records, of the params they hold or of a saved benchmark.

`readme_records` and `readme_benchmarks` make each table row and each sentence with a number anew. Whatever digits those
do not account for must be in a name or a setting listed here: so a changed number fails, and a new one until it is
backed.
"""

from __future__ import annotations

import functools
import re
import runpy

import pytest
import readme_benchmarks
import readme_compare
import readme_records
import readme_times
from readme_benchmarks import COMMAND, HOLE, saved

from benchmarks import lora
from lorakit.files import PROJECT, RESULTS

README = (PROJECT / "README.md").read_text(encoding="utf-8")
SECTIONS = (
    *("First results", "Which batches deserve a backward?", "Which tokens deserve a backward?"),
    "What is not true of LoRA",
)
NAMES = (
    *("SST-2", "all-MiniLM-L6", "Gemma 3 270M", "Gemma 270M", "GPT-2", "NF4", "`nf4`", "bf16"),
    *(folder.name for folder in RESULTS.iterdir() if folder.is_dir()),
)
SAID = {
    "compare": readme_compare.said,
    "records": readme_records.said,
    "times": readme_times.said,
    **readme_benchmarks.SAID,
}
REWRITTEN = runpy.run_path(str(PROJECT / "scripts" / "readme.py"))["rewritten"]
NUMBER = r"[+−]?\d[\d,.]*(e-\d+)?"


def results(text: str) -> str:
    """The sections of a README whose numbers are held, in one line."""
    sections = dict(section.split("\n", 1) for section in re.split(r"^## ", text, flags=re.M)[1:])
    return " ".join(" ".join(sections[title] for title in SECTIONS).split())


@functools.cache
def said(source: str) -> list[str]:
    """What README must say by the records or a benchmark; what was not measured yet is taken from README itself."""
    texts, here = [], results(README)
    for text in SAID[source]():
        found = re.search(re.escape(text).replace(HOLE, NUMBER), here) if HOLE in text else None
        texts.append(found[0] if found else text)
    return texts


def unbacked(text: str) -> list[str]:
    """Complaints about a README: what it should say and does not, and numbers in it that nothing backs."""
    left, complaints = results(text), []
    for piece in sorted({piece for source in SAID for piece in said(source)}, key=len, reverse=True):
        before, found, after = left.partition(piece)
        left = f"{before}·{after}" if found else left
        complaints += [] if found else [f"README should say: {piece}"]
    for phrase in sorted(NAMES, key=len, reverse=True):
        left = left.replace(phrase, "·")
    return complaints + [f"nothing backs: {number[0]}" for number in re.finditer(r".{0,60}\d\S*.{0,30}", left)]


def test_every_number_is_backed():
    complaints = unbacked(README)
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize("benchmark", readme_benchmarks.SAID)
def test_a_benchmark_that_readme_quotes_was_measured(benchmark):
    if saved(benchmark) is None:
        pytest.skip(f"its numbers in README are not held yet: {COMMAND.format(benchmark)}")
    missing = [piece for piece in said(benchmark) if piece not in results(README)]
    assert not missing, "README should say:\n" + "\n".join(missing)


def test_what_was_measured_is_what_readme_should_say(monkeypatch):
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
    """One after the other, the last digit of every number in the sections that are held, names included."""
    here, unseen, held = results(README), [], 0
    for digit in re.finditer(r"\d(?![\d,.]*\d)", README):
        changed = README[: digit.start()] + str((int(digit[0]) + 1) % 10) + README[digit.end() :]
        if results(changed) != here:
            held += 1
            if not unbacked(changed):
                unseen.append(README[digit.start() - 30 : digit.end() + 10])
    assert held > 500 and unseen == []


def test_a_new_sentence_with_a_number_is_seen():
    title = f"## {SECTIONS[0]}\n"
    (complaint,) = unbacked(README.replace(title, f"{title}LoRA saves 37 % of it. "))
    assert complaint.startswith("nothing backs: LoRA saves 37 % of it.")


def test_the_command_writes_the_tables_anew_and_nothing_else():
    assert REWRITTEN(README) == README
    row = re.search(r"^\| HiRA, rank 8 \|.*\n", README, re.M)[0]
    for changed in (row.replace("27.3", "17.3"), "", 2 * row):
        assert REWRITTEN(README.replace(row, changed)) == README
    with pytest.raises(ValueError, match="has 0 tables that begin with '| mode"):
        REWRITTEN(README.replace("| mode | tokens kept", "| mode | tokens"))
