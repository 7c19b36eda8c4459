"""What is to be run? Reads the options of the command line and of `fastbn.bench.run`, and makes a plan of them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from numbers import Integral, Real
from typing import Any

import fastbn

from . import ours, shapes
from .problem import ACTIVATIONS, DTYPES, LAYOUTS, PASSES, RESULTS, STRIDES, Variant
from .runner import Plan
from .shapes import Shape
from .timing import Budget

Words = str | Sequence[str]

QUICK_SHAPES = "8x64,2x32x14x14"
QUICK_BUDGET = Budget(seconds=0.05, least=3)


@dataclass(kw_only=True)
class Options:
    """As the command line has them. A list is text with commas or a sequence; None is the usual, see `plan`."""

    shapes: str | Sequence[str | Shape] | None = None
    batch: int | None = None
    passes: Words = PASSES
    layouts: Words = LAYOUTS
    dtypes: Words | None = None
    activations: Words | None = None
    strides: Words | None = None
    results: Words | None = None
    mask: bool = False
    residual: bool = False
    operation: bool = False
    backends: Words | None = None
    isa: Words = ""
    threads: str | int | Sequence[int] | None = None
    seconds: float | None = None
    quick: bool = False


def listed(option: str, given: Words) -> list[str]:
    """The words of a list, without the empty ones."""
    found = shapes.items(option, given, (str,), "text with commas, or a sequence of text")
    return [word.strip() for word in found if word.strip()]


def words(option: str, allowed: Sequence[str], given: Words) -> tuple[str, ...]:
    """The words of a list, in any case; "all" means all of them."""
    named = {word.lower(): word for word in allowed}
    found = [word.lower() for word in listed(option, given)]
    if found == ["all"]:
        return tuple(allowed)
    unknown = [word for word in found if word not in named]
    if unknown or not found:
        close = [
            f"did you mean {named[near[0]]}? " for word in unknown if (near := difflib.get_close_matches(word, named))
        ]
        raise ValueError(
            f"{option}: got {', '.join(unknown) or 'nothing'}; {''.join(close)}allowed: all, {', '.join(allowed)}"
        )
    return tuple(dict.fromkeys(named[word] for word in found))


def numbers(option: str, given: str | int | Sequence[int]) -> tuple[int, ...]:
    """The positive integers of a list; "all" means 1 and as many threads as fastbn uses by itself."""
    most = fastbn.get_num_threads()
    allowed = f"all, or positive integers such as 1,{most}"
    found = [given] if isinstance(given, Integral) else shapes.items(option, given, (str, Integral), allowed)
    texts = [str(number).strip() for number in found]
    if texts == ["all"]:
        return tuple(dict.fromkeys((1, most)))
    if not texts or not all(text.isdecimal() and int(text) > 0 for text in texts):
        raise ValueError(f"{option}: got {','.join(texts)!r}; allowed: {allowed}")
    return tuple(dict.fromkeys(map(int, texts)))


def _of_type(option: str, given: Any, kind: type, allowed: str) -> None:
    """Raises TypeError unless the argument is of this kind; a bool is no number."""
    if not isinstance(given, kind) or (isinstance(given, bool) and kind is not bool):
        raise TypeError(f"{option}: got {given!r}; allowed: {allowed}")


def _check(options: Options) -> None:
    """Raises TypeError or ValueError for the options that are no lists."""
    for option in ("mask", "residual"):
        _of_type(f"--{option}", getattr(options, option), bool, "True or False")
    if options.batch is not None:
        _of_type("--batch", options.batch, Integral, "a positive integer")
        if options.batch < 1:
            raise ValueError(f"--batch: got {options.batch}; allowed: a positive integer")
    if options.seconds is not None:
        _of_type("--seconds", options.seconds, Real, "a number, more than 0")
        if not 0 < options.seconds < math.inf:
            raise ValueError(f"--seconds: got {options.seconds}; allowed: a finite number, more than 0")


def budget(options: Options) -> Budget:
    """How long a race lasts."""
    _check(options)
    usual = QUICK_BUDGET if options.quick else Budget()
    return Budget(options.seconds or usual.seconds, usual.least)


def variants(options: Options, results: Words) -> tuple[Variant, ...]:
    """Every combination of the options; with `operation`, the plain variant with one option changed at a time."""
    usual = ("all", "all", "all") if options.operation else (DTYPES[0], ACTIVATIONS[0], STRIDES[0])
    dtypes = words("--dtypes", DTYPES, usual[0] if options.dtypes is None else options.dtypes)
    activations = words("--activations", ACTIVATIONS, usual[1] if options.activations is None else options.activations)
    strides = words("--strides", STRIDES, usual[2] if options.strides is None else options.strides)
    chosen, parts = words("--results", RESULTS, results), {"mask": options.mask, "residual": options.residual}
    if not options.operation:
        every = product(dtypes, activations, strides, chosen)
        return tuple(Variant(*four, **parts) for four in every)
    alone = [Variant(dtype=dtype, **parts) for dtype in dtypes]
    alone += [Variant(activation=activation, **parts) for activation in activations]
    alone += [Variant(strides=one, **parts) for one in strides]
    alone += [Variant(result=one, **parts) for one in chosen]
    return tuple(dict.fromkeys(alone))


def plan(options: Options) -> Plan:
    """What these options ask for.

    Where every shape is given by its sizes, the question is what is fastest for it: all backends but the reference,
    one thread and all of them, and all results are usual. For the sets it is the C backend on one thread with out=.
    """
    timed = budget(options)
    named = "operation" if options.operation else "targets"
    given = (QUICK_SHAPES if options.quick else named) if options.shapes is None else options.shapes
    asks = options.shapes is not None and not options.operation and not shapes.names_in(given)
    every = ",".join(name for name in fastbn.backends() if name != "numpy") or "numpy"
    isas = listed("--isa", options.isa)
    usual = every if asks and not isas else fastbn.get_backend() if "c" not in fastbn.backends() else "c"
    backends = usual if options.backends is None else options.backends
    results = options.results if options.results is not None else "all" if asks else RESULTS[0]
    threads = options.threads if options.threads is not None else "all" if asks else 1
    found = Plan(
        shapes=shapes.parse(given, options.batch),
        passes=words("--passes", PASSES, options.passes),
        layouts=words("--layouts", LAYOUTS, options.layouts),
        variants=variants(options, results),
        threads=numbers("--threads", threads),
        entrants=ours.entrants(listed("--backends", backends), isas),
        budget=timed,
    )
    if not found.races:
        raise ValueError(
            f"--shapes: got {', '.join(map(shapes.written, found.shapes))}, of which nothing is left to time with "
            f"passes {', '.join(found.passes)} of {', '.join(map(str, found.variants))}; allowed: forward and backward "
            "for shapes with several values a channel, infer without a mask, broadcast for several examples, broadcast "
            "and middle with an axis of space, in place on dense arrays"
        )
    return found
