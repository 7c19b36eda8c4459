"""How is the bench called from Python? `run` takes the options of `fastbn bench`, and returns rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from . import limit, rivals
from .options import Options, Words, listed, plan
from .rows import Run, describe_machine
from .runner import Plan, Runner
from .shapes import Shape


def prepared(plan: Plan, peers: Words, command: str) -> tuple[Run, Runner]:
    """A run without rows, with what is known before: the machine, and notes on what is missing."""
    loaded = rivals.load(listed(peers))
    notes = [f"not installed: {sentence}" for sentence in loaded.missing]
    notes += [note for rival in loaded.rivals.values() for note in rival.notes]
    notes += [note for note in (limit.missing(),) if note]
    versions = {title: rival.version for title, rival in loaded.rivals.items()}
    backends = dict.fromkeys(backend for backend, _ in plan.entrants.values())
    return Run(describe_machine(backends, versions, command), [], notes), Runner(plan, loaded.rivals)


def run(
    shapes: str | Sequence[str | Shape],
    *,
    passes: Words = "all",
    layouts: Words = "all",
    dtypes: Words = "float32",
    activations: Words = "none",
    strides: Words = "dense",
    results: Words | None = None,
    mask: bool = False,
    residual: bool = False,
    backends: Words | None = None,
    isa: Words = "",
    threads: str | int | Sequence[int] | None = None,
    peers: Words = "",
    batch: int | None = None,
    seconds: float = 2.0,
    progress: Callable[[str], None] = lambda race: None,
) -> list[dict[str, Any]]:
    """Times every combination of the options, and returns a row for each contestant: what `fastbn bench` prints.

    Parameters
    ----------
    shapes : str or sequence of str and tuples of int
        Channels-first: "32x64x56x56,8x64", [(32, 64, 56, 56)], or sets by name such as "resnet50" (`fastbn bench -h`).
    passes, layouts, dtypes, activations, strides : str or sequence of str
        Words as `fastbn bench` takes them, in text with commas or in a sequence, in any case; "all" is all of them.
    results : str, sequence of str or None
        Where results go: "out" (an array that is there), "fresh", "inplace".
    mask, residual : bool
        Whether a quarter of all positions is masked, and whether there is a residual.
    backends, isa : str or sequence of str
        "c", "numba", "numpy"; and instruction sets for the C backend, instead of the one that it chooses.
    threads : int, sequence of int, or None
    peers : str or sequence of str
        Other libraries to time, by the names of `fastbn bench --peers`; "all" are all that are installed.
    batch : int or None
        The batch of the networks' shapes.
    seconds : float
        About how long each race lasts. A race is one pass of one combination, in which all contestants take turns.
    progress : callable
        It is called with the name of each race before it starts.

    None for `results`, `backends` or `threads` are "out", "c" and 1 for sets of shapes. If all shapes are given by
    their sizes, they are all results, all backends but the reference, and 1 and all threads.

    Returns
    -------
    list of dict
        Schema 1, which JSON can hold: no field changes its meaning or goes as long as `fastbn.bench.rows.SCHEMA` is 1.

        - pass ("forward", "backward" or "infer"), layout ("nchw", "nhwc", or "nc" for matrices), dtype, shape (a list,
          channels-first), threads, activation, strides, result, mask, residual: what was timed
        - contestant, kind: who; "fastbn", "peer", "copy" (np.copyto of x), or "limit" (the plainest loops that move
          the same bytes; on one thread and from 1 MiB an array on, where there is a C compiler)
        - seconds: the median of a call; spread: the interquartile range over it; samples: how many there are
        - noisy: whether the spread is beyond a third; such a row should be compared with nothing
        - bytes_moved, gb_per_s: the bytes that the pass must at least move, and those over the time
        - others: times over this row's, in the same rounds of the same race. Above 1 the other takes longer. Its keys
          are "copy" and, in fastbn's rows, "limit", the peers that raced, and what the call is without one option
          ("float32", "unfused", "dense", "out=", "unmasked", "no residual")
        - agrees, difference: whether the result is that of fastbn's first row, and the largest difference from it,
          relative to its largest value

    Raises
    ------
    ValueError, ImportError
        The message names the option, what was given and what is allowed, or the package that is missing.

    >>> import fastbn.bench
    >>> rows = fastbn.bench.run("8x64", passes="infer", backends="numpy", results="out", threads=1, seconds=0.001)
    >>> [(row["contestant"], row["shape"], row["seconds"] > 0) for row in rows]
    [('copy', [8, 64], True), ('fastbn numpy', [8, 64], True)]
    """
    chosen = Options(
        shapes=shapes, passes=passes, layouts=layouts, dtypes=dtypes, activations=activations, strides=strides,
        results=results, mask=mask, residual=residual, backends=backends, isa=isa, threads=threads, batch=batch,
        seconds=seconds,
    )  # fmt: skip
    _, runner = prepared(plan(chosen), peers, "fastbn.bench.run")
    return [row.as_json() for row in runner.run(progress)]
