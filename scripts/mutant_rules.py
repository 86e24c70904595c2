"""What a small wrong change to the package is: rules over the syntax tree, and a draw among all that they give."""

from __future__ import annotations

import ast
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("adapters", "base", "gates", "tokens", "skip", "sketches", "training")
QUIET = re.compile(r"^(print|warn|warnings|log|logger|logging|tqdm)\b")
PATHS = re.compile(r"path|folder|directory|root", re.IGNORECASE)  # theirs is another kind of division
ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}
ARITHMETIC |= {ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}
COMPARISONS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq}
COMPARISONS |= {ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}


def like(node: ast.AST, **fields) -> ast.AST:
    """The same node with other fields."""
    return type(node)(**{name: value for name, value in ast.iter_fields(node)} | fields)


def wrong(node: ast.AST, modules: set[str]) -> Iterator[ast.AST]:
    """Nodes to put in this one's place; `modules` are the names of imported ones."""
    match node:
        case ast.BinOp(op=op, left=left) if type(op) in ARITHMETIC:
            if not isinstance(left, (ast.JoinedStr, ast.List)) and not PATHS.search(ast.unparse(left)):
                yield left if isinstance(op, ast.BitOr) else like(node, op=ARITHMETIC[type(op)]())
        case ast.AugAssign(op=op, target=target, value=value) if type(op) in ARITHMETIC:
            yield like(node, op=ARITHMETIC[type(op)]())
            yield ast.Assign(targets=[target], value=value, lineno=0)
        case ast.Compare(ops=[op, *ops]):
            yield like(node, ops=[COMPARISONS[type(op)](), *ops])
        case ast.BoolOp(op=op, values=[first, *rest]):
            yield like(node, op=ast.Or() if isinstance(op, ast.And) else ast.And())
            yield first
            yield rest[0] if len(rest) == 1 else like(node, values=rest)
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert(), operand=operand):
            yield operand
        case ast.IfExp(body=body, orelse=orelse):
            yield body
            yield orelse
        case ast.Constant(value=bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(value=int() | float() as value):
            yield ast.Constant(value * 2 if isinstance(value, float) and value else value + 1)
        case ast.Expr(value=ast.Call()) | ast.Raise():
            yield ast.Pass()
        case ast.Return(value=ast.Compare() | ast.BoolOp() | ast.UnaryOp(op=ast.Not()) as value):
            yield like(node, value=ast.UnaryOp(ast.Not(), value))
        case ast.Return(value=ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div()) as value):
            yield like(node, value=ast.UnaryOp(ast.USub(), value))
        case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
            yield like(node, value=ast.Constant(None))
        case ast.Call(func=func, args=args, keywords=keywords) if not any(isinstance(a, ast.Starred) for a in args):
            yield from wrong_calls(node, func, args, keywords, modules)


def wrong_calls(node: ast.Call, func: ast.expr, args: list, keywords: list, modules: set[str]) -> Iterator[ast.AST]:
    """The call's receiver or first argument instead, two arguments swapped, one named argument left out."""
    whole = ast.unparse(func)
    if isinstance(func, ast.Attribute) and whole.split(".")[0] not in modules:
        yield from [] if whole.startswith("super()") else [func.value]
    elif args:
        yield args[0]
    if len(args) > 1 and whole not in ("min", "max"):
        yield like(node, args=[args[1], args[0], *args[2:]])
    yield from (
        like(node, keywords=[other for other in keywords if other is not left])
        for left in keywords
        if not left_alone(left)
    )


def left_alone(node: ast.AST) -> bool:
    """Texts, types and what only speaks to people: nothing in these is changed."""
    match node:
        case ast.Expr(value=ast.Call(func=func)):
            return bool(QUIET.match(ast.unparse(func)))
        case (
            ast.JoinedStr() | ast.Import() | ast.ImportFrom() | ast.Expr(value=ast.Constant()) | ast.keyword(arg="repr")
        ):
            return True
        case ast.FunctionDef(name="__repr__" | "__str__" | "extra_repr") | ast.Assign(targets=[ast.Name("__all__")]):
            return True
    return False


def walk(node: ast.AST, around: tuple[ast.stmt, ...] = ()) -> Iterator[tuple[ast.AST, tuple[ast.stmt, ...]]]:
    """Every node that may be changed, and the statements it is in, the outermost first."""
    if left_alone(node):
        return
    around = (*around, node) if isinstance(node, ast.stmt) else around
    yield node, around
    for name, value in ast.iter_fields(node) if not isinstance(node, ast.Raise) else ():
        if name not in ("annotation", "returns", "decorator_list", "bases"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from walk(child, around)


def mutants_of(path: str, text: str) -> Iterator[dict]:
    """Every mutant of a file: the lines before and after, and how to find the tests that meet it."""
    tree, lines = ast.parse(text), text.splitlines()
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    modules = {(alias.asname or alias.name).split(".")[0] for node in imports for alias in node.names} | {"F", "nn"}
    for node, around in walk(tree):
        for other in wrong(node, modules) if around else ():
            first, last = node.lineno, node.end_lineno
            code = ast.unparse(ast.fix_missing_locations(other))
            code = f"({code})" if isinstance(other, (ast.BinOp, ast.BoolOp, ast.Compare, ast.UnaryOp)) else code
            head, tail = lines[first - 1].encode()[: node.col_offset], lines[last - 1].encode()[node.end_col_offset :]
            new = f"{head.decode()}{code}{tail.decode()}"
            kind = type(node).__name__
            yield {"path": path, "line": first, "kind": kind, "old": lines[first - 1 : last], "new": new} | where(
                path, node, around, lines
            )


def where(path: str, node: ast.AST, around: tuple[ast.stmt, ...], lines: list[str]) -> dict:
    """Names that a test of a change speaks of, and a pattern of the lines that show it when they run."""
    scopes = [place for place in around if isinstance(place, (ast.FunctionDef, ast.ClassDef))]
    names = [scope.name for scope in scopes]
    if not any(isinstance(scope, ast.FunctionDef) for scope in scopes):  # wherever the name is read
        names += [target.id for target in ast.walk(around[-1]) if isinstance(target, ast.Name)][:1]
        return {"names": names, "shows": rf"\b{names[-1]}\b" if names else "^$"}
    spread = around[-1] if isinstance(around[-1], ast.FunctionDef) else node  # a default shows in the body
    numbers = {around[-1].lineno, *range(spread.lineno, spread.end_lineno + 1)}
    texts = {lines[number - 1].strip() for number in numbers} - {""}
    return {"names": names, "shows": f"^{path}:({'|'.join(sorted(map(re.escape, texts)))})$"}


def mutated(mutant: dict, text: str) -> str:
    """The file's text with the change, made where its lines now are; empty where they are gone or nothing changes."""
    lines, size = text.splitlines(), len(mutant["old"])
    starts = [n for n in range(len(lines)) if lines[n : n + size] == mutant["old"]]
    if not starts:
        return ""
    start = min(starts, key=lambda n: abs(n + 1 - mutant["line"]))
    changed = "\n".join([*lines[:start], mutant["new"], *lines[start + size :]]) + "\n"
    try:
        return "" if ast.dump(ast.parse(changed)) == ast.dump(ast.parse(text)) else changed
    except SyntaxError:
        return ""


def draw(seed: int, count: int, under: str = "") -> list[dict]:
    """As many mutants, on lines evenly spread over all that have any; of files whose path has `under` in it."""
    places, texts, drawn = defaultdict(list), {}, []
    for path in sorted(path for room in ROOMS for path in (ROOT / "lorakit" / room).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        texts[name] = path.read_text()
        for mutant in mutants_of(name, texts[name]) if under in name else ():
            places[name, mutant["line"]].append(mutant)
    chance, sites = random.Random(seed), list(places.values())
    start, step = chance.random(), len(sites) / count
    for number in range(count):
        site = sites[int((number + start) * step)]
        kinds = {kind: chance.random() for kind in sorted({mutant["kind"] for mutant in site})}  # else most were calls
        site = sorted(chance.sample(site, len(site)), key=lambda mutant: kinds[mutant["kind"]])
        drawn += [mutant for mutant in site if mutated(mutant, texts[mutant["path"]])][:1]
    return drawn
