"""How does fastbn enter the race? With one contestant for each backend, or for each instruction set of a backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import fastbn
from fastbn._backends import select

from .problem import EPS, MOMENTUM, Contestant, Problem


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
    if unknown:
        raise ValueError(f"--backends: got {', '.join(unknown)}; allowed here: all, {', '.join(fastbn.backends())}")
    if isas and "c" not in backends:
        raise ValueError(f"--isa: got {', '.join(isas)}; allowed with the c backend alone")
    named: dict[str, tuple[str, str | None]] = {}
    for backend in backends:
        if backend == "c" and isas:
            named.update({f"fastbn c {isa}": ("c", isa) for isa in _isas(isas)})
        else:
            named[f"fastbn {backend}"] = (backend, None)
    return named


def _call(problem: Problem, pass_: str, backend: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    p, (mean, var) = problem, problem.running()
    options: dict[str, Any] = {"eps": EPS, "axis": p.axis, "out": p.out, "backend": backend}
    options["activation"] = None if p.activation == "none" else p.activation
    if pass_ == "infer":
        return partial(fastbn.infer, p.x, p.gamma, p.beta, mean, var, **options), lambda y: (p.channels_first(y),)
    forward = partial(fastbn.forward, p.x, p.gamma, p.beta, mean, var, momentum=MOMENTUM, **options)
    if pass_ == "forward":
        return forward, lambda result: (p.channels_first(result.y),)
    backward = partial(fastbn.backward, p.dy, forward().cache, out=p.out, backend=backend)
    return backward, lambda result: (p.channels_first(result[0]), *result[1:])


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
    """The contestant of this name for one pass."""
    within = nullcontext if isa is None else partial(_selected, isa)
    with within():
        call, results = _call(problem, pass_, backend)
    return Contestant(name=name, call=call, results=results, within=within)
