"""What happens to files: bytes flipped and cut, encodings mixed up, and values exchanged for ones of other types."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

ODD = [
    *(None, True, False, 0, 1, -1, 2, 3.0, -0.0, 0.5, 1e-3, 1e308, 1e-320, float("inf"), float("nan"), 2**31, 2**63),
    *(
        10**40,
        "",
        " ",
        "8",
        "1e-3",
        "true",
        "null",
        "lora",
        "LoRA",
        "\u00e9\u4e2d\U0001f600",
        "\u202e",
        "a\nb",
        "x" * 5000,
    ),
    *("../..", "/", "~", "$HOME", "%s", "{}", "\0", [], [1], ["a", "a"], [[]], [None], {}, {"a": 1}, {"a": {"b": []}}),
]


def odd(rng: random.Random) -> Any:
    """A value that is seldom the right one."""
    if rng.random() < 0.1:
        value: Any = rng.choice(ODD)
        for _ in range(rng.choice([2, 20, 60])):
            value = [value] if rng.random() < 0.5 else {"a": value}
        return value
    return rng.choice(ODD)


def misspelt(name: str, rng: random.Random) -> str:
    """`name` with one letter too many, too few or exchanged; or in other letters."""
    at = rng.randrange(len(name))
    forms = [name[:at] + name[at + 1 :], name[:at] + rng.choice("aexz_-. ") + name[at:], name.upper(), name + "s"]
    forms += [name.replace("_", "-"), name.title(), f" {name}", name.replace("a", "\u0430"), name + "\u200b"]
    return rng.choice([form for form in forms if form not in (name, "")] or [name + "x"])


# bytes ----------------------------------------------------------------------------------------------


def flip(data: bytes, rng: random.Random) -> bytes:
    made = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 3, 30]) if data else 0):
        made[rng.randrange(len(made))] ^= 1 << rng.randrange(8)
    return bytes(made)


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice([0, 1, 7, 8, len(data) // 2, rng.randrange(len(data) + 1), max(len(data) - 1, 0)])]


def zeros(data: bytes, rng: random.Random) -> bytes:
    """A hole, as a power cut leaves it."""
    at = rng.randrange(len(data) + 1)
    size = min(rng.choice([1, 8, 512, len(data)]), len(data) - at)
    return data[:at] + bytes(size) + data[at + size :]


def inserted(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    piece = rng.choice(
        [
            b"\0",
            b"\xff",
            b"\xed\xa0\x80",
            b"\r",
            b"\n\n",
            b'"',
            b"\t",
            b"\xef\xbb\xbf",
            b"\x1a",
            b"\xc2\xa0",
            b"{",
            b"]",
            b"'",
        ]
    )
    return data[:at] + piece * rng.choice([1, 1, 1, 5000]) + data[at:]


def repeated(data: bytes, rng: random.Random) -> bytes:
    """A piece stands there twice, or elsewhere."""
    first, last = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[first:last] + data[at:]


def dropped(data: bytes, rng: random.Random) -> bytes:
    first, last = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:first] + data[min(last, first + rng.choice([1, 10, len(data)])) :]


def encoded(data: bytes, rng: random.Random) -> bytes:
    text = data.decode("utf-8", "replace")
    return text.encode(
        rng.choice(["utf-16", "utf-16-le", "latin-1", "cp1252", "utf-32", "utf-8-sig", "utf-7"]), "replace"
    )


BYTES: list[Callable[[bytes, random.Random], bytes]] = [
    flip,
    flip,
    cut,
    cut,
    zeros,
    inserted,
    inserted,
    repeated,
    dropped,
]
TEXT = [*BYTES, encoded]


def lines(data: bytes, rng: random.Random) -> bytes:
    """Something happens to whole lines or to their fields."""
    kept = data.split(b"\n")
    at = rng.randrange(len(kept))
    separator = b"\t" if b"\t" in data else b","
    fields = kept[at].split(separator)
    place = rng.randrange(len(fields))
    fields[place] = rng.choice(
        [b"", b"nan", b"NaN", b"2", b"-1", b"1.0", b"\xc2\xa01", b"true", b"x" * 200_000, b" 1 ", b"\xd9\xa1"]
    )
    choices = [
        [*kept[:at], *kept[at + 1 :]], [*kept[:at], b"", *kept[at:]], [kept[0], *kept], kept[::-1],
        [line.replace(b"\t", b",") for line in kept], [line + b"\r" for line in kept], [b"\r".join(kept)],
        [*kept[:at], separator.join(fields), *kept[at + 1 :]],
        [*kept[:at], kept[at] + separator + rng.choice([b"more", b"1"]), *kept[at + 1 :]],
        [line[:-1] + b"1" if line[-2:-1] in (b"\t", b",") else line for line in kept], kept[:1], kept[1:], kept[:3],
    ]  # fmt: skip
    return b"\n".join(rng.choice(choices))


# values ---------------------------------------------------------------------------------------------


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths of everything inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in inner for found in [(*path, key), *places(item, (*path, key))]]


def exchanged(value: Any, rng: random.Random) -> tuple[Any, str]:
    """A copy of a JSON value with something inside exchanged, gone, added or renamed; and what."""
    value = json.loads(json.dumps(value))
    at = rng.choice(places(value))
    parent = value
    for key in at[:-1]:
        parent = parent[key]
    key, what = at[-1], rng.choice(["exchanged", "exchanged", "exchanged", "gone", "renamed", "added", "near"])
    if what == "gone":
        del parent[key]
    elif what == "renamed" and isinstance(parent, dict):
        parent[misspelt(key, rng)] = parent.pop(key)
    elif what == "added":
        parent.append(odd(rng)) if isinstance(parent, list) else parent.update({misspelt(str(key), rng): odd(rng)})
    elif what == "near" and isinstance(parent[key], (int, float)) and not isinstance(parent[key], bool):
        parent[key] = rng.choice([parent[key] + 1, -parent[key], parent[key] * 2, float(parent[key]), str(parent[key])])
    else:
        parent[key] = odd(rng)
    return value, f"{'.'.join(map(str, at))} {what}"
