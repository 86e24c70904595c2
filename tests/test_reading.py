"""YAML, in files and on the command line: what is a number to everybody, and what is refused in one line."""

from __future__ import annotations

import json

import pytest

from lorakit import params
from lorakit.errors import LorakitError

ALIKE = ["1e-3", "1E5", "-1e-3", "1.5e+2", "0", "10", "-7", "0.25", "true", "null", "[1, 2e1]", '{"a": 1e-2}', '"1e-3"']


def by_file(tmp_path, text):
    (tmp_path / "p.yaml").write_text(f"peft_options: {text}\n", encoding="utf-8")
    return params.read_files([tmp_path / "p.yaml"])["peft_options"]


def by_override(_, text):
    return params.parse_override(f"peft_options={text}")[1]


@pytest.mark.parametrize("door", [by_file, by_override])
@pytest.mark.parametrize("text", ALIKE)
def test_a_value_is_what_json_reads(tmp_path, door, text):
    found, expected = door(tmp_path, text), json.loads(text)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize("door", [by_file, by_override])
@pytest.mark.parametrize(("text", "value"), [("2026-01-01", "2026-01-01"), ("0x1F", 31), ("1_000", 1000), ("e3", "e3")])
def test_other_values(tmp_path, door, text, value):
    found = door(tmp_path, text)
    assert found == value and type(found) is type(value)


LAUGHS = "{" + ", ".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else 'x'] * 9)}]" for n in range(9)) + "}"
REFUSED = {
    "010": "not the same number", "[0_1]": "not the same number", "1:30": "not the same number", "0x_": "not the same",
    "{a: 1, a: 2}": "'a' stands there twice", "{a: {b: 1, c: 2, b: 3}}": "'b' stands there twice",
    "[" * 5000 + "]" * 5000: "nested deeper", "[" * 40 + "]" * 40: "nested deeper", LAUGHS: "more than 10000 values",
    "&a [*a]": "nested deeper", "!!python/object/apply:os.getcwd []": "could not determine a constructor",
}  # fmt: skip


@pytest.mark.parametrize("door", [by_file, by_override])
@pytest.mark.parametrize(("text", "why"), REFUSED.items())
def test_what_is_no_value_is_one_line(tmp_path, door, text, why):
    with pytest.raises(LorakitError, match=why) as caught:
        door(tmp_path, text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
