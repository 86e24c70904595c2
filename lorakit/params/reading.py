"""YAML as everybody reads it: 1e-3 is a number, 010 is no 8, a key stands once, and no text becomes a mountain."""

import re
from typing import Any

import yaml

DEEPEST, LARGEST = 32, 10_000  # of what parameters are made of: levels, and values in all, aliases counted each time
SCIENTIFIC = re.compile(r"[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+")
# octal or sexagesimal in YAML 1.1 only, or nothing
UNCLEAR = re.compile(r"[-+]?(0[\d_]+|\d[\d_]*(:[0-5]?\d)+|0[xb]_*)")


class Loader(yaml.SafeLoader):
    """YAML 1.1, but for its dates (which are text) and what is read above."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands there twice", key.start_mark)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if UNCLEAR.fullmatch(node.value):
            told = f"{node.value!r} is not the same number to everybody: write it without 0 in front, or in quotes"
            raise yaml.constructor.ConstructorError(None, None, told, node.start_mark)
        return super().construct_yaml_int(node)


Loader.add_implicit_resolver("tag:yaml.org,2002:float", SCIENTIFIC, list("-+0123456789"))
Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
Loader.add_constructor("tag:yaml.org,2002:timestamp", Loader.construct_yaml_str)


def read(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: it is none, in one line; or it is nested deeper than `DEEPEST`, or larger than `LARGEST`.
    """
    try:
        value = yaml.load(text, Loader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, KeyError) as error:  # KeyError: of `!!bool maybe`
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels") from None
    _measure(value, DEEPEST, [LARGEST])
    return value


def _measure(value: Any, levels: int, left: list[int]) -> None:
    left[0] -= 1
    if levels < 0 or left[0] < 0:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels, or has more than {LARGEST} values")
    if isinstance(value, (dict, list, tuple, set)):
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            _measure(part, levels - 1, left)
