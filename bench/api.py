"""How is the bench called from Python? `run` takes the options of `fastbn bench`, and returns rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from . import limit, rivals
from .options import Options, Words, listed, plan
from .rows import Run, describe_machine
from .runner import Plan, Runner
from .shapes import Shape

MISSING = "not installed: "
"""How the note on a peer that is not installed begins."""


def prepared(plan: Plan, peers: Words, command: str) -> tuple[Run, Runner]:
    """A run without rows, with what is known before: the machine, and notes on what is missing."""
    loaded = rivals.load(listed("--peers", peers))
    notes = [f"{MISSING}{sentence}" for sentence in loaded.missing]
    notes += [note for rival in loaded.rivals.values() for note in rival.notes]
    notes += [note for note in (limit.missing(),) if note]
    versions = {title: rival.version for title, rival in loaded.rivals.items()}
    backends = dict.fromkeys(backend for backend, _ in plan.entrants.values())
    return Run(describe_machine(backends, versions, command), [], notes), Runner(plan, loaded.rivals)


@contextmanager
def _as_arguments() -> Iterator[None]:
    """Errors name the options of the command line; here they name the arguments of `run`."""
    try:
        yield
    except (TypeError, ValueError, ImportError) as error:
        if not str(error).startswith("--"):
            raise
        raise type(error)(str(error).removeprefix("--")) from None


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
    """Times every combination of the arguments, and returns a row for each contestant.

    These are the rows of `fastbn bench`, which also prints tables and what is fastest, and draws pictures.

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
        Numbers of threads; "all" is 1 and as many as fastbn uses by itself.
    peers : str or sequence of str
        Other libraries to time, by the names of `fastbn bench --peers`; "all" are all that are installed.
    batch : int or None
        The batch of the networks' shapes.
    seconds : float
        About how long each race lasts. A race is one pass of one shape in one layout, with one dtype, activation,
        strides, result and number of threads. All backends, peers and the copy take turns in it.
    progress : callable
        It is called with the name of each race before it starts.

    Combinations that make no sense are left out: forward and backward with one value a channel, inference with a mask,
    strides that a shape does not have, and in place on arrays that are not dense.

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
    TypeError, ValueError, ImportError
        The message names the argument, what was given and what is allowed, or the package that is missing. It is a
        ValueError as well if no combination is left.

    Warns
    -----
    RuntimeWarning
        A backend or peer does not run, or its result differs; a peer that was asked for by name is not installed.

    Examples
    --------
    >>> import fastbn.bench
    >>> rows = fastbn.bench.run(
    ...     "8x64", passes="infer", backends="numpy", results="out", threads=1, seconds=0.001
    ... )
    >>> [(row["contestant"], row["shape"], row["seconds"] > 0) for row in rows]
    [('copy', [8, 64], True), ('fastbn numpy', [8, 64], True)]

    What is fastest for an array? Compare rows that are not noisy, of the same pass, layout and dtype:

    >>> rows = fastbn.bench.run(
    ...     "8x16x5x3", passes="forward", layouts="nchw", backends="numpy", results="out,fresh",
    ...     threads=1, seconds=0.01,
    ... )
    >>> ours = [row for row in rows if row["kind"] == "fastbn"]
    >>> fastest = min(ours, key=lambda row: row["seconds"])
    >>> if not fastest["noisy"]:  # else take more `seconds`, or an idle machine
    ...     answer = fastest["contestant"], fastest["threads"], fastest["result"]
    >>> over_a_copy = 1 / fastest["others"]["copy"]
    """
    chosen = Options(
        shapes=shapes, passes=passes, layouts=layouts, dtypes=dtypes, activations=activations, strides=strides,
        results=results, mask=mask, residual=residual, backends=backends, isa=isa, threads=threads, batch=batch,
        seconds=seconds,
    )  # fmt: skip
    if not callable(progress):
        raise TypeError(f"progress: got {progress!r}; allowed: a function of one text")
    with _as_arguments():
        empty, runner = prepared(plan(chosen), peers, "fastbn.bench.run")
        rows = [row.as_json() for row in runner.run(progress)]
        named = listed("--peers", peers) != ["all"]
    missing = [note for note in empty.notes if named and note.startswith(MISSING)]
    for note in [*missing, *runner.notes]:
        warnings.warn(note, RuntimeWarning, stacklevel=2)
    return rows
