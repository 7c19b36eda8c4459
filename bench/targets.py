"""How fast should it be? The project's targets, in one place, and whether a run meets them. No test depends on them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .problem import PASSES, Variant
from .rows import COPY, FASTBN, Row, races
from .shapes import FIXED, Shape, written

TABLE: tuple[tuple[Shape, tuple[float, float, float, float, float]], ...] = (
    # shape                 forward NCHW, NHWC; backward NCHW, NHWC; infer in either
    ((32, 64, 112, 112), (1.2, 1.3, 1.8, 2.2, 0.85)),
    ((32, 256, 56, 56), (1.3, 1.6, 1.8, 2.5, 0.85)),
    ((32, 512, 28, 28), (1.4, 1.7, 1.9, 2.5, 0.9)),
    ((32, 1024, 14, 14), (1.8, 1.9, 2.4, 2.8, 1.1)),
    ((32, 2048, 7, 7), (1.8, 1.8, 2.6, 2.8, 1.1)),
    ((256, 1024), (2.2, 2.2, 3.2, 3.2, 1.3)),
    ((1, 256, 56, 56), (1.2, 1.8, 1.8, 2.6, 1.1)),
)
"""The largest ratios to a copy's time that the C backend may have: float32, with out=, warm."""

SMALL: tuple[tuple[str, Shape, str, float], ...] = (
    ("infer", (1, 64), "NumPy careful", 1.0),
    ("forward", (8, 64), "torch", 0.5),
    ("backward", (8, 64), "torch", 0.5),
)
"""Small calls on one thread: the largest ratio to that peer's time that the C backend may have."""

GEOMETRIC_MEANS = {"forward": 4.0, "backward": 2.5}
"""How many times faster than "torch reused" the C backend should be, in the geometric mean of the table's shapes."""

SPEEDUP_OF_TWO_THREADS = 1.7
NUMBA_OVER_C, NUMBA_FROM_ELEMENTS = 1.5, 1_000_000

AGAINST: dict[str, tuple[str, float, tuple[str, ...]]] = {
    "float16": ("float32", 0.65, ("forward", "backward", "infer")),
    "bfloat16": ("float32", 0.65, ("forward", "backward", "infer")),
    "relu": ("unfused", 1.15, ("forward", "infer")),
    "sigmoid": ("unfused", 1.5, ("forward", "infer")),
    "silu": ("unfused", 1.5, ("forward", "infer")),
}
"""For a dtype or activation: its base, the largest ratio to the base's time that the C backend may have on the shapes
of `operation`, and the passes that this limit is for. Other passes are reported without a limit."""

_COLUMNS = {("forward", "nchw"): 0, ("forward", "nhwc"): 1, ("backward", "nchw"): 2, ("backward", "nhwc"): 3}
_BOUNDS = dict(TABLE)


def bound(row: Row) -> float | None:
    """The table's bound on this row's ratio to a copy, or None."""
    if not is_c(row) or row.variant != Variant() or row.shape not in _BOUNDS:
        return None
    layout = "nchw" if row.layout == "nc" else row.layout
    return _BOUNDS[row.shape][_COLUMNS.get((row.pass_, layout), 4)]


def is_c(row: Row) -> bool:
    """Whether a row is the C backend's, with any instruction set."""
    return row.kind == FASTBN and row.contestant.split()[1] == "c"


@dataclass(frozen=True)
class Verdict:
    """A target in words, what was measured, and whether the target is met."""

    target: str
    measured: str
    met: bool


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean, which is the right mean for ratios."""
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))


def threads_in_words(threads: int) -> str:
    """A number of threads in words."""
    return "1 thread" if threads == 1 else f"{threads} threads"


def _name(row: Row) -> str:
    variant = "" if row.variant == Variant() else f" {row.variant}"
    return f"{row.pass_} {written(row.shape)} {row.layout}{variant}, {threads_in_words(row.threads)}"


def _table(rows: list[Row]) -> Iterator[Verdict]:
    bounded = [(row, most) for row in rows if not row.noisy and (most := bound(row)) is not None]
    missed = [f"{_name(row)}: {row.to_copy:.2f} > {most:g}" for row, most in bounded if row.to_copy > most]
    if bounded:
        score = f"{len(bounded) - len(missed)} of {len(bounded)} cells"
        yield Verdict("ratio to a copy within the table's bounds", "; ".join([score, *missed]), not missed)


def faster_peers(rows: Sequence[Row]) -> list[str]:
    """For each peer that is faster in rows of fastbn: in how many, and by how much at best. Noisy rows do not count."""
    steady = {(row.key, row.contestant) for row in rows if not row.noisy}
    ours = [row for row in rows if row.kind == FASTBN and row.over and not row.noisy]
    found = []
    for peer in dict.fromkeys(peer for row in ours for peer in row.over):
        faced = [row for row in ours if peer in row.over and (row.key, peer) in steady]
        lost = sorted((row for row in faced if row.over[peer] < 1), key=lambda row: row.over[peer])
        if lost:
            worst = f"{lost[0].over[peer]:.2f}x for {_name(lost[0])}"
            found.append(f"{peer} in {len(lost)} of {len(faced)} rows that are not noisy, at best {worst}")
    return found


def _no_faster_peer(rows: list[Row]) -> Iterator[Verdict]:
    ours = [row for row in rows if is_c(row)]
    steady = {(row.key, row.contestant) for row in rows if not row.noisy}
    if any((row.key, one) in steady for row in ours if not row.noisy for one in row.over):
        beaten = faster_peers([*ours, *(row for row in rows if row.kind != FASTBN)])
        yield Verdict("no peer is faster", "; ".join(beaten) or "none is", not beaten)


def _torch(rows: list[Row]) -> Iterator[Verdict]:
    for pass_, least in GEOMETRIC_MEANS.items():
        for threads in sorted({row.threads for row in rows}):
            fitting = [row for row in rows if bound(row) and (row.pass_, row.threads) == (pass_, threads)]
            ratios = [row.over["torch reused"] for row in fitting if "torch reused" in row.over]
            if ratios:
                mean = geometric_mean(ratios)
                where = f"{pass_}, {threads_in_words(threads)}"
                target = f"torch reused over fastbn, {where}, geometric mean: at least {least:g}"
                yield Verdict(target, f"{mean:.2f}", mean >= least)


def _small(rows: list[Row]) -> Iterator[Verdict]:
    for pass_, shape, peer, most in SMALL:
        for row in rows:
            here = (row.pass_, row.shape, row.threads, row.variant) == (pass_, shape, 1, Variant())
            if is_c(row) and here and peer in row.over:
                ratio = 1 / row.over[peer]
                yield Verdict(f"{pass_} {written(shape)} at most {most:g} of {peer}", f"{ratio:.2f}", ratio <= most)


def _two_threads(rows: list[Row]) -> Iterator[Verdict]:
    """If a copy becomes this much faster with a second thread, every pass should."""
    times = {(*row.key[:4], row.contestant, row.threads): row.seconds for row in rows}
    slow, count = [], 0
    for row in rows:
        one = (*row.key[:4], row.contestant, 1)
        copies = [(*row.key[:4], COPY, threads) for threads in (1, 2)]
        if not is_c(row) or row.threads != 2 or one not in times or any(copy not in times for copy in copies):
            continue
        if times[copies[0]] / times[copies[1]] >= SPEEDUP_OF_TWO_THREADS:
            count += 1
            gain = times[one] / row.seconds
            if gain < SPEEDUP_OF_TWO_THREADS:
                slow.append(f"{_name(row)}: {gain:.2f}")
    if count:
        target = f"two threads at least {SPEEDUP_OF_TWO_THREADS:g} times faster than one, where a copy is"
        yield Verdict(target, "; ".join([f"{count - len(slow)} of {count} rows", *slow]), not slow)


def _numba(rows: list[Row]) -> Iterator[Verdict]:
    slow, count = [], 0
    for race in races(rows).values():
        c, numba = ([row for row in race if row.contestant == name] for name in ("fastbn c", "fastbn numba"))
        if c and numba and math.prod(c[0].shape) >= NUMBA_FROM_ELEMENTS:
            count += 1
            ratio = numba[0].to_copy / c[0].to_copy
            if ratio > NUMBA_OVER_C:
                slow.append(f"{_name(numba[0])}: {ratio:.2f}")
    if count:
        target = f"numba at most {NUMBA_OVER_C:g} times c from {NUMBA_FROM_ELEMENTS:,} elements"
        yield Verdict(target, "; ".join([f"{count - len(slow)} of {count} rows", *slow]), not slow)


def _against(rows: list[Row]) -> Iterator[Verdict]:
    """What a dtype or an activation costs where memory bandwidth is the limit."""
    large = [row for row in rows if is_c(row) and row.shape in FIXED["operation"]]
    for word, (base, most, passes) in AGAINST.items():
        found = [row for row in large if word in (row.dtype, row.activation) and base in row.against]
        judged = [row for row in found if row.pass_ in passes]
        over = [f"{_name(row)}: {row.against[base]:.2f}" for row in judged if row.against[base] > most]
        if judged:
            worst = [
                f"{pass_} at most {max(ratios):.2f}{'' if pass_ in passes else ' (no limit)'}"
                for pass_ in PASSES
                if (ratios := [row.against[base] for row in found if row.pass_ == pass_])
            ]
            score = f"{len(judged) - len(over)} of {len(judged)} rows; {', '.join(worst)}"
            yield Verdict(f"{word} at most {most:g} of {base}", "; ".join([score, *over]), not over)


def verdicts(rows: list[Row]) -> list[Verdict]:
    """The verdict on each target that the rows have figures for. Noisy rows of fastbn meet and miss none."""
    steady = [row for row in rows if not (row.kind == FASTBN and row.noisy)]
    reports = (_table, _no_faster_peer, _torch, _small, _two_threads, _numba, _against)
    return [verdict for report in reports for verdict in report(steady)]
