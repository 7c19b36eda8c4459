"""How does fastbn enter the race? With one contestant for each backend, or for each instruction set of a backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np

import fastbn
from fastbn._backends import select

from .problem import EPS, MOMENTUM, Array, Contestant, Problem

Within = Callable[[], AbstractContextManager[None]]


def _isas(isas: Sequence[str]) -> tuple[str, ...]:
    usable: tuple[str, ...] = select("c").isas()  # type: ignore[attr-defined]
    if list(isas) == ["all"]:
        return usable
    unknown = [isa for isa in isas if isa not in usable]
    if unknown:
        raise ValueError(f"--isa: got {', '.join(unknown)}; allowed here: all, {', '.join(usable)}")
    return tuple(isas)


def entrants(backends: Sequence[str], isas: Sequence[str]) -> dict[str, tuple[str, str | None]]:
    """(backend, instruction set) by the contestant's name. Without instruction sets, the C backend chooses."""
    if list(backends) == ["all"]:
        backends = fastbn.backends()
    unknown = [backend for backend in backends if backend not in fastbn.backends()]
    if unknown or not backends:
        raise ValueError(
            f"--backends: got {', '.join(unknown) or 'nothing'}; allowed here: all, {', '.join(fastbn.backends())}"
        )
    if isas and "c" not in backends:
        raise ValueError(f"--isa: got {', '.join(isas)}; allowed with the c backend alone")
    named: dict[str, tuple[str, str | None]] = {}
    for backend in backends:
        if backend == "c" and isas:
            named.update({f"fastbn c {isa}": ("c", isa) for isa in _isas(isas)})
        else:
            named[f"fastbn {backend}"] = (backend, None)
    return named


def _in_place(array: Array) -> tuple[Array, Callable[[], AbstractContextManager[None]]]:
    """A copy of an array to work on, and what brings its values back before each turn."""
    copy = array.copy(order="K")

    @contextmanager
    def renewed() -> Iterator[None]:
        np.copyto(copy, array)
        yield

    return copy, renewed


def _call(problem: Problem, pass_: str, backend: str) -> tuple[Callable[[], Any], Callable[[Any], Any], Within]:
    p, (mean, var), within, result = problem, problem.running(), nullcontext, problem.variant.result
    options: dict[str, Any] = {"eps": EPS, "axis": p.axis, "backend": backend}
    options["activation"] = None if p.activation == "none" else p.activation
    options["residual"] = p.residual if p.variant.residual else None
    source, out = p.dy if pass_ == "backward" else p.x, p.out if result == "out" else None
    if result == "inplace":
        source, within = _in_place(source)
        out = source
    if pass_ == "infer":
        call = partial(fastbn.infer, source, p.gamma, p.beta, mean, var, out=out, **options)
        return call, lambda y: (p.channels_first(y),), within
    options |= {"momentum": MOMENTUM, "mask": p.mask if p.variant.mask else None}
    if pass_ == "forward":
        forward = partial(fastbn.forward, source, p.gamma, p.beta, mean, var, out=out, **options)
        return forward, lambda result: (p.channels_first(result.y),), within
    cache = fastbn.forward(p.x, p.gamma, p.beta, mean, var, **options).cache
    backward = partial(fastbn.backward, source, cache, out=out, backend=backend)
    return backward, lambda result: (p.channels_first(result[0]), *result[1:]), within


@contextmanager
def _selected(isa: str) -> Iterator[None]:
    backend: Any = select("c")
    before = backend.isa()
    backend.select_isa(isa)
    try:
        yield
    finally:
        backend.select_isa(before)


def prepare(problem: Problem, pass_: str, name: str, backend: str, isa: str | None) -> Contestant:
    """The contestant of this name for one pass. Raises NotImplementedError for what fastbn refuses in place."""
    selected = nullcontext if isa is None else partial(_selected, isa)
    with selected():
        call, results, renewed = _call(problem, pass_, backend)
        if problem.variant.result == "inplace":
            try:
                call()
            except ValueError as error:
                raise NotImplementedError(f"in place: {error}") from error

    @contextmanager
    def within() -> Iterator[None]:
        with selected(), renewed():
            yield

    return Contestant(name=name, call=call, results=results, within=within)
