"""Where is the source of a function's code, and which calls there are which instructions?"""

from __future__ import annotations

import ast
import dis
import functools
import linecache
import warnings
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

Function = ast.FunctionDef | ast.Lambda
Place = tuple[int, int, int]
"""A call in code: the identity of the code, and where the call ends in the source, where no other call does."""

_CALLS = {"CALL", "CALL_KW", "CALL_FUNCTION_EX"}
_AROUND = {"RESUME", "MAKE_CELL", "COPY_FREE_VARS", "RETURN_VALUE"}
"""Instructions whose place may be that of a function, not of what is in it."""


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for one in code.co_consts:
        if isinstance(one, CodeType):
            yield from _codes(one)


@functools.lru_cache(maxsize=16)
def _parsed(source: str, apart: bool) -> tuple[list[Function], list[CodeType]]:
    """The functions in a source, and the code that they are compiled to: as a whole, or each statement apart.

    Notebooks do the latter. It is not the same: Python calls methods of what a source imports otherwise.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(source)
            parts = [ast.Module([one], []) for one in tree.body] if apart else [tree]
            codes = [code for part in parts for code in _codes(compile(part, "", "exec", dont_inherit=True))]
    except (SyntaxError, ValueError, RecursionError):
        return [], []
    return [node for node in ast.walk(tree) if isinstance(node, Function)], codes


_found: dict[int, tuple[CodeType, Function | None, dict[tuple[int, int], Place]]] = {}
"""What was found of code, by its identity, since equal code may be in several places. It is kept, so that it stays."""


def _of(code: CodeType, names: dict[str, Any] | None = None) -> Any:
    found = _found.get(id(code))
    if found is None:
        found = _found[id(code)] = code, _definition(code, names), _calls(code)
    return found


def function_of(function: FunctionType) -> Function | None:
    """The definition of a function, if it is at hand and compiles to the function's code."""
    node: Function | None = _of(function.__code__, function.__globals__)[1]
    return node


def calls_of(code: CodeType) -> dict[tuple[int, int], Place]:
    """The calls in code, by the identity of the code and the offsets at which a frame may be while a call runs."""
    calls: dict[tuple[int, int], Place] = _of(code)[2]
    return calls


def _definition(code: CodeType, names: dict[str, Any] | None) -> Function | None:
    source, positions = "".join(linecache.getlines(code.co_filename, names)), list(code.co_positions())
    for apart in (False, True):
        nodes, codes = _parsed(source, apart)
        if any(code == one and positions == list(one.co_positions()) for one in codes):
            break
    else:
        return None
    spans = [step.positions for step in dis.get_instructions(code) if step.opname not in _AROUND]
    found: Any = [span for span in spans if span is not None and None not in span]
    start = min(((span[0], span[2]) for span in found), default=None)
    end = max(((span[1], span[3]) for span in found), default=None)
    if start is None or end is None:
        return None
    around = [(*span, node) for node in nodes for span in [_span(node)] if span[0] <= start and end <= span[1]]
    return max(around, key=lambda one: one[0])[2] if around else None  # the innermost starts last


def _span(node: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where the body of a function starts and ends."""
    body = node.body if isinstance(node.body, list) else [node.body]
    return (body[0].lineno, body[0].col_offset), (body[-1].end_lineno, body[-1].end_col_offset)


def _calls(code: CodeType) -> dict[tuple[int, int], Place]:
    steps: list[Any] = list(dis.get_instructions(code))
    ends = [*(step.offset for step in steps[1:]), len(code.co_code)]
    calls = [(step, end) for step, end in zip(steps, ends, strict=True) if step.opname in _CALLS]
    starts: dict[Any, set[Any]] = {}
    for step, _ in calls:
        starts.setdefault(step.positions[1::2], set()).add(step.positions[::2])
    return {
        (id(code), offset): (id(code), *step.positions[1::2])
        for step, end in calls
        if None not in step.positions and len(starts[step.positions[1::2]]) == 1
        for offset in range(step.offset, end, 2)
    }


def place_of(code: CodeType, call: ast.Call) -> Place:
    """The place of a call in code."""
    return id(code), call.end_lineno or 0, call.end_col_offset or 0


def stored(body: list[Any]) -> set[str]:
    """The names that nodes bind or delete, and some more."""
    nodes = [one for node in body for one in ast.walk(node)]
    names = {one.id for one in nodes if isinstance(one, ast.Name) and not isinstance(one.ctx, ast.Load)}
    for one in nodes:  # of functions, classes, handlers, patterns and imports
        found = [getattr(one, field, None) for field in ("name", "rest", "asname")]
        names |= {name.partition(".")[0] for name in found if isinstance(name, str)}
    return names


def contains(body: list[ast.stmt], *kinds: type[ast.AST]) -> bool:
    """Whether there are nodes of these kinds in statements."""
    return any(isinstance(node, kinds) for statement in body for node in ast.walk(statement))
